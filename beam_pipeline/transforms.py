"""The transforms: pieces of a vocabulary in, batches of rows and reports out. Wiring only; formats are elsewhere."""

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import apache_beam as beam
import google_crc32c
import numpy as np
import pyarrow as pa
from apache_beam.pvalue import PBegin, PCollection, TaggedOutput
from apache_beam.transforms.window import GlobalWindows

from beam_pipeline import crc32c, metrics
from beam_pipeline.errors import (
    AuditError,
    BadIdError,
    BadVectorError,
    ChecksumError,
    PipelineError,
)
from beam_pipeline.files import OpenFile, open_file
from beam_pipeline.formats import ids
from beam_pipeline.formats.artifact import Tower
from beam_pipeline.formats.ids import Piece

REPORTS = "reports"


@dataclass(frozen=True)
class Batch:
    """Rows of a tower.

    A batch that was read is pickled as the description of where it was read, and read again where it is unpickled:
    Beam pickles elements merely to estimate their size, which would copy every vector several times.

    Attributes:
        ids: Arrow string array [n].
        vectors: floats of any width [n, dimension]; float64 holds each exactly.
        source: the piece and the tower that it was read from.
    """

    ids: pa.Array
    vectors: np.ndarray
    source: tuple[Piece, Tower] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Returns how to make the batch again."""
        return (_read_again, self.source) if self.source else (Batch, (self.ids, self.vectors))


def _read_again(piece: Piece, tower: Tower) -> Batch:
    batch, _ = read_piece(piece, tower, open_file)
    if batch is None:
        raise AuditError(f"tower {tower.name!r}: rows at {piece.first_row:,} had ids and have none: the file changed")
    return batch


@dataclass(frozen=True)
class Report:
    """What was seen of a piece.

    Attributes:
        tower: name of the tower.
        first_row, rows: rows of the matrix that were read; 0 rows if none could be.
        ids: how many of them belong to ids.
        bytes: bytes of vectors.
        crc32c: checksum of these bytes.
        problem: what is wrong, if anything is.
    """

    tower: str
    first_row: int
    rows: int = 0
    ids: int = 0
    bytes: int = 0
    crc32c: int = 0
    problem: PipelineError | None = None


def read_piece(piece: Piece, tower: Tower, open_file: OpenFile) -> tuple[Batch | None, Report]:
    """Reads the ids and the vectors of a piece; None instead of a batch if its rows belong to no id.

    Raises:
        PipelineError: anything that is wrong with its bytes.
    """
    matrix = tower.matrix
    with open_file(matrix.path) as file:
        raw = file.read(matrix.offset + piece.first_row * matrix.row_bytes, piece.rows * matrix.row_bytes)
    names = ids.read(piece, tower, open_file)
    report = Report(tower.name, piece.first_row, piece.rows, len(names), len(raw), google_crc32c.value(raw))
    if not len(names):
        return None, report
    vectors = matrix.decode(raw)
    ids_and_vectors = _checked_ids(names, piece, tower), _checked_vectors(vectors, names, piece, tower)
    return Batch(*ids_and_vectors, source=(piece, tower)), report


def _checked_ids(names: pa.Array, piece: Piece, tower: Tower) -> pa.Array:
    try:
        text = names.cast(pa.string())
    except pa.ArrowInvalid as error:
        for at, name in enumerate(names.to_pylist()):
            try:
                name.decode()
            except UnicodeDecodeError:
                raise BadIdError(
                    f"tower {tower.name!r}: id {ids.shown(name)} (row {piece.first_row + at:,}) is not UTF-8, "
                    "which BigQuery requires; encode the ids and train again"
                ) from error
        raise
    if (empty := pa.compute.index(pa.compute.binary_length(names), 0).as_py()) >= 0:
        raise BadIdError(
            f"tower {tower.name!r}: the id of row {piece.first_row + empty:,} is empty; remove it from the vocabulary "
            "and train again"
        )
    return text


def _checked_vectors(vectors: np.ndarray, names: pa.Array, piece: Piece, tower: Tower) -> np.ndarray:
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        at = int(np.flatnonzero(~finite)[0])
        raise BadVectorError(
            f"tower {tower.name!r}: the vector of id {ids.shown(names[at].as_py())} (row {piece.first_row + at:,}) "
            "holds NaN or infinity; the training diverged, train again"
        )
    return vectors


class _CutFn(beam.DoFn):
    def process(self, tower: Tower) -> Iterator[Any]:
        try:
            yield from ids.cut(tower, open_file, ids.PIECE_BYTES)
        except PipelineError as problem:
            yield TaggedOutput(REPORTS, Report(tower.name, 0, problem=problem))


class _ReadFn(beam.DoFn):
    """Reads pieces one ahead: while a batch is encoded and written, a second thread reads the next.

    Two batches are in memory at a time, whatever the number of pieces.
    """

    def __init__(self, tower: Tower) -> None:
        self._tower = tower

    def display_data(self) -> dict[str, Any]:
        matrix = self._tower.matrix
        return {
            "tower": self._tower.name,
            "layer": self._tower.layer,
            "rows": matrix.rows,
            "dimension": matrix.dimension,
            "dtype": matrix.dtype,
            "vectors": matrix.path,
            "ids": self._tower.vocabulary.path,
        }

    def setup(self) -> None:
        self._reader = ThreadPoolExecutor(1)

    def start_bundle(self) -> None:
        self._ahead: Future[tuple[Batch | None, Report]] | None = None

    def process(self, piece: Piece) -> Iterator[Any]:
        before, self._ahead = self._ahead, self._reader.submit(self._read, piece)
        if before:
            yield from self._outputs(before.result())

    def finish_bundle(self) -> Iterator[Any]:
        if self._ahead:
            for output in self._outputs(self._ahead.result()):
                if isinstance(output, TaggedOutput):
                    yield TaggedOutput(output.tag, GlobalWindows.windowed_value(output.value))
                else:
                    yield GlobalWindows.windowed_value(output)

    def teardown(self) -> None:
        self._reader.shutdown()

    def _read(self, piece: Piece) -> tuple[Batch | None, Report]:
        try:
            return read_piece(piece, self._tower, open_file)
        except PipelineError as problem:
            return None, Report(piece.tower, piece.first_row, problem=problem)

    def _outputs(self, read: tuple[Batch | None, Report]) -> Iterator[Any]:
        batch, report = read
        metrics.count("read-rows", report.rows)
        metrics.count("read-bytes", report.bytes)
        yield TaggedOutput(REPORTS, report)
        if batch is not None:
            yield batch


@dataclass
class ReadTower(beam.PTransform[PBegin, dict[str, PCollection[Any]]]):
    """Reads a tower: nothing in; batches of rows and reports out, as outputs "batches" and "reports".

    Cutting is one sequential scan of the vocabulary; reading is parallel, a piece at a time. Every row of the matrix
    is read exactly once. What is wrong with a piece is reported, not raised: a retry would not mend it.

    Attributes:
        tower: the tower.
    """

    tower: Tower

    def expand(self, pbegin: PBegin) -> Any:
        """Applies the transform."""
        cut = (
            pbegin
            | "Create" >> beam.Create([self.tower])
            | "Cut" >> beam.ParDo(_CutFn()).with_outputs(REPORTS, main="pieces")
        )
        read = (
            cut.pieces
            | "Spread" >> beam.Reshuffle()
            | "Read" >> beam.ParDo(_ReadFn(self.tower)).with_outputs(REPORTS, main="batches")
        )
        return {"batches": read.batches, REPORTS: (cut[REPORTS], read[REPORTS]) | "Reports" >> beam.Flatten()}


def to_rows(batch: Batch, tower: str, constants: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields one row per id, as `WriteToBigQuery` takes them."""
    for name, vector in zip(batch.ids.to_pylist(), batch.vectors.astype(float).tolist(), strict=True):
        yield {**constants, f"{tower}_id": name, f"{tower}_embedding": vector}


def expected_ids(reports: Iterable[Report], towers: Iterable[Tower]) -> dict[str, int]:
    """Returns the number of ids of each tower, once all reports together are the whole of every matrix.

    Raises:
        PipelineError: the first problem of the reports, in row order.
        ChecksumError: the bytes of a matrix do not match the artifact's checksum.
        AuditError: reports are missing or double.
    """
    ordered = sorted(reports, key=lambda report: (report.tower, report.first_row))
    problems = [report.problem for report in ordered if report.problem]
    if problems:
        more = f" (and {len(problems) - 1:,} more problems)" if len(problems) > 1 else ""
        raise type(problems[0])(f"{problems[0]}{more}")
    expected = {}
    for tower in towers:
        own = [report for report in ordered if report.tower == tower.name]
        row = 0
        for report in own:
            if report.first_row != row:
                raise AuditError(f"tower {tower.name!r}: rows {row:,} to {report.first_row:,} were not read once")
            row += report.rows
        if row != tower.matrix.rows:
            raise AuditError(f"tower {tower.name!r}: {row:,} of {tower.matrix.rows:,} rows were read")
        if crc32c.combine((report.crc32c, report.bytes) for report in own) != tower.matrix.crc32c:
            raise ChecksumError(
                f"{tower.matrix.path}: the embeddings of tower {tower.name!r} do not match the checkpoint's crc32c; "
                "the file was damaged after the training: log the model again"
            )
        expected[tower.name] = sum(report.ids for report in own)
        if not expected[tower.name]:
            raise BadIdError(f"tower {tower.name!r} has no ids: its vocabulary is empty; train it with one")
    return expected
