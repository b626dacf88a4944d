"""Cuts a vocabulary into pieces without reading it whole, and reads the ids of one piece.

A piece is a description: rows of the matrix and the byte range of their ids. It costs the same to send for ten
ids as for a hundred thousand; ids and vectors are read where the piece lands. Where ids are not in row order, they are
cut by their position instead, as entries: each is an id and its row.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from beam_pipeline import checksums
from beam_pipeline.errors import BadIdError, ChecksumError, CorruptFileError, NotAModelError
from beam_pipeline.files import ByteFile, OpenFile
from beam_pipeline.formats import wire
from beam_pipeline.formats.artifact import Checksum, Encoding, Tower, Vocabulary
from beam_pipeline.formats.wire import Span, read_varint

PIECE_BYTES = 8 << 20
"""Vectors of a piece, about: small enough for any worker's memory, large enough for a range request to pay."""

PIECE_ENTRIES = 1 << 19
"""Entries that are read at once: their rows lie anywhere in the matrix, so each part of it gets few of many."""

_MAX_IDS_BYTES = 1 << 28
_BLOCK = 4 << 20
_SMALL = 4 << 20
"""Bytes of a vocabulary that is compared with another as a set."""
_VARINT_BLOCK = 1 << 18  # They take eight times their bytes while they are decoded.
_STRING_TAG = 8 << 3 | 2  # TensorProto.string_val, length-delimited
_LONGEST_HEADER = 11  # a tag and a varint of 64 bits


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of a tower's matrix.

    Attributes:
        tower: name of the tower.
        first_row: first row of the matrix.
        rows: number of rows.
        ids: where the ids of these rows are, one for each; None for rows that belong to no id.
        rest: instead of rows, other bytes of the matrix's file, which count for the checksum alone.
    """

    tower: str
    first_row: int
    rows: int
    ids: Span | None
    rest: Span | None = None


@dataclass(frozen=True)
class Entries:
    """Consecutive entries of a lookup whose ids are not in row order.

    Attributes:
        tower: name of the tower.
        first: position of the first one.
        count: number of entries.
        ids: where their ids are.
        lengths: where the lengths of these ids are, if apart from them.
    """

    tower: str
    first: int
    count: int
    ids: Span
    lengths: Span | None = None


def cut(tower: Tower, open_file: OpenFile, piece_bytes: int) -> Iterator[Piece]:
    """Yields pieces that cover every row of the matrix exactly once, in row order, then the rest of the tower.

    Raises:
        BadIdError: an id has a row beyond the matrix; named, with its row.
        CorruptFileError: the vocabulary is not where the artifact says, or no vocabulary, or damaged.
    """
    matrix, vocabulary = tower.matrix, tower.vocabulary
    rows = matrix.rows_in(piece_bytes)
    yield from _gap(tower.name, 0, min(vocabulary.first_row, matrix.rows), rows)
    row, start, count = vocabulary.first_row, vocabulary.span.start, 0
    with open_file(vocabulary.path) as file:
        for ids, end in _cuts(file, vocabulary, rows):
            _check_size(tower, ids, end - start)
            if row + ids > matrix.rows:
                first_beyond = max(0, matrix.rows - row)
                name = decode(vocabulary.encoding, file.read(start, end - start), ids)[first_beyond].as_py()
                raise BadIdError(
                    f"tower {tower.name!r}: id {shown(name)} has row {row + first_beyond:,}, but the matrix has only "
                    f"{matrix.rows:,} rows: vocabulary and weights are of two trainings; log the model again"
                )
            yield Piece(tower.name, row, ids, Span(start, end))
            row, start, count = row + ids, end, count + ids
    _check_count(tower, count)
    yield from _gap(tower.name, row, matrix.rows, rows)
    for rest in tower.rest:
        for at in range(rest.start, rest.end, piece_bytes):
            yield Piece(tower.name, matrix.rows, 0, None, Span(at, min(at + piece_bytes, rest.end)))


def cut_entries(tower: Tower, open_file: OpenFile, entries: int) -> Iterator[Entries]:
    """Yields pieces of a vocabulary that is not in row order, every entry once, `entries` at a time.

    Raises:
        ChecksumError: the ids do not match the artifact's checksum.
        CorruptFileError: the vocabulary is not where the artifact says.
    """
    vocabulary = tower.vocabulary
    with open_file(vocabulary.path) as file:
        if vocabulary.encoding is Encoding.STRING_TENSOR:
            yield from _string_tensor_cuts(file, tower, entries)
            return
        start, count = vocabulary.span.start, 0
        for ids, end in _cuts(file, vocabulary, entries):
            _check_size(tower, ids, end - start)
            yield Entries(tower.name, count, ids, Span(start, end))
            start, count = end, count + ids
        _check_count(tower, count)
        _check_sum(file, tower, 0, vocabulary.span.start)


def read_entries(entries: Entries, tower: Tower, open_file: OpenFile) -> tuple[np.ndarray, pa.Array]:
    """Returns (rows, ids) of entries: int64 [n], and an Arrow binary array of the same length.

    Raises:
        BadIdError: an id has a row that the matrix does not have; named, with its row.
        CorruptFileError: the bytes are not that many ids.
    """
    vocabulary = tower.vocabulary
    if vocabulary.row_numbers is None:
        raise ValueError("entries without rows")
    with open_file(vocabulary.path) as file:
        data = file.read(entries.ids.start, entries.ids.end - entries.ids.start)
        if entries.lengths is None:
            ids = decode(vocabulary.encoding, data, entries.count)
        else:
            lengths = _varints(file.read(entries.lengths.start, entries.lengths.end - entries.lengths.start))
            if len(lengths) != entries.count or int(lengths.sum()) != len(data):
                raise CorruptFileError(f"{vocabulary.path}: its ids changed while they were read")
            offsets = np.zeros(entries.count + 1, np.int32)
            np.cumsum(lengths, out=offsets[1:], dtype=np.int32)
            ids = pa.Array.from_buffers(pa.binary(), entries.count, [None, pa.py_buffer(offsets), pa.py_buffer(data)])
    with open_file(vocabulary.row_numbers_path or vocabulary.path) as file:
        rows = np.frombuffer(file.read(vocabulary.row_numbers.start + 8 * entries.first, 8 * entries.count), "<i8")
    outside = np.flatnonzero((rows < 0) | (rows >= tower.matrix.rows))
    if outside.size:
        at = int(outside[0])
        raise BadIdError(
            f"tower {tower.name!r}: id {shown(ids[at].as_py())} has row {rows[at]:,}, but the matrix has only "
            f"rows 0 to {tower.matrix.rows - 1:,}: vocabulary and weights do not belong together; log the model again"
        )
    return rows, ids


def read(piece: Piece, tower: Tower, open_file: OpenFile) -> pa.Array:
    """Returns the ids of a piece as an Arrow binary array, one for each row (none for rows without ids).

    Raises:
        CorruptFileError: the bytes are not that many ids, or the artifact gives an id another row than its position
            does.
    """
    vocabulary = tower.vocabulary
    if piece.ids is None:
        names = vocabulary.special_tokens[piece.first_row : piece.first_row + piece.rows]
        return pa.array([name.encode() for name in names], pa.binary())
    with open_file(vocabulary.path) as file:
        ids = decode(vocabulary.encoding, file.read(piece.ids.start, piece.ids.end - piece.ids.start), piece.rows)
        if vocabulary.row_numbers is not None:
            at = vocabulary.row_numbers.start + 8 * (piece.first_row - vocabulary.first_row)
            numbers = np.frombuffer(file.read(at, 8 * piece.rows), "<i8")
            wrong = np.flatnonzero(numbers != np.arange(piece.first_row, piece.first_row + piece.rows))
            if wrong.size:
                raise CorruptFileError(
                    f"tower {tower.name!r}: id {shown(ids[int(wrong[0])].as_py())} has row {numbers[wrong[0]]:,} "
                    f"instead of {piece.first_row + int(wrong[0]):,}: {vocabulary.path} changed since the job started"
                )
    return ids


def are_same(one: Tower, other: Tower, open_file: OpenFile) -> bool:
    """Whether two towers have the same ids; of large vocabularies, the same ids in the same order."""
    first, second = one.vocabulary, other.vocabulary
    if (first.path, first.span) == (second.path, second.span):
        return True
    sizes = [vocabulary.span.end - vocabulary.span.start for vocabulary in (first, second)]
    if max(sizes) <= _SMALL and first.in_row_order and second.in_row_order:
        names = [
            {name for piece in cut(tower, open_file, PIECE_BYTES) for name in read(piece, tower, open_file).to_pylist()}
            for tower in (one, other)
        ]
        return names[0] == names[1]
    if sizes[0] != sizes[1] or first.encoding != second.encoding:
        return False
    with open_file(first.path) as ours, open_file(second.path) as theirs:
        blocks = zip(ours.blocks(*first.span, _BLOCK), theirs.blocks(*second.span, _BLOCK), strict=True)
        return all(a == b for (_, a), (_, b) in blocks)


def decode(encoding: Encoding, data: bytes, count: int) -> pa.Array:
    """Returns `count` ids lying one after the other in `data` as an Arrow binary array.

    Raises:
        CorruptFileError: there are more or fewer.
        BadIdError: a line that should be an integer is none.
    """
    ids = _DECODERS[encoding](data)
    if len(ids) != count:
        raise CorruptFileError(f"{len(ids):,} ids where {count:,} were counted: the file changed while it was read")
    return ids


def _check_size(tower: Tower, ids: int, size: int) -> None:
    if size > _MAX_IDS_BYTES:
        raise CorruptFileError(
            f"{tower.vocabulary.path}: {ids:,} ids of tower {tower.name!r} take {size:,} bytes, more than a "
            f"worker reads at once ({_MAX_IDS_BYTES:,}): is that a vocabulary?"
        )


def _check_count(tower: Tower, count: int) -> None:
    vocabulary = tower.vocabulary
    if vocabulary.count is not None and count != vocabulary.count:
        raise CorruptFileError(
            f"{vocabulary.path}: tower {tower.name!r} has {count:,} ids, its graph says {vocabulary.count:,}"
        )


def _check_sum(file: ByteFile, tower: Tower, crc: int, start: int) -> None:
    """Compares the ids with their checksum, of which `crc` covers what belongs before `start`."""
    if tower.vocabulary.checksum is None:
        return
    for _, block in file.blocks(start, tower.vocabulary.span.end, _BLOCK):
        crc = google_crc32c.extend(crc, block)
    if crc != tower.vocabulary.checksum.value:
        raise ChecksumError(
            f"{file.path}: the ids of tower {tower.name!r} do not match the checkpoint's crc32c; "
            "the file was damaged after the training: log the model again"
        )


def _gap(tower: str, start: int, end: int, rows: int) -> Iterator[Piece]:
    """Yields pieces for rows that belong to no id: they count for the checksum alone."""
    for row in range(start, end, rows):
        yield Piece(tower, row, min(rows, end - row), None)


def first(file: ByteFile, vocabulary: Vocabulary, count: int) -> tuple[list[str], int]:
    """Returns the first `count` ids, or all if there are fewer, and the position after them."""
    found, end = next(_cuts(file, vocabulary, count), (0, vocabulary.span.start))
    head = wire.read(file, Span(vocabulary.span.start, end))
    return [
        name.decode("utf-8", "backslashreplace") for name in decode(vocabulary.encoding, head, found).to_pylist()
    ], end


def _cuts(file: ByteFile, vocabulary: Vocabulary, rows: int) -> Iterator[tuple[int, int]]:
    """Yields (number of ids, position after them), `rows` at a time."""
    if vocabulary.encoding in _PLAIN_CUTS:
        return _PLAIN_CUTS[vocabulary.encoding](file, vocabulary.span, rows)
    cuts = _json_cuts if vocabulary.encoding is Encoding.JSON else _line_cuts
    return cuts(file, vocabulary.span, rows, vocabulary.checksum)


def _blocks(file: ByteFile, span: Span, checksum: Checksum | None) -> Iterator[tuple[int, bytes]]:
    """Yields (offset, bytes) of a span, and raises after its last block if the checksum of all does not match."""
    crc = []
    if checksum:
        for _, block in file.blocks(checksum.span.start, span.start, _BLOCK):
            crc.append((checksums.value(checksum.algorithm, block), len(block)))
    for offset, block in file.blocks(span.start, span.end, _BLOCK):
        if checksum:
            crc.append((checksums.value(checksum.algorithm, block), len(block)))
        yield offset, block
    if checksum and checksums.combine(checksum.algorithm, crc) != checksum.value:
        raise ChecksumError(
            f"{file.path}: the ids at byte {span.start:,} do not match their {checksum.algorithm}; the file was "
            "damaged after the training: log the model again"
        )


def _line_cuts(file: ByteFile, span: Span, rows: int, checksum: Checksum | None = None) -> Iterator[tuple[int, int]]:
    """Yields (number of lines, position after them), `rows` lines at a time; the last line needs no newline."""
    lines, done = 0, span.start
    for offset, block in _blocks(file, span, checksum):
        ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + offset + 1
        for end in ends[rows - lines - 1 :: rows]:
            yield rows, int(end)
            done = int(end)
        lines = (lines + len(ends)) % rows
    if lines or done < span.end:
        # Lines after the last cut, the last of them perhaps without its newline.
        unfinished = span.end > span.start and file.read(span.end - 1, 1) != b"\n"
        yield lines + unfinished, span.end


def _string_cuts(file: ByteFile, span: Span, rows: int) -> Iterator[tuple[int, int]]:
    """Yields (number of strings, position after them) of repeated `string_val` entries, `rows` at a time."""
    count, at = 0, span.start
    while at < span.end:
        data = file.read(at, min(_BLOCK, span.end - at))
        # Only the header of an entry has to lie in the block, not the id itself.
        last = len(data) - (_LONGEST_HEADER if at + len(data) < span.end else 0)
        pos = 0
        while pos < last:
            try:
                if data[pos] != _STRING_TAG:
                    raise ValueError(f"tag {data[pos]}")
                length = data[pos + 1]
                if length < 0x80:
                    pos += 2 + length
                else:
                    length, pos = read_varint(data, pos + 1)
                    pos += length
            except (IndexError, ValueError) as error:
                raise CorruptFileError(f"{file.path}: no id at byte {at + pos:,} ({error})") from error
            count += 1
            if count == rows:
                yield count, at + pos
                count = 0
        at += pos
    if at != span.end:
        raise CorruptFileError(f"{file.path}: the last id ends at byte {at:,} instead of {span.end:,}")
    if count:
        yield count, at


class JsonScanner:
    """Finds what lies outside of strings in JSON text that comes in blocks."""

    def __init__(self) -> None:
        self._inside = 0  # 1 in the middle of a string
        self._escaped = False  # whether the next character follows a backslash

    def outside(self, block: bytes, characters: bytes) -> np.ndarray:
        """Returns the positions in the block of these characters, in order, where they are not part of a string."""
        data = np.frombuffer(block, np.uint8)
        quotes = np.flatnonzero(data == ord('"'))
        slashes = np.flatnonzero(data == ord("\\"))
        if self._escaped:
            slashes = np.concatenate(([-1], slashes))
        self._escaped = False
        if slashes.size:
            # In a run of backslashes each second one is itself escaped: what follows an odd run is escaped.
            breaks = np.diff(slashes) != 1
            first, last = slashes[np.r_[True, breaks]], slashes[np.r_[breaks, True]]
            escaped = last[(last - first) % 2 == 0] + 1
            self._escaped = bool(escaped.size) and int(escaped[-1]) == len(block)
            quotes = np.setdiff1d(quotes, escaped, assume_unique=True)
        found: np.ndarray = np.flatnonzero(np.isin(data, np.frombuffer(characters, np.uint8)))
        outside: np.ndarray = (np.searchsorted(quotes, found) + self._inside) % 2 == 0
        self._inside = (self._inside + len(quotes)) % 2
        return np.compress(outside, found)


def _json_cuts(file: ByteFile, span: Span, rows: int, checksum: Checksum | None = None) -> Iterator[tuple[int, int]]:
    """Yields (number of elements, position after their last comma) of an array's content, `rows` at a time."""
    count, done, scanner = 0, span.start, JsonScanner()
    for offset, block in _blocks(file, span, checksum):
        ends = scanner.outside(block, b",") + offset + 1
        for end in ends[rows - count - 1 :: rows]:
            yield rows, int(end)
            done = int(end)
        count = (count + len(ends)) % rows
    if done < span.end:
        yield count + 1, span.end  # No comma follows the last element.


def _decode_json(data: bytes) -> pa.Array:
    try:
        elements = json.loads(b"[" + data.strip().removesuffix(b",") + b"]")
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"no list of ids in JSON ({error}); log the model again") from error
    wrong = next((element for element in elements if type(element) not in (str, int)), None)
    if wrong is not None or None in elements:
        kind = type(wrong).__name__  # Not the thing itself: its repr may recurse too deeply.
        raise NotAModelError(f"an id that is neither string nor integer, but of JSON type {kind}; log the model again")
    # Half a surrogate pair becomes bytes that are not UTF-8, which is told later, with its row.
    return pa.array([str(element).encode("utf-8", "surrogatepass") for element in elements], pa.binary())


def _varint_cuts(file: ByteFile, span: Span, rows: int) -> Iterator[tuple[int, int]]:
    """Yields (number of varints, position after them), `rows` at a time."""
    count, done = 0, span.start
    for offset, block in file.blocks(span.start, span.end, _BLOCK):
        ends = np.flatnonzero(np.frombuffer(block, np.uint8) < 0x80) + offset + 1
        for end in ends[rows - count - 1 :: rows]:
            yield rows, int(end)
            done = int(end)
        count = (count + len(ends)) % rows
    if done < span.end:
        yield count, span.end


def _int64_cuts(file: ByteFile, span: Span, rows: int) -> Iterator[tuple[int, int]]:
    for start in range(span.start, span.end, 8 * rows):
        end = min(start + 8 * rows, span.end)
        yield (end - start) // 8, end


def _string_tensor_cuts(file: ByteFile, tower: Tower, entries: int) -> Iterator[Entries]:
    """Yields pieces of a string tensor, once its checksums are compared.

    The layout, and what the checksums cover, is that of WriteStringTensor in
    tensorflow/core/util/tensor_bundle/tensor_bundle.cc: lengths count as little-endian uint32.
    """
    vocabulary = tower.vocabulary
    cuts, at, crc = list[tuple[int, Span, int]](), vocabulary.span.start, 0
    left = vocabulary.count or 0
    while left:
        start, count, size = at, 0, 0
        while count < min(entries, left):
            block = file.read(at, min(_VARINT_BLOCK, vocabulary.span.end - at))
            ends = np.flatnonzero(np.frombuffer(block, np.uint8) < 0x80)[: min(entries, left) - count]
            if not ends.size:
                raise CorruptFileError(f"{file.path}: no length of an id at byte {at:,}")
            lengths = _varints(block[: int(ends[-1]) + 1])
            if (lengths > _MAX_IDS_BYTES).any():
                raise CorruptFileError(f"{file.path}: tower {tower.name!r} has an id of {lengths.max():,} bytes")
            crc = google_crc32c.extend(crc, lengths.astype("<u4").tobytes())
            at, count, size = at + int(ends[-1]) + 1, count + len(ends), size + int(lengths.sum())
        _check_size(tower, count, size)
        cuts.append((count, Span(start, at), size))
        left -= count
    stored = file.read(at, 4)
    total = sum(size for _, _, size in cuts)
    if checksums.unmask(int.from_bytes(stored, "little")) != crc or at + 4 + total != vocabulary.span.end:
        raise ChecksumError(
            f"{file.path}: the lengths of the ids of tower {tower.name!r} do not match their crc32c; "
            "the file was damaged after the training: log the model again"
        )
    at += 4
    _check_sum(file, tower, google_crc32c.extend(crc, stored), at)
    first = 0
    for count, lengths_span, size in cuts:
        yield Entries(tower.name, first, count, Span(at, at + size), lengths_span)
        first, at = first + count, at + size


def _varints(data: bytes) -> np.ndarray:
    """Returns the varints lying one after the other in `data`, as uint64."""
    raw = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(raw < 0x80)
    if not ends.size or ends[-1] != len(raw) - 1:
        raise CorruptFileError("a list of integers that ends inside one")
    if len(raw) > 10 * len(ends):
        raise CorruptFileError("a list of integers with one of more than 64 bits")
    starts = np.concatenate([[0], ends[:-1] + 1])
    shifts = 7 * (np.arange(len(raw)) - np.repeat(starts, ends - starts + 1))
    if shifts.max() > 63:
        raise CorruptFileError("a list of integers with one of more than 64 bits")
    values: np.ndarray = np.bitwise_or.reduceat((raw & 0x7F).astype(np.uint64) << shifts.astype(np.uint64), starts)
    return values


def _decode_integers(numbers: np.ndarray) -> pa.Array:
    return pa.array(numbers).cast(pa.string()).cast(pa.binary())


def _decode_integer_lines(data: bytes) -> pa.Array:
    # TensorFlow takes spaces around a number, and zeros before it, for no part of it.
    lines = pc.ascii_trim_whitespace(_decode_lines(data).cast(pa.string(), safe=False))
    try:
        return lines.cast(pa.int64()).cast(pa.string()).cast(pa.binary())
    except pa.ArrowInvalid as error:
        raise BadIdError(f"a vocabulary of integers has a line that is none ({error}); train with integers") from error


def _decode_lines(data: bytes) -> pa.Array:
    if data and not data.endswith(b"\n"):
        data += b"\n"
    # TensorFlow takes one carriage return before a line's end for a part of it.
    data = data.replace(b"\r\n", b"\n")
    ends = np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n"))
    # Without the newlines, line i ends i bytes earlier than in the file.
    offsets = np.zeros(len(ends) + 1, np.int32)
    offsets[1:] = ends - np.arange(len(ends))
    text = data.replace(b"\n", b"")
    return pa.Array.from_buffers(pa.binary(), len(ends), [None, pa.py_buffer(offsets), pa.py_buffer(text)])


def _strings_message() -> Any:
    """Makes a message with TensorProto's `string_val` alone, so that protobuf's C parser splits the strings."""
    file = descriptor_pb2.FileDescriptorProto(name="beam_pipeline/strings.proto", package="beam_pipeline")
    message = file.message_type.add(name="Strings")
    message.field.add(
        name="string_val",
        number=8,
        type=descriptor_pb2.FieldDescriptorProto.TYPE_BYTES,
        label=descriptor_pb2.FieldDescriptorProto.LABEL_REPEATED,
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("beam_pipeline.Strings"))


_Strings = _strings_message()


def _decode_strings(data: bytes) -> pa.Array:
    try:
        return pa.array(list(_Strings.FromString(data).string_val), pa.binary())
    except DecodeError as error:
        raise CorruptFileError(f"no list of ids in protobuf ({error}); log the model again") from error


_PLAIN_CUTS: dict[Encoding, Callable[[ByteFile, Span, int], Iterator[tuple[int, int]]]] = {
    Encoding.PROTOBUF: _string_cuts,
    Encoding.INT64: _int64_cuts,
    Encoding.VARINTS: _varint_cuts,
}
_DECODERS: dict[Encoding, Callable[[bytes], pa.Array]] = {
    Encoding.LINES: _decode_lines,
    Encoding.INTEGER_LINES: _decode_integer_lines,
    Encoding.JSON: _decode_json,
    Encoding.PROTOBUF: _decode_strings,
    Encoding.INT64: lambda data: _decode_integers(np.frombuffer(data[: len(data) // 8 * 8], "<i8")),
    Encoding.VARINTS: lambda data: _decode_integers(_varints(data).view("<i8")),
}


def shown(name: bytes) -> str:
    """An id as it can stand in a message."""
    return repr(name.decode("utf-8", "backslashreplace"))
