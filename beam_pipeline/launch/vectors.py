"""Whether the vectors of the chosen towers are those that the model serves, and can be compared with each other."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING

from beam_pipeline.computing.tower import ComputedTower
from beam_pipeline.errors import BadVectorError, PipelineError, VectorNotServedError
from beam_pipeline.files import open_file
from beam_pipeline.formats.model import Ending, Tail, Tower, VectorTable
from beam_pipeline.launch.options import DEFAULT_TOWERS
from beam_pipeline.reading import pieces
from beam_pipeline.training import Training

if TYPE_CHECKING:
    from beam_pipeline.bigquery.publication import Publication
    from beam_pipeline.launch.findings import Findings


def examine(findings: Findings, publication: Publication, *, embedding_rows: bool, discovered: bool) -> None:
    """Adds to the report what a person should know about the vectors.

    Args:
        findings: the report.
        publication: what is to be published.
        embedding_rows: publish the rows of an embedding although its tower continues after it.
        discovered: nobody named the towers' layers.
    """
    seen: dict[tuple[str, str, Tail], list[Training]] = {}
    for training in publication.trainings:
        for tower in training.towers.values():
            if tower.is_computed:
                continue
            seen.setdefault((tower.name, tower.layer, tower.tail), []).append(training)
    for (name, layer, tail), trainings in seen.items():
        where = _of_runs(trainings) if len(publication.trainings) > 1 else ""
        _examine_tail(findings, name, layer, tail, where, embedding_rows)
    for tower in publication.trainings[-1].towers.values():
        if isinstance(tower, ComputedTower):
            features = tower.has_ids_beside_it
            findings.note(
                f"vectors {tower.name}",
                f"computed on the workers by {tower.layer} ({tower.signature}), ids from {tower.ids_from}: code of the "
                f"artifact runs there ({tower.computed_by}), and the vectors have no checksum"
                + ("; an id that the model does not know gets its vector of unknown ids" if features else ""),
            )
            continue
        _examine_checksum(findings, tower)
    for training in publication.trainings:
        for one, other in combinations(training.towers.values(), 2):
            if problem := _mismatch(one, other):
                where = _of_runs([training]) if len(publication.trainings) > 1 else ""
                _add_mismatch(findings, one, other, problem + where, discovered)


def describe(tail: Tail) -> str:
    """Returns how a tower continues after its embedding, in a few words."""
    if tail.ending == Ending.EMBEDDING:
        text = "ends at the embedding"
    elif tail.ending == Ending.SCALED:
        text = f"scales the rows: {tail.steps}"
    elif tail.ending == Ending.GOES_ON:
        text = f"continues after the embedding: {tail.steps}"
    else:
        text = "unknown"
    meeting = f"; meets the other tower in {tail.meeting}" if tail.meeting else ""
    return text + meeting + (f" ({tail.reason})" if tail.reason else "")


def not_served(name: str, layer: str, tail: Tail, remedies: str) -> VectorNotServedError:
    """Returns the error for a tower whose rows are not the vectors that the model serves.

    Args:
        name: of the tower.
        layer: that holds its embedding.
        tail: how it continues after that.
        remedies: what can be done, as a sentence without its full stop.
    """
    because = f"; {tail.reason}" if tail.reason else ""
    return VectorNotServedError(
        f"tower {name!r}: the model continues after the embedding of {layer!r}: {tail.steps}{because}; the rows of the "
        f"embedding are not the vectors that it serves. {remedies}"
    )


def _examine_tail(findings: Findings, name: str, layer: str, tail: Tail, where: str, embedding_rows: bool) -> None:
    check = f"vectors {name}"
    if tail.ending == Ending.LOGGED:
        findings.ok(check, f"{layer}, logged by the trainer: whether the model serves them is not checked{where}")
    elif tail.ending == Ending.GOES_ON:
        because = f"; {tail.reason}" if tail.reason else ""
        if embedding_rows:
            findings.note(
                check,
                f"rows of the embedding, which the model does not serve: {layer} continues with {tail.steps}{because} "
                f"(--embedding_rows){where}",
            )
        else:
            remedies = (
                f"Compute them with --compute={name}, pack the tower's outputs into a lookup and an embedding before "
                f"the model is saved, or publish the rows all the same with --embedding_rows{where}"
            )
            findings.stop(check, not_served(name, layer, tail, remedies))
    elif tail.ending == Ending.SCALED:
        because = f"; {tail.reason}" if tail.reason else ""
        findings.note(
            check,
            f"the model scales the rows ({tail.steps}): they are right under COSINE, not under DOT_PRODUCT or "
            f"EUCLIDEAN{because}{where}",
        )
    elif tail.ending == Ending.UNKNOWN:
        findings.note(
            check, f"it is unknown whether {layer} continues after its embedding: {tail.reason or 'no call'}{where}"
        )
    if tail.meeting:
        findings.note(
            check,
            f"the towers meet in {tail.meeting}, not in a dot product or a cosine: the vectors are the model's "
            f"embeddings, but how near they are is not its score{where}",
        )
    elif tail.is_biased:
        findings.note(check, f"the model adds a bias of each id to the dot product, which the vectors lack{where}")


def _examine_checksum(findings: Findings, tower: Tower) -> None:
    if isinstance(tower.matrix, VectorTable):
        findings.note(
            f"checksum {tower.name}",
            f"pages of {tower.matrix.path} are verified where they have one (write_page_checksum=True writes them); "
            "all rows are counted",
        )
    elif tower.matrix.checksum is None:
        findings.note(
            f"checksum {tower.name}",
            f"{tower.matrix.path} has none: its {tower.matrix.size:,} bytes are counted, damage would not be noticed",
        )


def _mismatch(one: Tower, other: Tower) -> str:
    if one.matrix.dimension != other.matrix.dimension:
        return f"vectors of {one.matrix.dimension} and of {other.matrix.dimension} values"
    if one.is_computed or other.is_computed:
        return ""
    try:
        return "the same ids" if pieces.are_same(one, other, open_file) else ""
    except PipelineError:  # Damaged ids: the job itself names what is wrong with them.
        return ""


def _add_mismatch(findings: Findings, one: Tower, other: Tower, problem: str, discovered: bool) -> None:
    check, text = "towers", f"{one.name} and {other.name} have {problem}"
    if one.source == other.source == "file" and one.matrix.dimension != other.matrix.dimension:
        findings.stop(
            check,
            BadVectorError(
                f"{text}: {one.layer} and {other.layer} cannot be searched against each other; log what the towers "
                "return, or publish one of them in a launch of its own, if it is meant to be searched alone"
            ),
        )
        return
    # The default layers are as good as named; others were found by what their names say.
    if discovered and {one.layer, other.layer} != {*DEFAULT_TOWERS.values()}:
        findings.stop(
            check,
            VectorNotServedError(
                f"{text}: {one.layer!r} and {other.layer!r}, which nobody named, cannot be searched against each "
                f"other; if they are the towers, name them: --tower={one.name}={one.layer} "
                f"--tower={other.name}={other.layer}"
            ),
        )
    else:
        findings.note(check, f"{text}: they cannot be searched against each other")


def _of_runs(trainings: list[Training]) -> str:
    more = f" and {len(trainings) - 1:,} more" if len(trainings) > 1 else ""
    return f" (run {trainings[0].run.run_id}{more})"
