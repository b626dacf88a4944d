"""The rows of a piece: its ids and vectors, read by byte range and checked on the way."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from beam_pipeline import checksums
from beam_pipeline.errors import BadIdError, BadVectorError, PipelineError
from beam_pipeline.files import OpenFile
from beam_pipeline.formats.encodings import shown
from beam_pipeline.formats.files import parquet
from beam_pipeline.formats.model import RowGroup, Tower, VectorTable
from beam_pipeline.formats.protobuf import Span
from beam_pipeline.reading import pieces
from beam_pipeline.reading.pieces import Piece
from beam_pipeline.reading.tally import Norms, Report

_NORM_ROWS = 512


@dataclass(frozen=True)
class Batch:
    """Rows of a tower.

    Attributes:
        run_id: the run that they belong to.
        ids: Arrow string array [n].
        vectors: floats of any width [n, dimension]; float64 holds each exactly.
        first_row: where the rows are in a table that has an order; None if they were computed.
    """

    run_id: str
    ids: pa.Array
    vectors: np.ndarray
    first_row: int | None = None


Element = tuple[str, Piece] | Batch
"""What travels from step to step: (run id, a piece of a tower), or vectors that are in no file but were computed."""


def read(element: Element, towers: Mapping[str, Tower], open_file: OpenFile) -> tuple[Batch | None, Report]:
    """Returns the rows of an element, if it has any, and what was seen of them, which says what is wrong.

    What is wrong is not raised, since a retry would not fix it.

    Args:
        element: a piece of a tower, or its computed vectors.
        towers: run id → the tower in that run's model.
        open_file: how its files are opened.
    """
    if isinstance(element, Batch):
        run_id, first_row, tower = element.run_id, element.first_row, towers[element.run_id]
    else:
        run_id, first_row, tower = element[0], element[1].first_row, towers[element[0]]
    try:
        if isinstance(element, Batch):
            return check_batch(element, tower)
        return read_piece(*element, tower, open_file)
    except PipelineError as problem:
        return None, Report(run_id, tower.name, first_row, problem=problem)


def check_batch(batch: Batch, tower: Tower) -> tuple[Batch | None, Report]:
    """Returns vectors that are read or computed already, None if there are none, and what was seen of them.

    Raises:
        BadIdError: an id is empty.
        BadVectorError: a vector holds NaN or infinity, or there is not one of the tower's dimension for each id.
    """
    count, shape = len(batch.ids), (len(batch.ids), tower.matrix.dimension)
    if batch.vectors.shape != shape:
        raise BadVectorError(
            f"tower {tower.name!r}: vectors of shape {batch.vectors.shape} were computed, not {shape}: the model's "
            "output is not one vector for each id"
        )
    report = Report(batch.run_id, tower.name, batch.first_row, count, count, bytes=batch.vectors.nbytes)
    if not count:
        return None, report
    first = batch.first_row or 0
    names, rows = batch.ids.cast(pa.binary()), range(first, first + count)
    text = _checked_ids(names, rows, tower)
    return replace(batch, ids=text), replace(report, norms=_checked_norms(batch.vectors, names, rows, tower))


def read_group(run_id: str, group: RowGroup, first_row: int, tower: Tower, open_file: OpenFile) -> Iterator[Batch]:
    """Yields the rows of a row group, some MB of vectors at a time, not checked yet.

    Args:
        run_id: of which run.
        group: of the tower's Parquet files.
        first_row: rows in the groups before it.
        tower: of which tower.
        open_file: how its files are opened.

    Raises:
        PipelineError: anything that is wrong with its bytes.
    """
    if not isinstance(tower.matrix, VectorTable):
        raise TypeError(f"tower {tower.name!r} has no row groups")
    rows = tower.matrix.rows_in(pieces.PIECE_BYTES)
    for ids, vectors in parquet.read_vectors(tower.matrix, group, rows, open_file):
        yield Batch(run_id, ids, vectors, first_row)
        first_row += len(ids)


def read_piece(run_id: str, piece: Piece, tower: Tower, open_file: OpenFile) -> tuple[Batch | None, Report]:
    """Reads the ids and the vectors of a piece; None instead of a batch if its rows belong to no id.

    Args:
        run_id: of which run.
        piece: what is read.
        tower: of which tower.
        open_file: how its files are opened.

    Raises:
        PipelineError: anything that is wrong with its bytes.
    """
    # The one place that knows how vectors are laid out in a file.
    content = _read_matrix(piece, tower, open_file)
    rows, names = content.rows, content.names
    report = Report(
        run_id, tower.name, piece.first_row, piece.rows, len(names), content.offset, content.bytes, content.crc
    )
    if not len(names):
        return None, report
    text = _checked_ids(names, rows, tower)
    norms = _checked_norms(content.vectors, names, rows, tower)
    return Batch(run_id, text, content.vectors), replace(report, norms=norms)


@dataclass(frozen=True)
class _Content:
    """What the files hold of a piece, not checked yet.

    Attributes:
        rows: the row of each id, for messages.
        names: ids, an Arrow binary array [n].
        vectors: [n, dimension].
        offset, bytes, crc: as in a `Report`.
    """

    rows: Sequence[int] | np.ndarray
    names: pa.Array
    vectors: np.ndarray
    offset: int
    bytes: int
    crc: int


def _read_matrix(piece: Piece, tower: Tower, open_file: OpenFile) -> _Content:
    """Reads rows of a matrix by their byte range."""
    matrix = tower.contiguous
    start = matrix.offset + piece.first_row * matrix.row_bytes
    span = piece.rest or Span(start, start + piece.rows * matrix.row_bytes)
    with open_file(matrix.path) as file:
        raw = file.read(span.start, span.end - span.start)
    rows: Sequence[int] | np.ndarray = range(piece.first_row, piece.first_row + piece.rows)
    if piece.rows_and_ids is None:
        names = pieces.read(piece, tower, open_file)
    else:
        rows, names = piece.rows_and_ids
    crc = checksums.value(matrix.checksum.algorithm, raw) if matrix.checksum else 0
    vectors = matrix.decode(raw) if len(names) else np.empty((0, matrix.dimension), np.float32)
    if piece.rows_and_ids is not None and len(names):
        vectors = vectors[piece.rows_and_ids[0] - piece.first_row]
    return _Content(rows, names, vectors, span.start, len(raw), crc)


def _checked_ids(names: pa.Array, rows: Sequence[int] | np.ndarray, tower: Tower) -> pa.Array:
    try:
        text = names.cast(pa.string())
    except pa.ArrowInvalid as error:
        for at, name in enumerate(names.to_pylist()):
            try:
                name.decode()
            except UnicodeDecodeError:
                raise BadIdError(
                    f"tower {tower.name!r}: id {shown(name)}{_row(tower, rows[at])} is not UTF-8, "
                    "which BigQuery requires; encode the ids and train again"
                ) from error
        raise
    if (empty := pa.compute.index(pa.compute.binary_length(names), 0).as_py()) >= 0:
        raise BadIdError(
            f"tower {tower.name!r}: the id of row {rows[empty]:,} is empty; remove it from the vocabulary "
            "and train again"
        )
    return text


def _checked_norms(vectors: np.ndarray, names: pa.Array, rows: Sequence[int] | np.ndarray, tower: Tower) -> Norms:
    squares = np.empty(len(vectors))
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, len(vectors), _NORM_ROWS):  # Few rows at a time stay in the processor's cache.
            wide = vectors[start : start + _NORM_ROWS].astype(np.float64)
            np.einsum("ij,ij->i", wide, wide, out=squares[start : start + _NORM_ROWS])
        norms = np.sqrt(squares)
    for at in np.flatnonzero(~np.isfinite(norms)):
        vector = vectors[at]
        if not np.isfinite(vector).all():
            remedy = "check its features" if tower.is_computed else "the training diverged, train again"
            raise BadVectorError(
                f"tower {tower.name!r}: the vector of id {shown(names[int(at)].as_py())}{_row(tower, rows[int(at)])} "
                f"holds NaN or infinity; {remedy}"
            )
        norms[at] = math.hypot(*vector.tolist())  # Only the square is too large.
    # A norm beyond float64 would be infinite, which no SQL literal is.
    norms = np.minimum(norms, np.finfo(np.float64).max)
    return Norms(float(norms.min()), math.fsum(norms), float(norms.max()), int((norms == 0).sum()))


def _row(tower: Tower, row: int) -> str:
    """Returns where an id is in a matrix, for a message; computed vectors are in no order."""
    return "" if tower.is_computed else f" (row {row:,})"


def to_rows(batch: Batch, tower: str, constants: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yields one row per id, as `WriteToBigQuery` takes them; `constants` are the other columns of each run."""
    of_run = constants[batch.run_id]
    for name, vector in zip(batch.ids.to_pylist(), batch.vectors.astype(float).tolist(), strict=True):
        yield {**of_run, f"{tower}_id": name, f"{tower}_embedding": vector}
