"""The transforms: pieces of a vocabulary in, batches of rows and reports out. Wiring only; formats are elsewhere."""

import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
from apache_beam.io.filesystems import FileSystems
from apache_beam.pvalue import PBegin, PCollection, TaggedOutput
from apache_beam.transforms.window import GlobalWindows

from beam_pipeline import checksums, emulators, metrics
from beam_pipeline.errors import (
    AuditError,
    BadIdError,
    BadVectorError,
    ChecksumError,
    PipelineError,
)
from beam_pipeline.files import OpenFile, open_file
from beam_pipeline.formats import ids
from beam_pipeline.formats.artifact import Checksum, Tower
from beam_pipeline.formats.ids import Entries, Piece
from beam_pipeline.formats.wire import Span
from beam_pipeline.runs import Training

REPORTS, ENTRIES = "reports", "entries"

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


@dataclass(frozen=True)
class Norms:
    """Euclidean norms of vectors: the smallest, their sum, the largest, and how many are zero."""

    smallest: float
    total: float
    largest: float
    zeros: int


@dataclass(frozen=True)
class Report:
    """What was seen of a piece.

    Attributes:
        run_id: the run.
        tower: name of the tower.
        first_row, rows: rows of the matrix that were read; 0 rows if none could be.
        ids: how many of them belong to ids.
        offset, bytes: where in the matrix's file they lie, and how many bytes they are.
        crc: checksum of these bytes, by the algorithm of the matrix's.
        norms: Euclidean norms of the ids' vectors; None without ids.
        problem: what is wrong, if anything is.
    """

    run_id: str
    tower: str
    first_row: int
    rows: int = 0
    ids: int = 0
    offset: int = 0
    bytes: int = 0
    crc: int = 0
    norms: Norms | None = None
    problem: PipelineError | None = None


@dataclass(frozen=True)
class Tally:
    """What was read of a tower, all its pieces together.

    Attributes:
        ids: number of ids, each with a vector.
        bytes: bytes read of its matrix.
        norm_min, norm_mean, norm_max: Euclidean norms of the ids' vectors.
        zero_vectors: how many of them are zero.
    """

    ids: int
    bytes: int
    norm_min: float
    norm_mean: float
    norm_max: float
    zero_vectors: int


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
        rows, names = range(piece.first_row, piece.first_row + piece.rows), ids.read(piece, tower, open_file)
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
                f"tower {tower.name!r}: the vector of id {ids.shown(names[int(at)].as_py())} "
                f"(row {rows[int(at)]:,}) holds NaN or infinity; the training diverged, train again"
            )
        norms[at] = math.hypot(*vector.tolist())  # Only the square is too large.
    # A norm beyond float64 would be infinite, which no SQL literal is.
    norms = np.minimum(norms, np.finfo(np.float64).max)
    return Norms(float(norms.min()), math.fsum(norms), float(norms.max()), int((norms == 0).sum()))


class _CutFn(beam.DoFn):
    def __init__(self, towers: dict[str, Tower]) -> None:
        self._towers = towers

    def setup(self) -> None:
        emulators.connect_if_emulated()

    def process(self, run_id: str) -> Iterator[Any]:
        tower = self._towers[run_id]
        FileSystems.report_source_lineage(tower.matrix.path)
        FileSystems.report_source_lineage(tower.vocabulary.path)
        try:
            if tower.vocabulary.in_row_order:
                for piece in ids.cut(tower, open_file, ids.PIECE_BYTES):
                    yield run_id, piece
            else:
                for entries in ids.cut_entries(tower, open_file, ids.PIECE_ENTRIES):
                    yield TaggedOutput(ENTRIES, (run_id, entries))
        except PipelineError as problem:
            yield TaggedOutput(REPORTS, Report(run_id, tower.name, 0, problem=problem))


class _ReadFn(beam.DoFn):
    """Reads pieces one ahead: while a batch is encoded and written, a second thread reads the next.

    Two batches are in memory at a time, whatever the number of pieces.
    """

    def __init__(self, towers: dict[str, Tower]) -> None:
        self._towers = towers

    def display_data(self) -> dict[str, Any]:
        return _shown(self._towers)

    def setup(self) -> None:
        emulators.connect_if_emulated()
        self._reader = ThreadPoolExecutor(1)

    def start_bundle(self) -> None:
        self._ahead: Future[tuple[Batch | None, Report]] | None = None

    def process(self, element: tuple[Any, Any]) -> Iterator[Any]:
        before, self._ahead = self._ahead, self._reader.submit(self._read, *element)
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

    def _read(self, key: Any, value: Any) -> tuple[Batch | None, Report]:
        run_id, piece, rows_and_ids = self._piece(key, value)
        try:
            return read_piece(run_id, piece, self._towers[run_id], open_file, rows_and_ids)
        except PipelineError as problem:
            return None, Report(run_id, piece.tower, piece.first_row, problem=problem)

    def _piece(self, key: Any, value: Any) -> tuple[str, Piece, tuple[np.ndarray, pa.Array] | None]:
        """Returns what an element says: run id, piece, and the rows and ids that are not where the piece says."""
        return key, value, None

    def _outputs(self, read: tuple[Batch | None, Report]) -> Iterator[Any]:
        batch, report = read
        metrics.count("read-rows", report.rows)
        metrics.count("read-bytes", report.bytes)
        yield TaggedOutput(REPORTS, report)
        if batch is not None:
            yield batch


def _matrix_pieces(run_id: str, towers: dict[str, Tower]) -> Iterator[Any]:
    """Yields ((run id, number), rows and ids) for each piece of a matrix: its special rows' names, as a rule none."""
    tower = towers[run_id]
    rows = tower.matrix.rows_in(ids.PIECE_BYTES)
    named = np.arange(len(tower.vocabulary.special_tokens), dtype=np.int64)
    names = pa.array([token.encode() for token in tower.vocabulary.special_tokens], pa.binary())
    for number in range(-(-tower.matrix.rows // rows)):
        own = slice(number * rows, (number + 1) * rows)
        yield (run_id, number), (named[own], names[own])


class _SortFn(beam.DoFn):
    """Reads entries and emits them by piece of the matrix: ((run id, number of the piece), (rows, ids)).

    An array per entries and piece crosses the shuffle, not an element per id.
    """

    def __init__(self, towers: dict[str, Tower]) -> None:
        self._towers = towers

    def setup(self) -> None:
        emulators.connect_if_emulated()

    def process(self, element: tuple[str, Entries]) -> Iterator[Any]:
        run_id, entries = element
        tower = self._towers[run_id]
        try:
            rows, names = ids.read_entries(entries, tower, open_file)
        except PipelineError as problem:
            yield TaggedOutput(REPORTS, Report(run_id, tower.name, 0, problem=problem))
            return
        order = np.argsort(rows, kind="stable")
        numbers, starts = np.unique(rows[order] // tower.matrix.rows_in(ids.PIECE_BYTES), return_index=True)
        for number, own in zip(numbers.tolist(), np.split(order, starts[1:]), strict=True):
            yield (run_id, number), (rows[own], names.take(pa.array(own)))


class _GatherFn(_ReadFn):
    """Reads a piece of a matrix and takes the vectors of the rows that have ids."""

    def _piece(self, key: Any, value: Any) -> tuple[str, Piece, tuple[np.ndarray, pa.Array] | None]:
        run_id, number = key
        tower = self._towers[run_id]
        rows, names = zip(*value, strict=True)
        most = tower.matrix.rows_in(ids.PIECE_BYTES)
        first = number * most
        piece = Piece(tower.name, first, min(most, tower.matrix.rows - first), None)
        return run_id, piece, (np.concatenate(rows), pa.concat_arrays(names))


@dataclass
class ReadTower(beam.PTransform[PBegin, dict[str, PCollection[Any]]]):
    """Reads a tower of one or more runs: nothing in; batches of rows and reports out, as "batches" and "reports".

    Cutting is one sequential scan of the vocabulary; reading is parallel, a piece at a time. Every row of the matrix
    is read exactly once. Where ids are not in row order, they are first sorted by piece of the matrix, in a shuffle of
    ids and row numbers. What is wrong with a piece is reported, not raised: a retry would not mend it.

    Attributes:
        towers: run id → the tower in that run's model.
    """

    towers: dict[str, Tower]

    def expand(self, pbegin: PBegin) -> Any:
        """Applies the transform."""
        cut = (
            pbegin
            | "Create" >> beam.Create([*self.towers])
            | "Cut" >> beam.ParDo(_CutFn(self.towers)).with_outputs(REPORTS, ENTRIES, main="pieces")
        )
        read = (
            cut.pieces
            | "Spread" >> beam.Reshuffle()
            | "Read" >> beam.ParDo(_ReadFn(self.towers)).with_outputs(REPORTS, main="batches")
        )
        batches, reports = [read.batches], [cut[REPORTS], read[REPORTS]]
        unordered = {run: tower for run, tower in self.towers.items() if not tower.vocabulary.in_row_order}
        if unordered:
            found = (
                cut[ENTRIES]
                | "SpreadEntries" >> beam.Reshuffle()
                | "Sort" >> beam.ParDo(_SortFn(unordered)).with_outputs(REPORTS, main="entries")
            )
            # Rows that no id has are read too: the checksum is that of the whole matrix.
            rows = pbegin | "Unordered" >> beam.Create([*unordered]) | "Rows" >> beam.FlatMap(_matrix_pieces, unordered)
            gathered = (
                (found.entries, rows)
                | "Both" >> beam.Flatten()
                | "Group" >> beam.GroupByKey()
                | "Gather" >> beam.ParDo(_GatherFn(unordered)).with_outputs(REPORTS, main="batches")
            )
            batches.append(gathered.batches)
            reports += [found[REPORTS], gathered[REPORTS]]
        # A Flatten of one would only stand between what is read and what is written.
        together = batches[0] if len(batches) == 1 else batches | "Batches" >> beam.Flatten()
        return {"batches": together, REPORTS: reports | "Reports" >> beam.Flatten()}


def _shown(towers: dict[str, Tower]) -> dict[str, Any]:
    """What Dataflow's page of the job shows; of several runs, the last."""
    run_id, tower = [*towers.items()][-1]
    matrix = tower.matrix
    return {
        "runs": len(towers),
        "run": run_id,
        "tower": tower.name,
        "layer": tower.layer,
        "rows": matrix.rows,
        "dimension": matrix.dimension,
        "dtype": matrix.dtype,
        "vectors": matrix.path,
        "ids": tower.vocabulary.path,
    }


def to_rows(batch: Batch, tower: str, constants: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yields one row per id, as `WriteToBigQuery` takes them; `constants` are the other columns of each run."""
    of_run = constants[batch.run_id]
    for name, vector in zip(batch.ids.to_pylist(), batch.vectors.astype(float).tolist(), strict=True):
        yield {**of_run, f"{tower}_id": name, f"{tower}_embedding": vector}


def tally(reports: Iterable[Report], trainings: Sequence[Training]) -> dict[tuple[str, str], Tally]:
    """Returns (run id, tower) → what was read, once all reports together are the whole of every matrix.

    Raises:
        PipelineError: the first problem of the reports, in row order.
        ChecksumError: the bytes that were read do not match the artifact's checksum.
        AuditError: reports are missing or double.
    """
    ordered = sorted(reports, key=lambda report: (report.run_id, report.tower, report.first_row))
    problems = [report.problem for report in ordered if report.problem]
    if problems:
        more = f" (and {len(problems) - 1:,} more problems)" if len(problems) > 1 else ""
        raise type(problems[0])(f"{problems[0]}{more}")
    by_tower: dict[tuple[str, str], list[Report]] = {}
    for report in ordered:
        by_tower.setdefault((report.run_id, report.tower), []).append(report)
    towers = [(training.run.run_id, tower) for training in trainings for tower in training.towers]
    tallies = {}
    read: dict[tuple[str, Checksum], set[tuple[int, int, int]]] = {}
    for run_id, tower in towers:
        matrix = tower.matrix
        own = by_tower.get((run_id, tower.name), [])
        rows = [report for report in own if report.rows]
        row = 0
        for report in rows:
            if report.first_row != row:
                raise AuditError(f"tower {tower.name!r}: rows {row:,} to {report.first_row:,} were not read once")
            row += report.rows
        if row != matrix.rows:
            raise AuditError(f"tower {tower.name!r}: {row:,} of {matrix.rows:,} rows were read")
        crc = checksums.combine(matrix.checksum.algorithm, ((report.crc, report.bytes) for report in rows))
        # A set: towers that share a matrix read it once each.
        spans = read.setdefault((matrix.path, matrix.checksum), set())
        spans.add((matrix.offset, matrix.size, crc))
        spans.update((report.offset, report.bytes, report.crc) for report in own if not report.rows)
        count = sum(report.ids for report in own)
        norms = [report.norms for report in own if report.norms]
        if not count or not norms:
            raise BadIdError(f"tower {tower.name!r} has no ids: its vocabulary is empty; train it with one")
        tallies[run_id, tower.name] = Tally(
            ids=count,
            bytes=sum(report.bytes for report in own),
            norm_min=min(norm.smallest for norm in norms),
            norm_mean=math.fsum(norm.total / count for norm in norms),
            norm_max=max(norm.largest for norm in norms),
            zero_vectors=sum(norm.zeros for norm in norms),
        )
    _verify(read, [tower for _, tower in towers])
    return tallies


def _verify(read: dict[tuple[str, Checksum], set[tuple[int, int, int]]], towers: Sequence[Tower]) -> None:
    """Compares what was read, as (offset, length, crc) of the spans of a file, with the artifact's checksums."""
    for (path, checksum), spans in read.items():
        names = ", ".join(
            dict.fromkeys(repr(t.name) for t in towers if (t.matrix.path, t.matrix.checksum) == (path, checksum))
        )
        at = checksum.span.start
        for offset, length, _ in sorted(spans):
            if offset > at:
                raise AuditError(f"tower {names}: bytes {at:,} to {offset:,} of {path} were not read")
            at = offset + length
        whole = checksums.combine(checksum.algorithm, ((crc, length) for _, length, crc in sorted(spans)))
        # The length, too: bytes that were read twice, and otherwise each time, would be there twice.
        if sum(length for _, length, _ in spans) != at - checksum.span.start or whole != checksum.value:
            raise ChecksumError(
                f"{path}: the embeddings of tower {names} do not match the checkpoint's {checksum.algorithm}; "
                "the file was damaged after the training: log the model again"
            )
        if at != checksum.span.end:
            raise AuditError(f"tower {names}: bytes {at:,} to {checksum.span.end:,} of {path} were not read")
