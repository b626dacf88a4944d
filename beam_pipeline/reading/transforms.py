"""The transforms: runs in, pieces, rows and reports out. Wiring only: what is read, and how, is elsewhere."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
from apache_beam.io.filesystems import FileSystems
from apache_beam.pvalue import PBegin, PCollection, TaggedOutput

from beam_pipeline import emulators, metrics
from beam_pipeline.errors import PipelineError
from beam_pipeline.files import open_file
from beam_pipeline.formats.model import RowGroup, Tower, VectorTable
from beam_pipeline.reading import pieces, rows, unordered
from beam_pipeline.reading.pieces import Piece
from beam_pipeline.reading.rows import Batch, Element
from beam_pipeline.reading.tally import Report
from beam_pipeline.reading.unordered import Entries

PIECES, ENTRIES, GROUPS, ROWS, REPORTS = "pieces", "entries", "groups", "rows", "reports"


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
            if isinstance(tower.matrix, VectorTable):
                first_row = 0
                for group in tower.matrix.groups:
                    if group.rows:
                        yield TaggedOutput(GROUPS, (run_id, (group, first_row)))
                    first_row += group.rows
            elif tower.vocabulary.in_row_order:
                for piece in pieces.cut(tower, open_file, pieces.PIECE_BYTES):
                    yield run_id, piece
            else:
                for entries in unordered.cut_entries(tower, open_file, unordered.PIECE_ENTRIES):
                    yield TaggedOutput(ENTRIES, (run_id, entries))
                for piece in pieces.cut_rest(tower, pieces.PIECE_BYTES):
                    yield run_id, piece
        except PipelineError as problem:
            yield TaggedOutput(REPORTS, Report(run_id, tower.name, 0, problem=problem))


class _GroupFn(beam.DoFn):
    """Reads row groups of Parquet files: batches of vectors, which whatever they are fused to takes one at a time."""

    def __init__(self, towers: dict[str, Tower]) -> None:
        self._towers = towers

    def setup(self) -> None:
        emulators.connect_if_emulated()

    def process(self, element: tuple[str, tuple[RowGroup, int]]) -> Iterator[Any]:
        run_id, (group, first_row) = element
        tower = self._towers[run_id]
        try:
            yield from rows.read_group(run_id, group, first_row, tower, open_file)
        except PipelineError as problem:
            yield TaggedOutput(REPORTS, Report(run_id, tower.name, first_row, problem=problem))


def _matrix_pieces(run_id: str, towers: dict[str, Tower]) -> Iterator[Any]:
    """Yields ((run id, number), rows and ids) for each piece of a matrix: its special rows' names, as a rule none."""
    tower = towers[run_id]
    step = tower.matrix.rows_in(pieces.PIECE_BYTES)
    named = np.arange(len(tower.vocabulary.special_tokens), dtype=np.int64)
    names = pa.array([token.encode() for token in tower.vocabulary.special_tokens], pa.binary())
    for number in range(-(-tower.matrix.rows // step)):
        of_piece = slice(number * step, (number + 1) * step)
        yield (run_id, number), (named[of_piece], names[of_piece])


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
            numbers, names = unordered.read_entries(entries, tower, open_file)
        except PipelineError as problem:
            yield TaggedOutput(REPORTS, Report(run_id, tower.name, 0, problem=problem))
            return
        order = np.argsort(numbers, kind="stable")
        parts, starts = np.unique(numbers[order] // tower.matrix.rows_in(pieces.PIECE_BYTES), return_index=True)
        for part, entries_of_part in zip(parts.tolist(), np.split(order, starts[1:]), strict=True):
            yield (run_id, part), (numbers[entries_of_part], names.take(pa.array(entries_of_part)))


def _sorted_piece(element: tuple[tuple[str, int], Iterable[Any]], towers: dict[str, Tower]) -> tuple[str, Piece]:
    """Returns a piece of a matrix with its ids and their rows, from arrays of them: one of each share of entries."""
    (run_id, number), arrays = element
    tower = towers[run_id]
    numbers, names = zip(*arrays, strict=True)
    most = tower.matrix.rows_in(pieces.PIECE_BYTES)
    first = number * most
    count = min(most, tower.matrix.rows - first)
    return run_id, Piece(
        tower.name, first, count, None, rows_and_ids=(np.concatenate(numbers), pa.concat_arrays(names))
    )


@dataclass
class CutTower(beam.PTransform[PBegin, dict[str, PCollection[Any]]]):
    """Cuts a tower of one or more runs into pieces: nothing in; `Element` and reports out.

    They are "pieces" and "reports" of what is returned. Cutting is one sequential scan of the vocabulary; a piece is
    then read wherever it lands, by whatever takes it. Every row of the matrix is in exactly one piece. Where ids are
    not in row order, they are first sorted by piece of the matrix, in a shuffle of ids and row numbers. What is wrong
    with a vocabulary is reported, not raised: a retry would not fix it. Of Parquet files a row group is the piece, and
    comes out as batches of its rows.

    Attributes:
        towers: run id → the tower in that run's model.
    """

    towers: dict[str, Tower]

    def expand(self, pbegin: PBegin) -> Any:
        """Applies the transform."""
        cut = (
            pbegin
            | "Create" >> beam.Create([*self.towers])
            | "Cut" >> beam.ParDo(_CutFn(self.towers)).with_outputs(REPORTS, ENTRIES, GROUPS, main="pieces")
        )
        # Without a Reshuffle, fusion would read every piece on the worker that cut it, one after the other.
        spread: Any = cut.pieces | "Spread" >> beam.Reshuffle()
        reports = cut[REPORTS]
        if any(isinstance(tower.matrix, VectorTable) for tower in self.towers.values()):
            batches = (
                cut[GROUPS]
                | "SpreadGroups" >> beam.Reshuffle()
                | "ReadGroups" >> beam.ParDo(_GroupFn(self.towers)).with_outputs(REPORTS, main="batches")
            )
            spread = (spread, batches.batches) | "PiecesAndBatches" >> beam.Flatten()
            reports = (reports, batches[REPORTS]) | "ReportsOfGroups" >> beam.Flatten()
        not_in_order = {run: tower for run, tower in self.towers.items() if not tower.vocabulary.in_row_order}
        if not not_in_order:
            # A Flatten of one would only stand between what is cut and what is read.
            return {PIECES: spread, REPORTS: reports}
        found = (
            cut[ENTRIES]
            | "SpreadEntries" >> beam.Reshuffle()
            | "Sort" >> beam.ParDo(_SortFn(not_in_order)).with_outputs(REPORTS, main="entries")
        )
        # Rows that no id has are read too: the checksum is that of the whole matrix.
        special = (
            pbegin
            | "CreateUnordered" >> beam.Create([*not_in_order])
            | "SpecialRows" >> beam.FlatMap(_matrix_pieces, not_in_order)
        )
        ordered = (
            (found.entries, special)
            | "EntriesAndSpecialRows" >> beam.Flatten()
            | "GroupByPiece" >> beam.GroupByKey()
            | "JoinEntries" >> beam.Map(_sorted_piece, not_in_order)
        )
        return {
            PIECES: (spread, ordered) | "Pieces" >> beam.Flatten(),
            REPORTS: (reports, found[REPORTS]) | "Reports" >> beam.Flatten(),
        }


class _ReadFn(beam.DoFn):
    """Reads elements into rows."""

    def __init__(
        self, towers: dict[str, Tower], split: Callable[[Batch], Iterable[Any]], displayed: dict[str, Any]
    ) -> None:
        self._towers = towers
        self._split = split
        self._displayed = displayed

    def display_data(self) -> dict[str, Any]:
        return {**display_data(self._towers), **self._displayed}

    def setup(self) -> None:
        emulators.connect_if_emulated()

    def process(self, element: Any) -> Iterator[Any]:
        batch, report = rows.read(element, self._towers, open_file)
        count_read(report)
        yield TaggedOutput(REPORTS, report)
        if batch is not None:
            yield from self._split(batch)


@dataclass
class ReadRows(beam.PTransform[PCollection[Element], dict[str, PCollection[Any]]]):
    """Reads pieces (or takes computed vectors) row by row: `Element` in; rows and reports out, as "rows" and "reports".

    It reads in parallel, an element at a time, and nothing between its input and its output keeps a vector.

    Attributes:
        towers: run id → the tower in that run's model.
        split: yields the rows of a batch.
        displayed: further display data.
    """

    towers: dict[str, Tower]
    split: Callable[[Batch], Iterable[Any]]
    displayed: dict[str, Any] = field(default_factory=dict)

    def expand(self, elements: PCollection[Element]) -> Any:
        """Applies the transform."""
        read = elements | "Read" >> beam.ParDo(_ReadFn(self.towers, self.split, self.displayed)).with_outputs(
            REPORTS, main="rows"
        )
        return {ROWS: read.rows, REPORTS: read[REPORTS]}


def count_read(report: Report) -> None:
    """Counts what was read of a piece."""
    metrics.count("read-rows", report.rows)
    metrics.count("read-bytes", report.bytes)


def display_data(towers: dict[str, Tower]) -> dict[str, Any]:
    """Returns what Dataflow's page of the job shows; of several runs, the last."""
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
