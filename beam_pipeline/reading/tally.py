"""What was seen of a tower, piece by piece, and whether all pieces together are the whole of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from beam_pipeline import checksums
from beam_pipeline.errors import AuditError, BadIdError, ChecksumError, PipelineError
from beam_pipeline.formats.model import Checksum, Tower
from beam_pipeline.training import Training


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
        first_row, rows: rows of the matrix that were read; 0 rows if none could be. The first is None for computed
            vectors, which are in no order: they are only counted.
        ids: how many of them belong to ids.
        offset, bytes: where in the matrix's file they are, and how many bytes.
        crc: checksum of these bytes, by the algorithm of the matrix's; 0 if it has none.
        norms: Euclidean norms of the ids' vectors; None without ids.
        announced: of a computed tower, rows that the source of its ids says it has.
        problem: what is wrong, if anything is.
    """

    run_id: str
    tower: str
    first_row: int | None
    rows: int = 0
    ids: int = 0
    offset: int = 0
    bytes: int = 0
    crc: int = 0
    norms: Norms | None = None
    announced: int = 0
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


def tally(reports: Iterable[Report], trainings: Sequence[Training]) -> dict[tuple[str, str], Tally]:
    """Returns (run id, tower) → what was read, once all reports together are the whole of every matrix.

    Raises:
        PipelineError: the first problem of the reports, in row order.
        ChecksumError: the bytes that were read do not match the artifact's checksum.
        AuditError: reports are missing or duplicated.
    """
    ordered = sorted(reports, key=lambda report: (report.run_id, report.tower, report.first_row or 0))
    problems = [report.problem for report in ordered if report.problem]
    if problems:
        others = len(problems) - 1
        more = f" (and {others:,} more problem{'s' if others > 1 else ''})" if others else ""
        raise type(problems[0])(f"{problems[0]}{more}")
    by_tower: dict[tuple[str, str], list[Report]] = {}
    for report in ordered:
        by_tower.setdefault((report.run_id, report.tower), []).append(report)
    towers = [(training.run.run_id, tower) for training in trainings for tower in training.towers.values()]
    tallies = {}
    read: dict[tuple[str, Checksum], set[tuple[int, int, int]]] = {}
    for run_id, tower in towers:
        matrix = tower.matrix
        of_tower = by_tower.get((run_id, tower.name), [])
        rows = [report for report in of_tower if report.rows]
        row = 0
        for report in rows:
            if report.first_row is not None and report.first_row != row:
                raise AuditError(f"tower {tower.name!r}: rows {row:,} to {report.first_row:,} were not read once")
            row += report.rows
        expected = sum(report.announced for report in of_tower) if tower.is_computed else matrix.rows
        if row != expected:
            raise AuditError(f"tower {tower.name!r}: {row:,} of {expected:,} rows were read")
        if matrix.checksum:
            crc = checksums.combine(matrix.checksum.algorithm, ((report.crc, report.bytes) for report in rows))
            # A set: towers that share a matrix read it once each.
            spans = read.setdefault((matrix.path, matrix.checksum), set())
            spans.add((matrix.offset, matrix.size, crc))
            spans.update((report.offset, report.bytes, report.crc) for report in of_tower if not report.rows)
        count = sum(report.ids for report in of_tower)
        norms = [report.norms for report in of_tower if report.norms]
        if not norms:
            its = "its vocabulary is empty; train it with one"
            empty = f"{tower.ids_place} is empty" if tower.has_ids_beside_it else its
            raise BadIdError(f"tower {tower.name!r} has no ids: {empty}")
        tallies[run_id, tower.name] = Tally(
            ids=count,
            bytes=sum(report.bytes for report in of_tower),
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
