"""The transforms: pieces of a vocabulary in, batches of rows and reports out. Wiring only; formats are elsewhere."""

from collections.abc import Iterable, Iterator, Sequence
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
from beam_pipeline.formats.ids import Entries, Piece

REPORTS = "reports"


@dataclass(frozen=True)
class Batch:
    """Rows of a tower.

    A batch that was read is pickled as the description of where it was read, and read again where it is unpickled:
    Beam pickles elements merely to estimate their size, which would copy every vector several times.

    Attributes:
        ids: Arrow string array [n].
        vectors: floats of any width [n, dimension]; float64 holds each exactly.
        source: the piece and the tower that it was read from, and which rows and ids of it if they are in no order.
    """

    ids: pa.Array
    vectors: np.ndarray
    source: tuple[Any, ...] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Returns how to make the batch again."""
        return (_read_again, self.source) if self.source else (Batch, (self.ids, self.vectors))


def _read_again(piece: Piece, tower: Tower, *rows_and_ids: Any) -> Batch:
    batch, _ = read_piece(piece, tower, open_file, *rows_and_ids)
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


def read_piece(
    piece: Piece, tower: Tower, open_file: OpenFile, rows_and_ids: tuple[np.ndarray, pa.Array] | None = None
) -> tuple[Batch | None, Report]:
    """Reads the ids and the vectors of a piece; None instead of a batch if its rows belong to no id.

    Args:
        piece: what is read.
        tower: of which tower.
        open_file: how its files are opened.
        rows_and_ids: the ids and the row of each, if they are not in row order and so not where the piece says.

    Raises:
        PipelineError: anything that is wrong with its bytes.
    """
    matrix = tower.matrix
    with open_file(matrix.path) as file:
        raw = file.read(matrix.offset + piece.first_row * matrix.row_bytes, piece.rows * matrix.row_bytes)
    rows: Sequence[int] | np.ndarray
    if rows_and_ids is None:
        rows, names = range(piece.first_row, piece.first_row + piece.rows), ids.read(piece, tower, open_file)
    else:
        rows, names = rows_and_ids
    report = Report(tower.name, piece.first_row, piece.rows, len(names), len(raw), google_crc32c.value(raw))
    if not len(names):
        return None, report
    vectors = matrix.decode(raw)
    source: tuple[Any, ...] = (piece, tower)
    if rows_and_ids is not None:
        vectors = vectors[rows_and_ids[0] - piece.first_row]
        source = (piece, tower, rows_and_ids)
    ids_and_vectors = _checked_ids(names, rows, tower), _checked_vectors(vectors, names, rows, tower)
    return Batch(*ids_and_vectors, source=source), report


def _checked_ids(names: pa.Array, rows: Sequence[int] | np.ndarray, tower: Tower) -> pa.Array:
    try:
        text = names.cast(pa.string())
    except pa.ArrowInvalid as error:
        for at, name in enumerate(names.to_pylist()):
            try:
                name.decode()
            except UnicodeDecodeError:
                raise BadIdError(
                    f"tower {tower.name!r}: id {ids.shown(name)} (row {rows[at]:,}) is not UTF-8, "
                    "which BigQuery requires; encode the ids and train again"
                ) from error
        raise
    if (empty := pa.compute.index(pa.compute.binary_length(names), 0).as_py()) >= 0:
        raise BadIdError(
            f"tower {tower.name!r}: the id of row {rows[empty]:,} is empty; remove it from the vocabulary "
            "and train again"
        )
    return text


def _checked_vectors(
    vectors: np.ndarray, names: pa.Array, rows: Sequence[int] | np.ndarray, tower: Tower
) -> np.ndarray:
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        at = int(np.flatnonzero(~finite)[0])
        raise BadVectorError(
            f"tower {tower.name!r}: the vector of id {ids.shown(names[at].as_py())} (row {rows[at]:,}) "
            "holds NaN or infinity; the training diverged, train again"
        )
    return vectors


class _CutFn(beam.DoFn):
    def process(self, tower: Tower) -> Iterator[Any]:
        try:
            if tower.vocabulary.in_row_order:
                yield from ids.cut(tower, open_file, ids.PIECE_BYTES)
            else:
                yield from ids.cut_entries(tower, open_file, ids.PIECE_ENTRIES)
        except PipelineError as problem:
            yield TaggedOutput(REPORTS, Report(tower.name, 0, problem=problem))


class _ReadFn(beam.DoFn):
    """Reads pieces one ahead: while a batch is encoded and written, a second thread reads the next.

    Two batches are in memory at a time, whatever the number of pieces.
    """

    def __init__(self, tower: Tower) -> None:
        self._tower = tower

    def setup(self) -> None:
        self._reader = ThreadPoolExecutor(1)

    def start_bundle(self) -> None:
        self._ahead: Future[tuple[Batch | None, Report]] | None = None

    def process(self, piece: Any) -> Iterator[Any]:
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

    def _read(self, piece: Any) -> tuple[Batch | None, Report]:
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


def _matrix_pieces(tower: Tower, rows: int) -> Iterator[tuple[int, Any]]:
    """Yields (number, rows and ids) for each piece of a matrix: the names of its special rows, as a rule none."""
    named = np.arange(len(tower.vocabulary.special_tokens), dtype=np.int64)
    names = pa.array([token.encode() for token in tower.vocabulary.special_tokens], pa.binary())
    for number in range(-(-tower.matrix.rows // rows)):
        own = slice(number * rows, (number + 1) * rows)
        yield number, (named[own], names[own])


class _SortFn(beam.DoFn):
    """Reads entries and emits them by piece of the matrix: (number of the piece, (rows, ids)).

    An array per entries and piece crosses the shuffle, not an element per id.
    """

    def __init__(self, tower: Tower, rows: int) -> None:
        self._tower = tower
        self._rows = rows

    def process(self, entries: Entries) -> Iterator[Any]:
        try:
            rows, names = ids.read_entries(entries, self._tower, open_file)
        except PipelineError as problem:
            yield TaggedOutput(REPORTS, Report(self._tower.name, 0, problem=problem))
            return
        order = np.argsort(rows, kind="stable")
        numbers, starts = np.unique(rows[order] // self._rows, return_index=True)
        for number, own in zip(numbers.tolist(), np.split(order, starts[1:]), strict=True):
            yield number, (rows[own], names.take(pa.array(own)))


class _ReadRowsFn(_ReadFn):
    """Reads a piece of a matrix and the vectors of the rows that have ids."""

    def __init__(self, tower: Tower, rows: int) -> None:
        super().__init__(tower)
        self._rows = rows

    def process(self, element: tuple[int, Iterable[Any]]) -> Iterator[Any]:
        yield from super().process(element)

    def _read(self, element: Any) -> tuple[Batch | None, Report]:
        number, parts = element
        rows, names = zip(*parts, strict=True)
        first = number * self._rows
        piece = Piece(self._tower.name, first, min(self._rows, self._tower.matrix.rows - first), None)
        try:
            return read_piece(piece, self._tower, open_file, (np.concatenate(rows), pa.concat_arrays(names)))
        except PipelineError as problem:
            return None, Report(piece.tower, piece.first_row, problem=problem)


@dataclass
class ReadTower(beam.PTransform[PBegin, dict[str, PCollection[Any]]]):
    """Reads a tower: nothing in; batches of rows and reports out, as outputs "batches" and "reports".

    Cutting is one sequential scan of the vocabulary; reading is parallel, a piece at a time. Every row of the matrix
    is read exactly once. Where ids are not in row order, they are first sorted by piece of the matrix, in a shuffle of
    ids and row numbers. What is wrong with a piece is reported, not raised: a retry would not mend it.

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
        reports = [cut[REPORTS]]
        pieces = cut.pieces | "Spread" >> beam.Reshuffle()
        read_fn = _ReadFn(self.tower)
        if not self.tower.vocabulary.in_row_order:
            rows = max(1, ids.PIECE_BYTES // self.tower.matrix.row_bytes)
            read_fn = _ReadRowsFn(self.tower, rows)
            found = pieces | "Sort" >> beam.ParDo(_SortFn(self.tower, rows)).with_outputs(REPORTS, main="entries")
            reports.append(found[REPORTS])
            # Rows that no id has are read too: the checksum is that of the whole matrix.
            matrix = pbegin | "Matrix" >> beam.Create([self.tower]) | "Rows" >> beam.FlatMap(_matrix_pieces, rows)
            pieces = (found.entries, matrix) | "Both" >> beam.Flatten() | "Group" >> beam.GroupByKey()
        read = pieces | "Read" >> beam.ParDo(read_fn).with_outputs(REPORTS, main="batches")
        return {"batches": read.batches, REPORTS: (*reports, read[REPORTS]) | "Reports" >> beam.Flatten()}


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
