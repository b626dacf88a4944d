"""How ids lie in a file: cut at any size, decoded, and refused, encoding by encoding; whole towers are in test_pieces."""

import io
import json
import zlib

import numpy as np
import pyarrow as pa
import pytest
from wire_format import field, varint

from beam_pipeline.errors import ChecksumError, CorruptFileError, UnsupportedModelError
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
