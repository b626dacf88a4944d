"""Cuts a vocabulary into pieces without reading it whole, and reads the ids of one piece.

A piece is a description: rows of the matrix and the byte range of their ids. It costs the same to send for ten
ids as for a hundred thousand; ids and vectors are read where the piece lands.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from beam_pipeline.errors import BadIdError, CorruptFileError, NotAModelError
from beam_pipeline.files import ByteFile, OpenFile
from beam_pipeline.formats.artifact import Encoding, Tower
from beam_pipeline.formats.wire import Span, read_varint

PIECE_BYTES = 8 << 20
"""Vectors of a piece, about: small enough for any worker's memory, large enough for a range request to pay."""

_MAX_IDS_BYTES = 1 << 30
_BLOCK = 4 << 20
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
    """

    tower: str
    first_row: int
    rows: int
    ids: Span | None


def cut(tower: Tower, open_file: OpenFile, piece_bytes: int) -> Iterator[Piece]:
    """Yields pieces that cover every row of the matrix exactly once, in row order.

    Raises:
        BadIdError: an id has a row beyond the matrix; named, with its row.
        CorruptFileError: the vocabulary is not where the artifact says, or no vocabulary.
    """
    matrix, vocabulary = tower.matrix, tower.vocabulary
    rows = max(1, piece_bytes // matrix.row_bytes)
    yield from _gap(tower.name, 0, min(vocabulary.first_row, matrix.rows), rows)
    row, start, count = vocabulary.first_row, vocabulary.span.start, 0
    with open_file(vocabulary.path) as file:
        cuts = _line_cuts if vocabulary.encoding is Encoding.LINES else _string_cuts
        for ids, end in cuts(file, vocabulary.span, rows):
            if end - start > _MAX_IDS_BYTES:
                raise CorruptFileError(
                    f"{vocabulary.path}: {ids:,} ids of tower {tower.name!r} take {end - start:,} bytes, more than a "
                    f"worker reads at once ({_MAX_IDS_BYTES:,}): is that a vocabulary?"
                )
            if row + ids > matrix.rows:
                first_beyond = max(0, matrix.rows - row)
                name = decode(vocabulary.encoding, file.read(start, end - start), ids)[first_beyond].as_py()
                raise BadIdError(
                    f"tower {tower.name!r}: id {shown(name)} has row {row + first_beyond:,}, but the matrix has only "
                    f"{matrix.rows:,} rows: vocabulary and weights are of two trainings; log the model again"
                )
            yield Piece(tower.name, row, ids, Span(start, end))
            row, start, count = row + ids, end, count + ids
    if vocabulary.count is not None and count != vocabulary.count:
        raise CorruptFileError(
            f"{vocabulary.path}: tower {tower.name!r} has {count:,} ids, its graph says {vocabulary.count:,}"
        )
    yield from _gap(tower.name, row, matrix.rows, rows)


def read(piece: Piece, tower: Tower, open_file: OpenFile) -> pa.Array:
    """Returns the ids of a piece as an Arrow binary array, one for each row (none for rows without ids).

    Raises:
        CorruptFileError: the bytes are not that many ids.
        NotAModelError: the artifact gives an id another row than its position does.
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
                raise NotAModelError(
                    f"tower {tower.name!r}: id {shown(ids[int(wrong[0])].as_py())} has row {numbers[wrong[0]]:,} "
                    f"instead of {piece.first_row + int(wrong[0]):,}: a lookup whose rows are not in the order of its "
                    "ids is not supported"
                )
    return ids


def decode(encoding: Encoding, data: bytes, count: int) -> pa.Array:
    """Returns `count` ids lying one after the other in `data` as an Arrow binary array.

    Raises:
        CorruptFileError: there are more or fewer.
    """
    ids = _decode_lines(data) if encoding is Encoding.LINES else _decode_strings(data)
    if len(ids) != count:
        raise CorruptFileError(f"{len(ids):,} ids where {count:,} were counted: the file changed while it was read")
    return ids


def _gap(tower: str, start: int, end: int, rows: int) -> Iterator[Piece]:
    """Yields pieces for rows that belong to no id: they count for the checksum alone."""
    for row in range(start, end, rows):
        yield Piece(tower, row, min(rows, end - row), None)


def _line_cuts(file: ByteFile, span: Span, rows: int) -> Iterator[tuple[int, int]]:
    """Yields (number of lines, position after them), `rows` lines at a time; the last line needs no newline."""
    lines, done = 0, span.start
    for offset, block in file.blocks(span.start, span.end, _BLOCK):
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
    return pa.array(list(_Strings.FromString(data).string_val), pa.binary())


def shown(name: bytes) -> str:
    """An id as it can stand in a message."""
    return repr(name.decode("utf-8", "backslashreplace"))
