"""How ids lie in a file: cut at any size, decoded, and refused, encoding by encoding; whole towers are in test_pieces."""

import io
import json
import re
import zlib

import numpy as np
import pyarrow as pa
import pytest
from wire_format import field, varint

from beam_pipeline.errors import BadIdError, ChecksumError, CorruptFileError, UnsupportedModelError
from beam_pipeline.files import ByteFile
from beam_pipeline.formats import encodings
from beam_pipeline.formats.model import Checksum, Encoding, Vocabulary
from beam_pipeline.formats.protobuf import Span


def opened(data):
    return ByteFile("ids", io.BytesIO(data), len(data))


def vocabulary(data, encoding, **changes):
    return Vocabulary("ids", Span(0, len(data)), encoding, 1, **changes)


def cuts(data, encoding, rows=1, **changes):
    return list(encodings.cuts(opened(data), vocabulary(data, encoding, **changes), rows))


def refusal(error, function, *arguments):
    with pytest.raises(error) as caught:
        function(*arguments)
    return str(caught.value)


def test_the_first_ids():
    data = b"a\n\xff\nc\n"
    assert encodings.first(opened(data), vocabulary(data, Encoding.LINES), 2) == (["a", "\\xff"], 4)
    assert encodings.first(opened(data), vocabulary(data, Encoding.LINES), 9) == (["a", "\\xff", "c"], 6)
    assert encodings.first(opened(b""), vocabulary(b"", Encoding.LINES), 9) == ([], 0)


def test_a_file_that_changes_between_counting_and_reading():
    message = refusal(CorruptFileError, encodings.decode, Encoding.LINES, b"a\n" * 1200, 1199)
    assert message == "1,200 ids where 1,199 were counted: the file changed while it was read"


def test_no_line_is_read_before_an_empty_vocabulary():
    data = b"[UNK]\nx"
    empty = Vocabulary("ids", Span(7, 7), Encoding.LINES, 1)
    assert list(encodings.cuts(opened(data), empty, 1)) == []


@pytest.mark.parametrize("algorithm", ["crc32", "crc32c"])
@pytest.mark.parametrize("encoding", [Encoding.LINES, Encoding.JSON])
def test_a_checksum_is_of_its_algorithm_and_covers_what_is_before_the_ids(encoding, algorithm):
    data = b"before" + (b"a\nb\n" if encoding is Encoding.LINES else b'"a","b"')
    value = {"crc32": zlib.crc32, "crc32c": encodings.checksums.google_crc32c.value}[algorithm](data)

    def read(content):
        ids = Vocabulary(
            "ids", Span(6, len(data)), encoding, 1, checksum=Checksum(algorithm, value, Span(0, len(data)))
        )
        return list(encodings.cuts(opened(content), ids, 2))

    assert read(data) == [(2, len(data))]
    for at in (0, 7):
        damaged = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        assert refusal(ChecksumError, read, damaged).startswith(
            f"ids: the ids at byte 6 do not match their {algorithm}"
        )


def test_an_entry_of_one_byte_at_the_end():
    """A tag without a length is as broken in the last byte as elsewhere."""
    assert refusal(CorruptFileError, cuts, field(8, b"ab") + b"\x42", Encoding.PROTOBUF) == (
        "ids: no id at byte 4 (index out of range)"
    )


def test_what_is_no_string_is_named_with_its_place():
    data = field(8, b"ab") + field(8, b"cde") + field(7, b"f")
    assert refusal(CorruptFileError, cuts, data, Encoding.PROTOBUF) == "ids: no id at byte 9 (tag 58)"


def test_the_last_string_ends_with_the_span():
    data = field(8, b"x" * 2000)
    assert refusal(CorruptFileError, cuts, data[:-1], Encoding.PROTOBUF) == (
        "ids: the last id ends at byte 2,003 instead of 2,002"
    )


def test_the_message_of_strings():
    """It is created once, when the module is imported; here once more."""
    message = encodings._strings_message()
    assert list(message.FromString(field(8, b"a") + field(8, b"\xff")).string_val) == [b"a", b"\xff"]
    assert message.DESCRIPTOR.full_name == "beam_pipeline.Strings"
    assert message.DESCRIPTOR.file.name == "beam_pipeline/strings.proto"


@pytest.mark.parametrize(("encoding", "size"), [(Encoding.INT32, 4), (Encoding.INT64, 8)])
def test_where_integers_of_one_size_are_cut(encoding, size):
    span = Span(3, 3 + 5 * size)
    found = list(encodings.cuts(None, Vocabulary("ids", span, encoding, 1), 2))
    assert found == [(2, 3 + 2 * size), (2, 3 + 4 * size), (1, 3 + 5 * size)]
    assert {type(number) for cut in found for number in cut} == {int}


def test_strings_that_are_no_protobuf():
    message = refusal(CorruptFileError, encodings.decode, Encoding.PROTOBUF, b"\x42\x05ab", 1)
    assert message.startswith("not a list of ids in protobuf (")
    assert message.endswith("); log the model again")


@pytest.mark.parametrize("encoding", [Encoding.PROTOBUF, Encoding.JSON])
def test_no_ids_are_binary_too(encoding):
    assert encodings.decode(encoding, b"", 0).type == pa.binary()


@pytest.mark.parametrize(
    ("text", "kind"), [(b"true", "bool"), (b"null", "NoneType"), (b"1.5", "float"), (b'["a"]', "list"), (b"{}", "dict")]
)
def test_the_type_of_what_is_no_id(text, kind):
    assert refusal(UnsupportedModelError, encodings.decode, Encoding.JSON, text, 1) == (
        f"an id that is neither string nor integer, but of JSON type {kind}; log the model again"
    )


@pytest.mark.parametrize("block", [1, 2, 3, 1000])
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_where_a_json_array_is_cut(block, rows, monkeypatch):
    """Each position is the one after a comma that is not part of a string, whatever lies between two blocks."""
    monkeypatch.setattr(encodings, "_BLOCK", block)
    names = ["a,b", 'c"', "\\", "\\\\,", "", '",', "d\\"]
    elements = [json.dumps(name) for name in names]
    data = ",".join(elements).encode()
    ends = np.cumsum([len(element) + 1 for element in elements])
    ends[-1] -= 1  # No comma follows the last.
    expected = [(rows, int(end)) for end in ends[rows - 1 :: rows]]
    if len(names) % rows:
        expected.append((len(names) % rows, len(data)))
    assert cuts(data, Encoding.JSON, rows) == expected


@pytest.mark.parametrize("block", [1, 3, 4, 1000])
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_where_integers_are_cut(block, rows, monkeypatch):
    monkeypatch.setattr(encodings, "_BLOCK", block)
    numbers = [1, 300, 2, 1 << 62, 7]
    ends = np.cumsum([len(varint(number)) for number in numbers])
    expected = [(rows, int(end)) for end in ends[rows - 1 :: rows]]
    if len(numbers) % rows:
        expected.append((len(numbers) % rows, int(ends[-1])))
    assert cuts(b"".join(map(varint, numbers)), Encoding.VARINTS, rows) == expected


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x05\x80", "a list of integers that ends inside one"),
        (b"\x80" * 10 + b"\x01", "a list of integers with one of more than 64 bits"),
        # As many bytes as two integers may have, most of them in one.
        (b"\x01" + b"\x80" * 10 + b"\x01", "a list of integers with one of more than 64 bits"),
    ],
)
def test_broken_integers(data, message):
    assert refusal(CorruptFileError, encodings.varints, data) == message


def test_a_carriage_return_before_the_end_of_a_line_is_no_part_of_it():
    assert encodings.decode(Encoding.LINES, b"a\r\nb\rc\r\r\nd\r", 3).to_pylist() == [b"a", b"b\rc\r", b"d"]


@pytest.mark.parametrize("encoding", [Encoding.FIXED, Encoding.UTF32])
def test_where_strings_of_one_width_are_cut(encoding):
    """By their number alone: nothing is read."""

    def cut(span, count, rows):
        return list(encodings.cuts(None, Vocabulary("ids", span, encoding, 1, count=count), rows))

    assert cut(Span(7, 47), 5, 2) == [(2, 23), (2, 39), (1, 47)]
    assert cut(Span(7, 47), 5, 5) == [(5, 47)]
    assert cut(Span(0, 11), 2, 1) == [(1, 5), (1, 10)]  # Decoding refuses what is no number of whole strings.
    assert all(type(end) is int for _, end in cut(Span(7, 47), 5, 2))
    assert cut(Span(0, 8), 1, 9) == [(1, 8)]
    assert cut(Span(7, 7), 0, 2) == cut(Span(7, 7), None, 2) == []


def test_where_rows_are_cut():
    assert list(encodings.cuts(None, Vocabulary("ids", Span(3, 8), Encoding.ROWS, 1), 2)) == [(2, 5), (2, 7), (1, 8)]


def test_where_objects_and_tables_are_cut():
    assert cuts(b'"a,b": 1, "c": 2', Encoding.JSON_OBJECT) == [(1, 9), (1, 16)]
    assert cuts(b"a,1\nb,2\n", Encoding.CSV) == [(1, 4), (1, 8)]


def test_strings_of_one_width():
    """NumPy fills them with NULs, which are no part of them at their end."""
    assert encodings.decode(Encoding.FIXED, b"ab\0c\0\0\0d\xff", 3).to_pylist() == [b"ab", b"c", b"\0d\xff"]
    texts = ["éX", "", "a\0b", "\N{GRINNING FACE}"]
    data = b"".join(text.ljust(3, "\0").encode("utf-32-le") for text in texts)
    found = encodings.decode(Encoding.UTF32, data, 4)
    assert found.type == pa.binary()
    assert found.to_pylist() == [text.encode() for text in texts]
    half = b"\x00\xd8\0\0"  # of a surrogate pair, which is reported later with its row
    assert encodings.decode(Encoding.UTF32, half, 1).to_pylist() == [b"\xed\xa0\x80"]
    assert encodings.decode(Encoding.FIXED, b"a", 1).type == pa.binary()


@pytest.mark.parametrize(
    ("encoding", "data", "count", "message"),
    [
        (Encoding.FIXED, b"abc", 2, "3 bytes are not 2 strings of one width"),
        (Encoding.FIXED, b"ab", 3, "2 bytes are not 3 strings of one width"),
        (Encoding.FIXED, b"a" * 1200, 1199, "1,200 bytes are not 1,199 strings of one width"),
        (Encoding.FIXED, b"", 0, "0 bytes are not 0 strings of one width"),
        (Encoding.UTF32, b"abcdef", 1, "6 bytes are not 1 strings of one width"),
        (Encoding.UTF32, b"\0\0\x11\0", 1, "a string that is not UTF-32 (code point not in range(0x110000))"),
    ],
)
def test_what_is_no_string_of_one_width(encoding, data, count, message):
    assert refusal(CorruptFileError, encodings.decode, encoding, data, count) == message


def test_strings_of_one_width_are_verified_by_reading_them():
    data, fitting = b"abcdef", Checksum("crc32", zlib.crc32(b"abcdef"), Span(0, 6))
    ids = Vocabulary("ids", Span(2, 6), Encoding.FIXED, 1, count=2, checksum=fitting)
    encodings.verify(opened(data), ids)
    message = refusal(ChecksumError, encodings.verify, opened(b"abcdeg"), ids)
    assert message == (
        "ids: the ids at byte 2 do not match their crc32; the file was damaged after the training: log the model again"
    )


def with_rows(data, count, encoding=Encoding.JSON_OBJECT, **changes):
    return encodings.decode_with_rows(vocabulary(data, encoding, **changes), data, count)


def pairs(found):
    rows, ids = found
    assert (rows.dtype, ids.type) == (np.int64, pa.binary())
    return list(zip(ids.to_pylist(), rows.tolist(), strict=True))


def test_ids_that_a_json_object_maps_to_rows():
    least, most = -(1 << 63), (1 << 63) - 1
    data = f' "é": 3,\n "": {least}, "\\ud800": {most}, "é": 0, '.encode()
    expected = [("é".encode(), 3), (b"", least), (b"\xed\xa0\x80", most), ("é".encode(), 0)]
    assert pairs(with_rows(data, 4)) == expected
    assert pairs(with_rows(data.strip().removesuffix(b","), 4)) == expected
    assert pairs(with_rows(b"", 0)) == []


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("1.0", "not an integer"),
        ("true", "not an integer"),
        ('"1"', "not an integer"),
        ("null", "not an integer"),
        (str(1 << 63), "beyond 64 bits"),
        (str(-(1 << 63) - 1), "beyond 64 bits"),
    ],
)
def test_what_is_no_row_in_a_json_object(value, problem):
    assert refusal(BadIdError, with_rows, f'"a": 1, "b\\ud800": {value}'.encode(), 2) == (
        f"ids: the row of id 'b\\\\xed\\\\xa0\\\\x80' is {problem}; a JSON object maps each id to the row of its vector"
    )


@pytest.mark.parametrize("data", [b'"a"', b'"a": 1,, "b": 2', b'"a": ' + b"[" * 100_000])
def test_what_is_no_json_object(data):
    assert re.match(r"ids: not a JSON object of id and row \(.+\)$", refusal(CorruptFileError, with_rows, data, 1))


@pytest.mark.parametrize(
    ("columns", "data"),
    [
        (None, b'a,3\n"b,""c",-1\n,0'),
        ((0, 1), b'a,3\n"b,""c",-1\n,0\n'),
        ((2, 1), b'x,3,a\n,-1,"b,""c"\n"1",0,\n'),
    ],
)
def test_ids_that_a_table_maps_to_rows(columns, data):
    assert pairs(with_rows(data, 3, Encoding.CSV, columns=columns)) == [(b"a", 3), (b'b,"c', -1), (b"", 0)]


def test_a_table_of_one_row():
    assert pairs(with_rows(b"a,3", 1, Encoding.CSV)) == pairs(with_rows(b"a,3\n", 1, Encoding.CSV)) == [(b"a", 3)]


def test_an_id_in_a_table_may_be_long():
    """Longer than the megabyte that Arrow reads at a time, and bytes that are not UTF-8."""
    name = b"\xff" * 3_000_000
    assert pairs(with_rows(name + b",7\nb,8\n", 2, Encoding.CSV)) == [(name, 7), (b"b", 8)]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a,1\nb,\nc,\n", "ids: id 'b' has no row"),
        (b"a,1\nb,x\n", "ids: not a table of ids and their rows (CSV conversion error to int64: invalid value 'x')"),
        (b"a,1\n\nb,2\n", "ids: id '' has no row"),
        (
            b"a\nb\n",
            "ids: not a table of ids and their rows (Column 'f1' in include_columns does not exist in CSV file)",
        ),
    ],
)
def test_what_is_no_table_of_ids_and_rows(data, message):
    assert refusal(BadIdError, with_rows, data, 3, Encoding.CSV) == message


@pytest.mark.parametrize(
    ("encoding", "data"), [(Encoding.CSV, b"a,1\n" * 1200), (Encoding.JSON_OBJECT, b'"a":1,' * 1200)]
)
def test_ids_with_rows_that_are_not_as_many_as_were_counted(encoding, data):
    assert refusal(CorruptFileError, with_rows, data, 1199, encoding) == (
        "ids: 1,200 ids where 1,199 were counted: the file changed while it was read, or an id is not on a line of its own"
    )
