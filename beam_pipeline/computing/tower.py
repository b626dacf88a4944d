"""A tower whose vectors are computed, what was seen of it, and whether that is the whole of it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from beam_pipeline.computing.columns import Columns
from beam_pipeline.computing.signature import Signature
from beam_pipeline.computing.sources import Source
from beam_pipeline.errors import AuditError, BadIdError, BadVectorError, PipelineError
from beam_pipeline.reading.tally import Norms, Tally


@dataclass(frozen=True)
class ComputedTower:
    """A tower whose vectors are what a part of the model returns.

    Attributes:
        name: "user", "item" or as given with `--tower`.
        layer: the part of the model.
        model_path: the SavedModel's folder, or the `.keras` file.
        signature: what the part takes and returns.
        columns: which column is which input.
        source: where ids and features come from.
    """

    name: str
    layer: str
    model_path: str
    signature: Signature
    columns: Columns
    source: Source

    @property
    def dimension(self) -> int:
        """Values in a vector."""
        return self.signature.dimension

    @property
    def vector_source(self) -> str:
        """What the published vectors are, for the log."""
        return "computed"


@dataclass(frozen=True)
class Seen:
    """What was seen of some of a tower's rows.

    Attributes:
        run_id: the run.
        tower: name of the tower.
        expected: rows that the source says there are.
        ids: rows that were computed.
        bytes: of their vectors.
        norms: Euclidean norms of these.
        problem: what is wrong, if anything is.
    """

    run_id: str
    tower: str
    expected: int = 0
    ids: int = 0
    bytes: int = 0
    norms: Norms | None = None
    problem: PipelineError | None = None


def checked_norms(vectors: np.ndarray, ids: pa.Array, tower: str) -> Norms:
    """Returns the norms of vectors.

    Raises:
        BadVectorError: one holds NaN or infinity; named by its id.
    """
    wide = vectors.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        norms = np.sqrt(np.einsum("ij,ij->i", wide, wide))
    for at in np.flatnonzero(~np.isfinite(norms)):
        if not np.isfinite(wide[at]).all():
            raise BadVectorError(
                f"tower {tower!r}: the vector of id {ids[int(at)].as_py()!r} was computed as NaN or infinity; check "
                "its features, or train again"
            )
        norms[at] = math.hypot(*wide[at].tolist())  # Only the square is too large.
    norms = np.minimum(norms, np.finfo(np.float64).max)  # A norm beyond float64 would be no SQL literal.
    return Norms(float(norms.min()), math.fsum(norms), float(norms.max()), int((norms == 0).sum()))


def tally(seen: Iterable[Seen], towers: Iterable[tuple[str, ComputedTower]]) -> dict[tuple[str, str], Tally]:
    """Returns (run id, tower) → what was computed, once that is all that the sources hold.

    Args:
        seen: of all towers.
        towers: run id and tower of each.

    Raises:
        PipelineError: a problem that was seen.
        BadIdError: there are no ids.
        AuditError: rows are missing or too many.
    """
    found: dict[tuple[str, str], list[Seen]] = {}
    problems = []
    for each in seen:
        found.setdefault((each.run_id, each.tower), []).append(each)
        if each.problem:
            problems.append(each.problem)
    if problems:
        first = min(problems, key=str)  # the same one at each attempt
        more = f" (and {len(problems) - 1:,} more problems)" if len(problems) > 1 else ""
        raise type(first)(f"{first}{more}")
    tallies = {}
    for run_id, tower in towers:
        own = found.get((run_id, tower.name), [])
        expected, ids = sum(each.expected for each in own), sum(each.ids for each in own)
        if ids != expected:
            raise AuditError(
                f"tower {tower.name!r} of run {run_id}: {ids:,} of {expected:,} ids were computed; nothing was "
                "published: start the job again"
            )
        norms = [each.norms for each in own if each.norms]
        if not norms:
            raise BadIdError(f"tower {tower.name!r} has no ids: {tower.source} is empty")
        tallies[run_id, tower.name] = Tally(
            ids=ids,
            bytes=sum(each.bytes for each in own),
            norm_min=min(norm.smallest for norm in norms),
            norm_mean=math.fsum(norm.total / ids for norm in norms),
            norm_max=max(norm.largest for norm in norms),
            zero_vectors=sum(norm.zeros for norm in norms),
        )
    return tallies
