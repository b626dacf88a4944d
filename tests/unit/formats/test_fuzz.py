"""Artifacts that are damaged or mean harm: the right rows, or one of the named errors; in little time and memory."""

import io
import json
import zipfile

import fuzz
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from beam_pipeline.errors import BadIdError, CorruptFileError, PipelineError, UnsupportedModelError
from beam_pipeline.files import ByteFile
from beam_pipeline.formats import encodings, protobuf
from beam_pipeline.formats.keras import archive, reader
from beam_pipeline.formats.model import Checksum, Encoding, Matrix, Tower, Vocabulary, special_names
from beam_pipeline.formats.protobuf import Span
from beam_pipeline.formats.saved_model import checkpoint
from beam_pipeline.reading import pieces, unordered


def test_the_harness_notices_other_rows(models):
    subject = fuzz._subject(models("longer").folder)
    rows = subject.expected[False]
    assert fuzz.verdict(subject, rows, "", False) == "same"
    swapped = {"user": rows["item"], "item": rows["user"]}
    assert fuzz.verdict(subject, swapped, "ids", False) == "other ids or rows"
    with pytest.raises(AssertionError, match="although a checksum covers"):
        fuzz.verdict(subject, swapped, "", False)
    other = fuzz.Rows(rows["user"].ids, rows["user"].vectors + 1, bytes(len(rows["user"].raw)))
    with pytest.raises(AssertionError, match="the vectors of user are none of the model's"):
        fuzz.verdict(subject, {**rows, "user": other}, "ids", False)


def test_the_harness_notices_what_is_no_line():
    assert fuzz._wrong_with(CorruptFileError("x")) is None
    assert "no line" in fuzz._wrong_with(CorruptFileError(""))
    error = CorruptFileError("cannot be parsed (MemoryError)")
    error.__cause__ = MemoryError()
    assert "MemoryError() inside of cannot be parsed" in fuzz._wrong_with(error)


# The parsers on any bytes.


def file_of(data, path="x"):
    return ByteFile(path, io.BytesIO(data), len(data))


tags = st.builds(lambda number, kind: fuzz.varint(number << 3 | kind), st.integers(0, 40), st.integers(0, 7))
numbers = st.sampled_from(fuzz.EXTREMES).map(fuzz.varint)
fields = st.builds(lambda tag, length, content: tag + length + content, tags, numbers, st.binary(max_size=20))
wires = st.binary(max_size=200) | st.lists(fields, max_size=20).map(b"".join)


@given(wires)
def test_any_bytes_as_protobuf(data):
    file, whole = file_of(data), Span(0, len(data))
    for read in (
        lambda: [value for _, value in protobuf.scan(file, whole)],
        lambda: protobuf.integers(file, whole, 1),
        lambda: checkpoint.read_shape(file, whole),
        lambda: protobuf.packed(file, whole),
    ):
        try:
            found = read()
        except CorruptFileError:
            continue
        assert all(one.end <= len(data) for one in found if isinstance(one, Span))


@given(st.binary(max_size=300), st.integers(0, 1 << 64), st.integers(0, 1 << 64))
def test_any_bytes_as_an_index(data, start, size):
    footer = b"".join(map(fuzz.varint, (0, 0, start % (len(data) + 9), size % (len(data) + 9)))).ljust(40, b"\0")
    index = data + footer + checkpoint._MAGIC.to_bytes(8, "little")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint.google_crc32c, "value", lambda _: 0)  # Every checksum that is stored as this is right.
        patch.setattr(checkpoint.checksums, "unmask", lambda _: 0)
        try:
            bundle = checkpoint.read_bundle("b", lambda path: file_of(index, path))
        except PipelineError as error:
            assert "b.index" in str(error)  # noqa: PT017 - most of it is no index
        else:
            assert all(isinstance(entry, checkpoint.Entry) for entry in bundle.entries.values())


json_bytes = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner, max_size=3)
).map(lambda value: json.dumps(value).encode())
any_ids = st.binary(max_size=300) | st.lists(json_bytes | st.binary(max_size=9), max_size=9).map(b",".join) | wires


WITH_ROWS = (Encoding.JSON_OBJECT, Encoding.CSV)
"""Ids that have their rows beside them."""
WITHOUT_BYTES = (Encoding.ROWS, Encoding.PARQUET)
ELSEWHERE = (Encoding.REFERENCES,)
"""Ids whose text is in another part of the file: test_heap.py."""


@settings(max_examples=300)
@given(
    st.sampled_from([one for one in Encoding if one not in (*WITH_ROWS, *WITHOUT_BYTES, *ELSEWHERE)]),
    st.booleans(),
    any_ids,
    st.integers(1, 40),
    st.integers(0, 40),
    st.integers(0, 1 << 40),
)
@example(Encoding.JSON, True, b"[" * 100_000, 1, 0, 0)
@example(Encoding.JSON, True, b"[" * 985 + b"]" * 985, 1, 0, 0)
@example(Encoding.JSON, True, b"9" * 5000, 1, 0, 0)
@example(Encoding.PROTOBUF, True, b"\x42\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01", 1, 0, 0)
@example(Encoding.STRING_TENSOR, False, b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", 1, 0, 1 << 40)
def test_any_bytes_as_ids(encoding, in_row_order, data, piece_rows, padding, count):
    content = bytes(padding) + data
    matrix = Matrix("weights", 0, 1000, 1, "float32", Checksum("crc32c", 0, Span(0, 4000)))
    in_tensor = encoding is Encoding.STRING_TENSOR
    in_row_order = in_row_order or not in_tensor
    vocabulary = Vocabulary(
        "ids",
        Span(padding, len(content)),
        encoding,
        0,
        count if in_tensor else None,
        row_numbers=None if in_row_order else Span(0, 0),
        in_row_order=in_row_order,
        checksum=Checksum("crc32c", 0, Span(padding, len(content))) if in_tensor else None,
    )
    tower = Tower("user", "user_layer", matrix, vocabulary)

    def open_file(path):
        return file_of(content, path)

    try:
        if not in_row_order:
            for entries in unordered.cut_entries(tower, open_file, piece_rows):
                unordered.read_entries(entries, tower, open_file)
            return
        rows = 0
        for piece in pieces.cut(tower, open_file, 4 * piece_rows):
            rows += piece.rows
            found = pieces.read(piece, tower, open_file)
            assert len(found) in (0, piece.rows)
        assert rows == 1000
    except PipelineError as error:
        assert str(error).isprintable()  # noqa: PT017 - most of it is no ids


@given(
    st.sampled_from(
        [one for one in Encoding if one not in (Encoding.STRING_TENSOR, *WITH_ROWS, *WITHOUT_BYTES, *ELSEWHERE)]
    ),
    any_ids,
    st.integers(0, 50),
)
def test_any_bytes_as_the_ids_of_a_piece(encoding, data, count):
    try:
        assert len(encodings.decode(encoding, data, count)) == count
    except (CorruptFileError, UnsupportedModelError, BadIdError) as error:
        assert str(error).isprintable()  # noqa: PT017 - nearly all of it


pairs = st.lists(st.tuples(st.text(max_size=4), st.integers(-9, 1 << 65)), max_size=9)
lines = st.lists(st.text('abc,"\r0123456789', max_size=9), max_size=9).map(lambda found: "\n".join(found).encode())


@settings(max_examples=300)
@given(
    st.sampled_from(WITH_ROWS),
    any_ids | lines | pairs.map(lambda found: json.dumps(dict(found))[1:-1].encode()),
    st.integers(1, 5),
)
@example(Encoding.JSON_OBJECT, b'"a": ' + b"[" * 100_000, 1)
@example(Encoding.JSON_OBJECT, b'"a": ' + b"9" * 5000, 1)
@example(Encoding.JSON_OBJECT, b'"\\ud800": 1', 1)
@example(Encoding.CSV, b"a,1\n\nb,2", 9)
def test_any_bytes_as_ids_with_rows(encoding, data, entries):
    vocabulary = Vocabulary("ids", Span(0, len(data)), encoding, 0, in_row_order=False, columns=(0, 1))
    tower = Tower("user", "user_layer", Matrix("weights", 0, 1000, 1, "float32", None), vocabulary)
    try:
        for some in unordered.cut_entries(tower, lambda path: file_of(data, path), entries):
            rows, ids = unordered.read_entries(some, tower, lambda path: file_of(data, path))
            assert len(rows) == len(ids) == some.count <= entries
            assert all(0 <= row < 1000 for row in rows.tolist())
    except PipelineError as error:
        assert str(error).isprintable()  # noqa: PT017 - most of it is no ids


@settings(max_examples=200)
@given(
    st.dictionaries(
        st.sampled_from(["config.json", "model.weights.h5", "assets/a/vocabulary.txt"]), st.binary(max_size=99)
    ),
    st.none() | json_bytes,
    st.none() | st.binary(max_size=300).map(b"\x89HDF\r\n\x1a\n".__add__),
    st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), max_size=5),
)
def test_any_zip(members, config, weights, changes):
    members |= {"config.json": config} if config is not None else {}
    members |= {"model.weights.h5": weights} if weights is not None else {}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    data = bytearray(buffer.getvalue())
    for at, value in changes:
        data[at % len(data)] = value
    try:
        reader.KerasFile("x.keras", lambda path: file_of(bytes(data), path)).tower("user", "user_layer")
    except PipelineError as error:
        assert str(error).isprintable()  # noqa: PT017 - all of it


@given(
    st.binary(max_size=200),
    st.integers(0, 100),
    st.integers(0, 300),
    st.lists(st.tuples(st.integers(-9, 300), st.integers(0, 2), st.integers(-1, 999))),
)
def test_a_window_shows_its_part_alone_and_gives_up(data, start, end, moves):
    start, end = sorted((min(start, len(data)), min(end, len(data))))
    window = archive.Window(file_of(data), Span(start, end), 1000, "part")
    part, read = io.BytesIO(data[start:end]), 0
    for offset, whence, length in moves:
        if offset + {0: 0, 1: part.tell(), 2: end - start}[whence] < 0:
            with pytest.raises(OSError, match="seek to -"):
                window.seek(offset, whence)
            window.seek(part.tell())
            continue
        assert window.seek(offset, whence) == part.seek(offset, whence)
        expected = part.read(length)
        read += len(expected) + 16
        if read > 1000:
            with pytest.raises(CorruptFileError, match="its part exceeds the limit of 1,000 bytes"):
                window.read(length)
            return
        assert window.read(length) == expected


@given(*[st.none() | st.booleans() | st.integers() | st.text() | st.floats() | st.lists(st.integers(), max_size=2)] * 3)
@example("\ud800", "[UNK]", 1)
@example(None, "x" * 301, 1)
@example(None, 10**5000, 1)
@example(None, "[UNK]", 10**5000)
@example(None, "[UNK]", True)
def test_names_of_special_rows(mask, oov, buckets):
    try:
        names = special_names("x", mask, oov, buckets)
    except CorruptFileError as error:
        assert len(str(error)) < 200  # noqa: PT017 - most settings are no sensible ones
        return
    assert len(names) == (mask is not None) + buckets
    assert all(len(name.encode()) <= 310 for name in names)


# Messages.


@given(st.text(max_size=50))
def test_an_error_is_one_line_whatever_is_in_it(name):
    assert str(CorruptFileError(f"a {name} b")).isprintable()


def test_an_error_says_what_and_how_to_mend_it_in_bounded_length():
    message = str(CorruptFileError(f"file x: {'y' * 1_000_000} is odd; log the model again"))
    assert len(message) < 2100
    assert message.startswith("file x: yyy")
    assert message.endswith("yyy is odd; log the model again")
    assert str(CorruptFileError("\x1b[2Jgone\r\n\u2028now\ud800")) == " [2Jgone   now "
    assert str(CorruptFileError("…é × 日本")) == "…é × 日本"
