"""Cuts a vocabulary into pieces without reading it whole, and reads the ids of one piece.

A piece is a description: rows of the matrix and the byte range of their ids. It costs the same to send for ten
ids as for a hundred thousand; ids and vectors are read where the piece lands. Only the ids of a vocabulary that is not
in row order, which had to be sorted, travel in the piece itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import google_crc32c
import numpy as np
import pyarrow as pa

from beam_pipeline import checksums
from beam_pipeline.errors import BadIdError, ChecksumError, CorruptFileError, UnsupportedModelError
from beam_pipeline.files import ByteFile, OpenFile
from beam_pipeline.formats.encodings import cuts, decode, shown, varints, verify
from beam_pipeline.formats.files.vectors import require_as_many
from beam_pipeline.formats.keras import heap
from beam_pipeline.formats.model import Encoding, Tower
from beam_pipeline.formats.protobuf import Span

PIECE_BYTES = 8 << 20
"""Vectors of a piece, about: small enough for any worker's memory, large enough for a range request to pay."""


MAX_IDS_BYTES = 1 << 28
"""Bytes of ids that a worker reads at once."""
_MAX_DIMENSION = 1 << 20
"""BigQuery takes blocks of 16 MB of Avro, and a row has to fit into one."""
_BLOCK = 4 << 20
_VARINT_BLOCK = 1 << 18  # They take eight times their bytes while they are decoded.
_SMALL = 4 << 20
"""Bytes of a vocabulary that is compared with another as a set."""


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of a tower's matrix.

    Attributes:
        tower: name of the tower.
        first_row: first row of the matrix.
        rows: number of rows.
        ids: where the ids of these rows are, one for each; None for rows that belong to no id.
        rest: instead of rows, other bytes of the matrix's file, which count for the checksum alone.
        rows_and_ids: the ids themselves, and the row of the matrix of each (int64 [n], Arrow binary array [n]), where
            ids are not in row order; rows of the piece that are not among them belong to no id.
        lengths: where the lengths of these ids are, if apart from them.
    """

    tower: str
    first_row: int
    rows: int
    ids: Span | None
    rest: Span | None = None
    rows_and_ids: tuple[np.ndarray, pa.Array] | None = field(default=None, compare=False)
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
    row, count = vocabulary.first_row, 0
    with open_file(vocabulary.path) as file:
        for found, ids, lengths in cut_ids(file, tower, rows):
            if row + found > matrix.rows and vocabulary.fills:
                total = sum(found for found, _, _ in cut_ids(file, tower, rows))
                require_as_many(tower.name, vocabulary, total, vocabulary.count or 0)
            if row + found > matrix.rows:
                first_beyond = max(0, matrix.rows - row)
                name = read_ids(file, tower, found, ids, lengths)[first_beyond].as_py()
                raise BadIdError(
                    f"tower {tower.name!r}: id {shown(name)} has row {row + first_beyond:,}, but the matrix has only "
                    f"{matrix.rows:,} rows: vocabulary and weights are of two trainings; log the model again"
                )
            yield Piece(tower.name, row, found, ids, lengths=lengths)
            row, count = row + found, count + found
    check_count(tower, count)
    yield from _gap(tower.name, row, matrix.rows, rows)
    yield from cut_rest(tower, piece_bytes)


def cut_rest(tower: Tower, piece_bytes: int) -> Iterator[Piece]:
    """Yields pieces of the bytes that are read with a tower for the checksum alone."""
    for rest in tower.rest:
        for at in range(rest.start, rest.end, piece_bytes):
            yield Piece(tower.name, tower.matrix.rows, 0, None, Span(at, min(at + piece_bytes, rest.end)))


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
    if vocabulary.encoding is Encoding.ROWS:
        return pa.array(range(piece.first_row, piece.first_row + piece.rows)).cast(pa.string()).cast(pa.binary())
    with open_file(vocabulary.path) as file:
        ids = read_ids(file, tower, piece.rows, piece.ids, piece.lengths)
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


def cut_ids(file: ByteFile, tower: Tower, most: int) -> Iterator[tuple[int, Span, Span | None]]:
    """Yields (number of ids, where they are, where their lengths are if apart from them), `most` at a time.

    Raises:
        ChecksumError: the ids do not match the artifact's checksum.
        CorruptFileError: they are not where the artifact says.
    """
    vocabulary = tower.vocabulary
    if vocabulary.encoding is Encoding.STRING_TENSOR:
        yield from _cut_strings(file, tower, most)
        return
    start = vocabulary.span.start
    for count, end in cuts(file, vocabulary, most):
        check_size(tower, count, end - start)
        yield count, Span(start, end), None
        start = end
    # Others are checked while they are cut.
    if vocabulary.encoding in (Encoding.INT32, Encoding.INT64, Encoding.UTF32, Encoding.FIXED):
        if vocabulary.checksum and vocabulary.checksum.algorithm == "crc32":  # of an array and its header, in a zip
            verify(file, vocabulary)
        else:
            _check_sum(file, tower, 0, vocabulary.span.start)


def read_ids(file: ByteFile, tower: Tower, count: int, ids: Span, lengths: Span | None) -> pa.Array:
    """Returns ids that `cut_ids` found as an Arrow binary array.

    Raises:
        CorruptFileError: the bytes are not that many ids.
    """
    data = file.read(ids.start, ids.end - ids.start)
    if tower.vocabulary.heap is not None:
        return heap.read_strings(file, tower.vocabulary.heap, data)
    if lengths is None:
        return decode(tower.vocabulary.encoding, data, count)
    sizes = varints(file.read(lengths.start, lengths.end - lengths.start))
    if len(sizes) != count or int(sizes.sum()) != len(data):
        raise CorruptFileError(f"{file.path}: its ids changed while they were read")
    offsets = np.zeros(count + 1, np.int32)
    np.cumsum(sizes, out=offsets[1:], dtype=np.int32)
    return pa.Array.from_buffers(pa.binary(), count, [None, pa.py_buffer(offsets), pa.py_buffer(data)])


def _cut_strings(file: ByteFile, tower: Tower, most: int) -> Iterator[tuple[int, Span, Span]]:
    """Cuts a string tensor, once its checksums are compared.

    The layout, and what the checksums cover, is that of WriteStringTensor in
    tensorflow/core/util/tensor_bundle/tensor_bundle.cc: lengths count as little-endian uint32.
    """
    vocabulary = tower.vocabulary
    found, at, crc = list[tuple[int, Span, int]](), vocabulary.span.start, 0
    left = vocabulary.count or 0
    while left:
        start, count, size = at, 0, 0
        while count < min(most, left):
            block = file.read(at, min(_VARINT_BLOCK, vocabulary.span.end - at))
            ends = np.flatnonzero(np.frombuffer(block, np.uint8) < 0x80)[: min(most, left) - count]
            if not ends.size:
                raise CorruptFileError(f"{file.path}: no length of an id at byte {at:,}")
            lengths = varints(block[: int(ends[-1]) + 1])
            if (lengths > MAX_IDS_BYTES).any():
                raise CorruptFileError(f"{file.path}: tower {tower.name!r} has an id of {lengths.max():,} bytes")
            crc = google_crc32c.extend(crc, lengths.astype("<u4").tobytes())
            at, count, size = at + int(ends[-1]) + 1, count + len(ends), size + int(lengths.sum())
        check_size(tower, count, size)
        found.append((count, Span(start, at), size))
        left -= count
    stored = file.read(at, 4)
    total = sum(size for _, _, size in found)
    if checksums.unmask(int.from_bytes(stored, "little")) != crc or at + 4 + total != vocabulary.span.end:
        raise ChecksumError(
            f"{file.path}: the lengths of the ids of tower {tower.name!r} do not match their crc32c; "
            "the file was damaged after the training: log the model again"
        )
    at += 4
    _check_sum(file, tower, google_crc32c.extend(crc, stored), at)
    for count, span, size in found:
        yield count, Span(at, at + size), span
        at += size


def are_same(one: Tower, other: Tower, open_file: OpenFile) -> bool:
    """Whether two towers have the same ids; of large vocabularies, the same ids in the same order."""
    first, second = one.vocabulary, other.vocabulary
    if (first.path, first.span) == (second.path, second.span):
        return True
    if Encoding.PARQUET in (first.encoding, second.encoding) or Encoding.ROWS in (first.encoding, second.encoding):
        return first.encoding == second.encoding and (first.table, first.count) == (second.table, second.count)
    sizes = [vocabulary.span.end - vocabulary.span.start for vocabulary in (first, second)]
    if max(sizes) <= _SMALL and first.in_row_order and second.in_row_order:
        names = [
            {name for piece in cut(tower, open_file, PIECE_BYTES) for name in read(piece, tower, open_file).to_pylist()}
            for tower in (one, other)
        ]
        return names[0] == names[1]
    # Sets of millions of ids take too much memory in a launcher; bytes are compared a block at a time.
    if sizes[0] != sizes[1] or first.encoding != second.encoding or first.heap or second.heap:
        return False
    with open_file(first.path) as ours, open_file(second.path) as theirs:
        blocks = zip(ours.blocks(*first.span, _BLOCK), theirs.blocks(*second.span, _BLOCK), strict=True)
        return all(a == b for (_, a), (_, b) in blocks)


def check_size(tower: Tower, count: int, size: int) -> None:
    """Raises CorruptFileError if so many ids take more bytes than a worker reads at once."""
    if size > MAX_IDS_BYTES:
        raise CorruptFileError(
            f"{tower.vocabulary.path}: {count:,} ids of tower {tower.name!r} take {size:,} bytes, more than a "
            f"worker reads at once ({MAX_IDS_BYTES:,}): is that a vocabulary?"
        )


def check_count(tower: Tower, count: int) -> None:
    """Raises CorruptFileError if the artifact says that there are more or fewer ids."""
    vocabulary = tower.vocabulary
    if vocabulary.fills:
        require_as_many(tower.name, vocabulary, count, vocabulary.count or 0)
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


def cover(towers: Sequence[Tower]) -> tuple[Tower, ...]:
    """Returns the towers such that together they read every byte that their matrices' checksums cover.

    A checksum may cover more than a matrix: in a `.keras` file both towers, the optimizer's state and whatever else
    is in `model.weights.h5`. What belongs to no matrix becomes the `rest` of the first of the towers concerned. A
    matrix without a checksum is read alone.

    Raises:
        CorruptFileError: two different matrices share bytes.
        UnsupportedModelError: a row is too large for BigQuery, and for a piece.
    """
    for tower in towers:
        if tower.matrix.dimension > _MAX_DIMENSION:
            raise UnsupportedModelError(
                f"tower {tower.name!r} has vectors of {tower.matrix.dimension:,} values, more than the "
                f"{_MAX_DIMENSION:,} that BigQuery loads in a row: is {tower.layer!r} an embedding?"
            )
    rest: dict[int, tuple[Span, ...]] = {}
    for path, checksum in dict.fromkeys((tower.matrix.path, tower.matrix.checksum) for tower in towers):
        if checksum is None:
            continue
        sharing = [i for i, t in enumerate(towers) if (t.matrix.path, t.matrix.checksum) == (path, checksum)]
        gaps, at = [], checksum.span.start
        for span in sorted({towers[i].contiguous.span for i in sharing}):
            if span.start < at:
                raise CorruptFileError(f"{path}: bytes {span.start:,} to {at:,} belong to two embeddings")
            gaps += [Span(at, span.start)] if span.start > at else []
            at = span.end
        gaps += [Span(at, checksum.span.end)] if checksum.span.end > at else []
        rest[sharing[0]] = tuple(gaps)
    return tuple(replace(tower, rest=rest[i]) if rest.get(i) else tower for i, tower in enumerate(towers))
