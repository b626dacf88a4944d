"""Cutting vocabularies: any ids, any size of pieces, every row once."""

import dataclasses
import io
import json
import zlib

import google_crc32c
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_format import field, varint

from beam_pipeline.errors import BadIdError, ChecksumError, CorruptFileError, UnsupportedModelError
from beam_pipeline.files import ByteFile
from beam_pipeline.formats import encodings
from beam_pipeline.formats.model import Checksum, Encoding, Matrix, Tower, Vocabulary
from beam_pipeline.formats.protobuf import Span
from beam_pipeline.reading import pieces
from beam_pipeline.reading import unordered as entries_module


def make(encoding, names, *, rows=None, first_row=1, count=None, last_newline=True, padding=b"\0\1\2", numbers=None):
    """Returns (tower, open_file) of a vocabulary in memory, its ids between two paddings."""
    if encoding is Encoding.LINES:
        data = b"".join(name + b"\n" for name in names)
        data = data if last_newline else data[:-1]
    elif encoding is Encoding.JSON:
        data = json.dumps([name.decode() for name in names])[1:-1].encode()
    else:
        data = b"".join(field(8, name) for name in names)
    span = Span(len(padding), len(padding) + len(data))
    rest = np.asarray(numbers if numbers is not None else [], "<i8").tobytes()
    content = padding + data + padding + rest
    row_numbers = Span(len(content) - len(rest), len(content)) if numbers is not None else None
    rows = len(names) + first_row if rows is None else rows
    tower = Tower(
        "user",
        "user_layer",
        Matrix("weights", 0, rows, 1, "float32", 0),
        Vocabulary("ids", span, encoding, first_row, count, row_numbers),
    )
    return tower, lambda path: ByteFile(path, io.BytesIO(content), len(content))


def read_all(tower, open_file, piece_rows):
    found, row = [], 0
    for piece in pieces.cut(tower, open_file, piece_rows * 4):
        assert piece.first_row == row
        assert 0 < piece.rows <= piece_rows
        row += piece.rows
        found += pieces.read(piece, tower, open_file).to_pylist()
    assert row == tower.matrix.rows
    return found


@given(
    st.sampled_from([Encoding.LINES, Encoding.PROTOBUF]),
    st.lists(st.binary(max_size=300).filter(lambda name: b"\n" not in name and b"\r" not in name), max_size=60),
    st.integers(1, 70),
    st.integers(0, 5),
    st.integers(0, 20),
    st.sampled_from([16, 64, 4096]),
)
@settings(max_examples=300)
def test_every_id_once_in_order(encoding, names, piece_rows, first_row, spare, block):
    tower, open_file = make(encoding, names, first_row=first_row, rows=len(names) + first_row + spare)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encodings, "_BLOCK", block)
        assert read_all(tower, open_file, piece_rows) == names


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"])) | st.text('"\\,[]{}')),
    st.integers(1, 20),
    st.sampled_from([2, 5, 16, 4096]),
    st.booleans(),
)
@settings(max_examples=300)
def test_every_id_of_a_json_array(names, piece_rows, block, ascii_only):
    data = json.dumps(names, ensure_ascii=ascii_only)[1:-1].encode()
    vocabulary = Vocabulary("ids", Span(0, len(data)), Encoding.JSON, 1)
    tower = dataclasses.replace(make(Encoding.LINES, [b""] * len(names))[0], vocabulary=vocabulary)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encodings, "_BLOCK", block)
        found = read_all(tower, lambda path: ByteFile(path, io.BytesIO(data), len(data)), piece_rows)
    assert found == [name.encode() for name in names]


def test_integers_and_what_is_no_id_in_a_json_array():
    assert encodings.decode(Encoding.JSON, b"5, -7", 2).to_pylist() == [b"5", b"-7"]
    assert encodings.decode(Encoding.JSON, b'"\\ud800"', 1).to_pylist() == [b"\xed\xa0\x80"]
    for element in (b"true", b"null", b"1.5", b'{"class_name": "__bytes__"}'):
        with pytest.raises(UnsupportedModelError, match="an id that is neither string nor integer"):
            encodings.decode(Encoding.JSON, element, 1)
    for text in (b'"a" "b"', b'"a', b"]["):
        with pytest.raises(CorruptFileError, match="not a list of ids in JSON"):
            encodings.decode(Encoding.JSON, text, 1)


@pytest.mark.parametrize("at", [0, 7, 8])
def test_ids_that_do_not_match_their_checksum(at):
    content = bytearray(b"[UNK]\na\nb\n")
    checksum = Checksum("crc32", zlib.crc32(content), Span(0, len(content)))
    vocabulary = Vocabulary("ids", Span(6, len(content)), Encoding.LINES, 1, checksum=checksum)
    tower = dataclasses.replace(make(Encoding.LINES, [b"a", b"b"])[0], vocabulary=vocabulary)

    def open_file(path):
        return ByteFile(path, io.BytesIO(content), len(content))

    assert read_all(tower, open_file, 1) == [b"a", b"b"]
    content[at] ^= 1
    with pytest.raises(ChecksumError, match="do not match their crc32; the file was damaged"):
        list(pieces.cut(tower, open_file, 4))


@pytest.mark.parametrize("encoding", [Encoding.LINES, Encoding.PROTOBUF, Encoding.JSON])
@pytest.mark.parametrize("count", [0, 1, 6, 7, 8, 13, 14, 15])
def test_edges_of_a_piece(encoding, count):
    names = [b"id%d" % i for i in range(count)]
    assert read_all(*make(encoding, names), 7) == names


@pytest.mark.parametrize("count", [1, 6, 7, 8])
def test_the_last_line_needs_no_newline(count):
    names = [b"id%d" % i for i in range(count)]
    assert read_all(*make(Encoding.LINES, names, last_newline=False), 7) == names


@pytest.mark.parametrize("encoding", [Encoding.LINES, Encoding.PROTOBUF, Encoding.JSON])
def test_an_id_beyond_the_matrix_is_named(encoding):
    names = [b"id%d" % i for i in range(20)]
    tower, open_file = make(encoding, names, rows=18)
    with pytest.raises(BadIdError, match=r"id 'id17' has row 18, but the matrix has only 18 rows"):
        read_all(tower, open_file, 5)


def test_a_count_that_is_not_kept():
    tower, open_file = make(Encoding.PROTOBUF, [b"a", b"b"], count=3, rows=9)
    with pytest.raises(CorruptFileError, match="has 2 ids, its graph says 3"):
        read_all(tower, open_file, 5)


def test_bytes_that_are_no_ids():
    tower, open_file = make(Encoding.PROTOBUF, [b"a", b"b"], rows=9)
    shifted = Tower(
        tower.name,
        tower.layer,
        tower.matrix,
        Vocabulary("ids", Span(tower.vocabulary.span.start + 1, tower.vocabulary.span.end), Encoding.PROTOBUF, 1),
    )
    with pytest.raises(CorruptFileError, match="no id at byte 4"):
        read_all(shifted, open_file, 5)


def test_a_file_that_is_no_vocabulary(monkeypatch):
    monkeypatch.setattr(pieces, "MAX_IDS_BYTES", 1000)
    with pytest.raises(CorruptFileError, match="1 ids of tower 'user' take 2,001 bytes"):
        read_all(*make(Encoding.LINES, [b"x" * 2000]), 5)


@pytest.mark.parametrize("long", [127, 128, 16383, 16384, 70000])
def test_long_ids(long):
    names = [b"a", b"x" * long, b"b"]
    assert read_all(*make(Encoding.PROTOBUF, names), 2) == names


def test_row_numbers_are_compared():
    names = [b"a", b"b", b"c"]
    assert read_all(*make(Encoding.PROTOBUF, names, numbers=[1, 2, 3]), 2) == names
    with pytest.raises(CorruptFileError, match=r"id 'b' has row 3 instead of 2"):
        read_all(*make(Encoding.PROTOBUF, names, numbers=[1, 3, 2]), 2)


# Vocabularies that are not in row order, integers, and string tensors of a checkpoint.


def string_tensor(names):
    """What WriteStringTensor in TensorFlow's tensor_bundle.cc writes, and its checksum."""
    sizes = b"".join(len(name).to_bytes(4, "little") for name in names)
    lengths_crc = masked(google_crc32c.value(sizes))
    checksum = google_crc32c.value(sizes + lengths_crc + b"".join(names))
    return b"".join(varint(len(name)) for name in names) + lengths_crc + b"".join(names), checksum


def masked(crc):
    return (((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF).to_bytes(4, "little")


def unordered(encoding, names, rows, matrix_rows, padding=b"\5\6\7"):
    """Returns (tower, the file's bytes, open_file) of a lookup whose ids have these rows."""
    if encoding is Encoding.STRING_TENSOR:
        data, crc = string_tensor(names)
    elif encoding is Encoding.INT64:
        data = np.array([int(name) for name in names], "<i8").tobytes()
        crc = google_crc32c.value(data)
    else:
        data, crc = b"".join(field(8, name) for name in names), None
    span = Span(len(padding), len(padding) + len(data))
    content = bytearray(padding + data + padding + np.array(rows, "<i8").tobytes())
    checksum = Checksum("crc32c", crc, span) if crc is not None else None
    numbers = Span(span.end + len(padding), len(content))
    vocabulary = Vocabulary(
        "ids", span, encoding, min(rows, default=0), len(names), numbers, checksum=checksum, in_row_order=False
    )
    tower = dataclasses.replace(make(Encoding.LINES, [], rows=matrix_rows)[0], vocabulary=vocabulary)
    return tower, content, lambda path: ByteFile(path, io.BytesIO(content), len(content))


def read_entries(tower, open_file, entries):
    found, first = [], 0
    for piece in entries_module.cut_entries(tower, open_file, entries):
        assert piece.first == first
        assert 0 < piece.count <= entries
        first += piece.count
        rows, names = entries_module.read_entries(piece, tower, open_file)
        found += zip(names.to_pylist(), rows.tolist(), strict=True)
    return found


NAMES = st.lists(st.binary(max_size=300), max_size=60)
NUMBERS = st.lists(st.integers(-(1 << 63), (1 << 63) - 1).map(lambda number: str(number).encode()), max_size=60)


@given(
    st.sampled_from([Encoding.STRING_TENSOR, Encoding.INT64, Encoding.PROTOBUF]).flatmap(
        lambda encoding: st.tuples(st.just(encoding), NUMBERS if encoding is Encoding.INT64 else NAMES)
    ),
    st.randoms(use_true_random=False),
    st.integers(1, 70),
    st.sampled_from([16, 64, 4096]),
)
@settings(max_examples=300)
def test_every_entry_once_with_its_row(encoding_and_names, random, entries, block):
    encoding, names = encoding_and_names
    rows = [random.randrange(100) for _ in names]
    tower, _, open_file = unordered(encoding, names, rows, 100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encodings, "_BLOCK", block)
        patch.setattr(pieces, "_VARINT_BLOCK", block)
        assert read_entries(tower, open_file, entries) == list(zip(names, rows, strict=True))


@given(st.lists(st.binary(max_size=200), min_size=1, max_size=30), st.data())
def test_a_damaged_string_tensor_is_refused(names, data):
    tower, content, open_file = unordered(Encoding.STRING_TENSOR, names, [*range(len(names))], 100)
    span = tower.vocabulary.span
    content[data.draw(st.integers(span.start, span.end - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises((ChecksumError, CorruptFileError)):
        list(entries_module.cut_entries(tower, open_file, 7))


def test_damaged_integers_are_refused():
    tower, content, open_file = unordered(Encoding.INT64, [b"5", b"6"], [1, 0], 9)
    content[tower.vocabulary.span.start] ^= 1
    with pytest.raises(ChecksumError, match="the ids of tower 'user' do not match the checkpoint's crc32c"):
        read_entries(tower, open_file, 7)


@pytest.mark.parametrize("row", [-1, 9, 1 << 40])
def test_an_entry_outside_of_the_matrix_is_named(row):
    tower, _, open_file = unordered(Encoding.STRING_TENSOR, [b"a", b"b"], [3, row], 9)
    with pytest.raises(BadIdError, match=f"id 'b' has row {row:,}, but the matrix has only rows 0 to 8"):
        read_entries(tower, open_file, 7)


@given(st.lists(st.integers(-(1 << 63), (1 << 63) - 1), max_size=40), st.integers(1, 50))
def test_every_integer_of_a_packed_field(numbers, piece_rows):
    data = b"".join(varint(number % (1 << 64)) for number in numbers)
    vocabulary = Vocabulary("ids", Span(0, len(data)), Encoding.VARINTS, 1, len(numbers))
    tower = dataclasses.replace(make(Encoding.LINES, [b""] * len(numbers))[0], vocabulary=vocabulary)
    found = read_all(tower, lambda path: ByteFile(path, io.BytesIO(data), len(data)), piece_rows)
    assert found == [str(number).encode() for number in numbers]


def test_integers_of_a_file_are_written_as_such():
    lines = b"5\n-7\r\n007\n 9223372036854775807 \n"
    assert encodings.decode(Encoding.INTEGER_LINES, lines, 4).to_pylist() == [b"5", b"-7", b"7", b"9223372036854775807"]
    for line in (b"five\n", b"\n", b"5.0\n", b"9223372036854775808\n", b"\xff\n"):
        with pytest.raises(BadIdError, match="a vocabulary of integers has a non-integer line"):
            encodings.decode(Encoding.INTEGER_LINES, line, 1)


@pytest.mark.parametrize("data", [b"\x80", b"\x05\x80", b"\x80" * 10 + b"\x01"])
def test_broken_integers(data):
    with pytest.raises(CorruptFileError, match="a list of integers"):
        encodings.decode(Encoding.VARINTS, data, 1)
