"""The transforms: runs in, batches of rows and reports out. Wiring only: what is read, and how, is elsewhere."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
from apache_beam.io.filesystems import FileSystems
from apache_beam.pvalue import PBegin, PCollection, TaggedOutput
from apache_beam.transforms.window import GlobalWindows

from beam_pipeline import emulators, metrics
from beam_pipeline.errors import PipelineError
from beam_pipeline.files import open_file
from beam_pipeline.formats.model import Tower
from beam_pipeline.reading import pieces, unordered
from beam_pipeline.reading.pieces import Piece
from beam_pipeline.reading.rows import Batch, read_piece
from beam_pipeline.reading.tally import Report
from beam_pipeline.reading.unordered import Entries

REPORTS, ENTRIES = "reports", "entries"


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
                for piece in pieces.cut(tower, open_file, pieces.PIECE_BYTES):
                    yield run_id, piece
            else:
                for entries in unordered.cut_entries(tower, open_file, unordered.PIECE_ENTRIES):
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
    rows = tower.matrix.rows_in(pieces.PIECE_BYTES)
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
            rows, names = unordered.read_entries(entries, tower, open_file)
        except PipelineError as problem:
            yield TaggedOutput(REPORTS, Report(run_id, tower.name, 0, problem=problem))
            return
        order = np.argsort(rows, kind="stable")
        numbers, starts = np.unique(rows[order] // tower.matrix.rows_in(pieces.PIECE_BYTES), return_index=True)
        for number, own in zip(numbers.tolist(), np.split(order, starts[1:]), strict=True):
            yield (run_id, number), (rows[own], names.take(pa.array(own)))


class _GatherFn(_ReadFn):
    """Reads a piece of a matrix and takes the vectors of the rows that have ids."""

    def _piece(self, key: Any, value: Any) -> tuple[str, Piece, tuple[np.ndarray, pa.Array] | None]:
        run_id, number = key
        tower = self._towers[run_id]
        rows, names = zip(*value, strict=True)
        most = tower.matrix.rows_in(pieces.PIECE_BYTES)
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
        not_in_order = {run: tower for run, tower in self.towers.items() if not tower.vocabulary.in_row_order}
        if not_in_order:
            found = (
                cut[ENTRIES]
                | "SpreadEntries" >> beam.Reshuffle()
                | "Sort" >> beam.ParDo(_SortFn(not_in_order)).with_outputs(REPORTS, main="entries")
            )
            # Rows that no id has are read too: the checksum is that of the whole matrix.
            rows = (
                pbegin
                | "Unordered" >> beam.Create([*not_in_order])
                | "Rows" >> beam.FlatMap(_matrix_pieces, not_in_order)
            )
            gathered = (
                (found.entries, rows)
                | "Both" >> beam.Flatten()
                | "Group" >> beam.GroupByKey()
                | "Gather" >> beam.ParDo(_GatherFn(not_in_order)).with_outputs(REPORTS, main="batches")
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
