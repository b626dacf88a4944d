"""The rows of a piece: its ids and vectors, read by byte range and checked on the way."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from beam_pipeline import checksums
from beam_pipeline.errors import AuditError, BadIdError, BadVectorError
from beam_pipeline.files import OpenFile, open_file
from beam_pipeline.formats.encodings import shown
from beam_pipeline.formats.model import Tower
from beam_pipeline.formats.protobuf import Span
from beam_pipeline.reading import pieces
from beam_pipeline.reading.pieces import Piece
from beam_pipeline.reading.tally import Norms, Report

_NORM_ROWS = 512


@dataclass(frozen=True)
class Batch:
    """Rows of a tower.

    A batch that was read is pickled as the description of where it was read, and read again where it is unpickled:
    Beam pickles elements merely to estimate their size, which would copy every vector several times.

    Attributes:
        run_id: the run that they belong to.
        ids: Arrow string array [n].
        vectors: floats of any width [n, dimension]; float64 holds each exactly.
        source: the piece and the tower that it was read from, and which rows and ids of it if they are in no order.
    """

    run_id: str
    ids: pa.Array
    vectors: np.ndarray
    source: tuple[Any, ...] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Returns how to make the batch again."""
        if self.source:
            return _read_again, (self.run_id, *self.source)
        return Batch, (self.run_id, self.ids, self.vectors)


def _read_again(run_id: str, piece: Piece, tower: Tower, *rows_and_ids: Any) -> Batch:
    batch, _ = read_piece(run_id, piece, tower, open_file, *rows_and_ids)
    if batch is None:
        raise AuditError(f"tower {tower.name!r}: rows at {piece.first_row:,} had ids and have none: the file changed")
    return batch


def read_piece(
    run_id: str,
    piece: Piece,
    tower: Tower,
    open_file: OpenFile,
    rows_and_ids: tuple[np.ndarray, pa.Array] | None = None,
) -> tuple[Batch | None, Report]:
    """Reads the ids and the vectors of a piece; None instead of a batch if its rows belong to no id.

    Args:
        run_id: of which run.
        piece: what is read.
        tower: of which tower.
        open_file: how its files are opened.
        rows_and_ids: the ids and the row of each, if they are not in row order and so not where the piece says.

    Raises:
        PipelineError: anything that is wrong with its bytes.
    """
    matrix = tower.matrix
    start = matrix.offset + piece.first_row * matrix.row_bytes
    span = piece.rest or Span(start, start + piece.rows * matrix.row_bytes)
    with open_file(matrix.path) as file:
        raw = file.read(span.start, span.end - span.start)
    rows: Sequence[int] | np.ndarray
    if rows_and_ids is None:
        rows, names = range(piece.first_row, piece.first_row + piece.rows), pieces.read(piece, tower, open_file)
    else:
        rows, names = rows_and_ids
    crc = checksums.value(matrix.checksum.algorithm, raw)
    report = Report(run_id, tower.name, piece.first_row, piece.rows, len(names), span.start, len(raw), crc)
    if not len(names):
        return None, report
    vectors = matrix.decode(raw)
    source: tuple[Any, ...] = (piece, tower)
    if rows_and_ids is not None:
        vectors = vectors[rows_and_ids[0] - piece.first_row]
        source = (piece, tower, rows_and_ids)
    text = _checked_ids(names, rows, tower)
    norms = _checked_norms(vectors, names, rows, tower)
    return Batch(run_id, text, vectors, source=source), replace(report, norms=norms)


def _checked_ids(names: pa.Array, rows: Sequence[int] | np.ndarray, tower: Tower) -> pa.Array:
    try:
        text = names.cast(pa.string())
    except pa.ArrowInvalid as error:
        for at, name in enumerate(names.to_pylist()):
            try:
                name.decode()
            except UnicodeDecodeError:
                raise BadIdError(
                    f"tower {tower.name!r}: id {shown(name)} (row {rows[at]:,}) is not UTF-8, "
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
            raise BadVectorError(
                f"tower {tower.name!r}: the vector of id {shown(names[int(at)].as_py())} "
                f"(row {rows[int(at)]:,}) holds NaN or infinity; the training diverged, train again"
            )
        norms[at] = math.hypot(*vector.tolist())  # Only the square is too large.
    # A norm beyond float64 would be infinite, which no SQL literal is.
    norms = np.minimum(norms, np.finfo(np.float64).max)
    return Norms(float(norms.min()), math.fsum(norms), float(norms.max()), int((norms == 0).sum()))


def to_rows(batch: Batch, tower: str, constants: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yields one row per id, as `WriteToBigQuery` takes them; `constants` are the other columns of each run."""
    of_run = constants[batch.run_id]
    for name, vector in zip(batch.ids.to_pylist(), batch.vectors.astype(float).tolist(), strict=True):
        yield {**of_run, f"{tower}_id": name, f"{tower}_embedding": vector}
