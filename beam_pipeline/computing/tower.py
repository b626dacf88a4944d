"""A tower whose vectors are computed, what was seen of it, and whether that is the whole of it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from google.cloud import bigquery

from beam_pipeline.computing import is_query, model
from beam_pipeline.computing.columns import Columns, bind, id_column, of_ids
from beam_pipeline.computing.signature import Signature
from beam_pipeline.computing.sources import Query, Source, Vocabulary, find_files
from beam_pipeline.errors import (
    AuditError,
    BadIdError,
    BadVectorError,
    FeaturesError,
    PipelineError,
    TowerMissingError,
    UnsupportedModelError,
)
from beam_pipeline.formats import model as formats
from beam_pipeline.formats.model import Artifact, Encoding, Ending, Matrix, Tail, Tower
from beam_pipeline.formats.protobuf import Span
from beam_pipeline.reading.tally import Norms, Tally


@dataclass(frozen=True, kw_only=True)
class ComputedTower(Tower):
    """A tower whose vectors are what a part of the model returns.

    Its matrix lies in no file: it has a dimension, and as many rows as the source of the ids turns out to have.

    Attributes:
        model_path: the SavedModel's folder, or the `.keras` file.
        signature: what the part of the model takes and returns; `layer` is its path.
        columns: which column is which input.
        source: where ids and features come from.
    """

    model_path: str
    signature: Signature
    columns: Columns
    source: Source

    @property
    def vector_source(self) -> str:
        """What the published vectors are, for the log."""
        return "computed"


def computed_tower(
    name: str,
    layer: str,
    model_path: str,
    artifact: Artifact,
    features: str | None,
    client: bigquery.Client | None = None,
    project: str = "",
) -> ComputedTower:
    """Returns a tower to be computed, its features checked against what the model takes.

    The model is loaded: nothing but TensorFlow knows what all its parts take, and a model that cannot be loaded here
    cannot be loaded on a worker.

    Args:
        name: of the tower.
        layer: the part of the model that computes it.
        model_path: the model.
        artifact: the same, as data, for the ids of its lookup.
        features: --features of this tower: a query or a pattern; None for the ids of its lookup.
        client: runs a query's dry run; None if there is no session, and then the features are not looked at.
        project: reads its result, and is billed.

    Raises:
        TowerMissingError: there is no such part, or it returns no vector.
        FeaturesError: the features are not what it takes, or it takes features and there are none.
    """
    signature = model.loaded(model_path).part(name, layer).signature
    source: Source
    if features is None:
        columns = of_ids(name, signature)
        try:
            source = Vocabulary(artifact.tower(name, layer))
        except (TowerMissingError, UnsupportedModelError) as error:
            raise FeaturesError(
                f"{error}; to compute tower {name!r}, its ids can also be given: --features {name}='SELECT "
                f"{id_column(name)} FROM …'"
            ) from error
    elif is_query(features):
        query = Query(features, project)
        source = query
        columns = bind(name, signature, query.schema(client, name), str(query)) if client else Columns(name, "", (), ())
    else:
        files = find_files(features, name)
        source = files
        columns = bind(name, signature, files.schema(), str(files))
    ids = source.tower.vocabulary if isinstance(source, Vocabulary) else _NO_VOCABULARY
    return ComputedTower(
        name,
        layer,
        Matrix(model_path, 0, 0, signature.dimension, "float32", None),
        ids,
        tail=Tail(Ending.COMPUTED),
        model_path=model_path,
        signature=signature,
        columns=columns,
        source=source,
    )


_NO_VOCABULARY = formats.Vocabulary("", Span(0, 0), Encoding.LINES, 0)


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
