"""What each step of a comparison does in BigQuery and in the bucket; each can be done again, anywhere, at any time.

A launch has an id that was materialised before anything uses it: names of staging tables, of files and of BigQuery's
jobs carry it, and a job that is there already is waited for, not repeated. Files have names of their own for each
attempt: those of a failed one are not passed on. Readers see the result tables alone, and those change in one
transaction per pair.
"""

from __future__ import annotations

import io
import json
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from apache_beam.io.filesystem import CompressionTypes
from apache_beam.io.filesystems import FileSystems
from apache_beam.metrics.metric import Lineage
from apache_beam.pvalue import TaggedOutput
from google.api_core.exceptions import NotFound
from google.cloud import bigquery
from google.cloud.bigquery_storage_v1 import BigQueryReadClient

from beam_pipeline import __version__, metrics, publication
from beam_pipeline.comparison import measures, reading, tables
from beam_pipeline.comparison.measures import Distribution, Fit, Mover, Nearest, Rows, ScoreMoments, Totals
from beam_pipeline.comparison.results import Percentile, percentiles, previous, require_usual
from beam_pipeline.comparison.tables import Pair
from beam_pipeline.errors import AuditError, BadVectorError, IncompatibleTableError
from beam_pipeline.publication import LABELS, STAGING_LIFE
from beam_pipeline.tables import PARTITION_COLUMN, Destination

JOB_NAME = "compare"
"""First part of the name of a job that was not given one."""

READ_ROWS = "compare-rows"
"""Counter of ids that were measured."""

FILES, FACTS = "files", "facts"
"""Tags of outputs beside the main one."""

SAMPLE_IDS = 100_000
"""Ids of a tower on which rotation and moments are fitted, at most."""

_SAMPLE_VALUES = 1 << 24  # of all their vectors of one training, so that many dimensions take no more memory

MOVER_NEIGHBOURS = 5
"""Nearest items before and after that are kept of an id that moved far."""

_MOST_FILES = 10_000  # of one load job


@dataclass(frozen=True)
class Comparison:
    """What is compared, and where the results go.

    Attributes:
        destination: the tables.
        pairs: oldest first.
        users: the tower whose ids are recommended to; None if there is none.
        items: the tower whose ids are recommended; None if there is none.
        temp_location: `gs://` folder for files.
        token: part of every launch id of this pipeline; the launcher finds by it what a failed launch has left.
        job_name: of the Beam job, for the results.
        ids: towers of which a row per id is published.
        k: neighbours and recommendations that are compared.
        queries: ids that are sampled for them.
        top: ids that moved farthest and are kept.
        cosine: scores are cosines, not dot products.
        labels: queries for (id, label, group_name), by tower.
        require_partition_filter: for tables that are created: queries must name a partition.
        kms_key: Cloud KMS key of every table and job; None leaves it to the dataset.
        fail_if_unusual: the job fails after it has published, if a pair is unusual.
    """

    destination: Destination
    pairs: tuple[Pair, ...]
    users: str | None
    items: str | None
    temp_location: str
    token: str
    job_name: str = JOB_NAME
    ids: tuple[str, ...] = ()
    k: int = 10
    queries: int = 2000
    top: int = 25
    cosine: bool = False
    labels: Mapping[str, str] = field(default_factory=dict)
    require_partition_filter: bool = False
    kms_key: str | None = None
    fail_if_unusual: bool = False

    @property
    def towers(self) -> tuple[str, ...]:
        """Names of the towers."""
        return tuple(tower for tower in (self.users, self.items) if tower)

    def other(self, tower: str) -> str | None:
        """Returns the other tower, if there is one."""
        return next((name for name in self.towers if name != tower), None)

    @property
    def encryption(self) -> bigquery.EncryptionConfiguration | None:
        """For every table that is created and every job that keeps a result."""
        return bigquery.EncryptionConfiguration(self.kms_key) if self.kms_key else None

    @property
    def bucket(self) -> str:
        """Name of the temp location's bucket."""
        return self.temp_location.removeprefix("gs://").split("/")[0]

    @property
    def all_files(self) -> str:
        """Folder for the files of every comparison with this temp location."""
        return f"{self.temp_location.rstrip('/')}/embedding_comparisons"

    @property
    def files(self) -> str:
        """Folder for the files of this pipeline."""
        return f"{self.all_files}/{self.token}"

    def new_file(self, launch: str, name: str) -> str:
        """Returns a path that nobody else writes to, not even a retry."""
        return f"{self.files}/{launch}/{uuid.uuid4().hex}_{name}"


# Staging and the join.


def prepare(client: bigquery.Client, comparison: Comparison, launch: str) -> Iterator[str]:
    """Creates the launch's staging tables, which expire by themselves; yields the launch."""
    destination = comparison.destination
    wanted = {tables.staged_comparison(destination, launch): tables.STAGED_COMPARISON_SCHEMA}
    for tower in comparison.ids:
        wanted[tables.staged_change(destination, tower, launch)] = tables.staged_change_schema(tower)
    for name, schema in wanted.items():
        table = bigquery.Table(name, schema=schema)
        table.labels = LABELS
        table.encryption_configuration = comparison.encryption
        # Never the dataset's default, which may be shorter than a job or longer than anybody wants to pay for.
        table.expires = datetime.now(UTC) + STAGING_LIFE
        client.create_table(table, exists_ok=True)
    yield launch


@dataclass(frozen=True)
class Joined:
    """A tower's ids of both trainings, in a staging table.

    Attributes:
        launch: whose table it is.
        pair: number of the pair.
        tower: the tower.
        table: `project.dataset.table`.
        rows: ids.
        common, before, after: ids in both trainings, and in each.
        dimension_before, dimension_after: values in a vector.
    """

    launch: str
    pair: int
    tower: str
    table: str
    rows: int
    common: int
    before: int
    after: int
    dimension_before: int
    dimension_after: int


def join(client: bigquery.Client, comparison: Comparison, work: tuple[str, int, str]) -> Iterator[tuple[int, Joined]]:
    """Joins a tower's partitions of a pair by id, in BigQuery; (launch, pair, tower) in, (pair, Joined) out.

    Raises:
        AuditError: the tables do not hold what they held when the job was launched.
        BadVectorError: vectors of one training have different lengths.
    """
    launch, number, tower = work
    destination, pair = comparison.destination, comparison.pairs[number]
    name = tables.joined_table(destination, tower, launch, number)
    script = tables.create_joined_sql(
        name,
        tables.join_sql(destination, tower, pair, comparison.labels.get(tower)),
        datetime.now(UTC) + STAGING_LIFE,
        comparison.kms_key,
        LABELS,
    )
    publication.run_script(
        client, f"compare_embeddings_{launch}_join_{number}_{tower}", script, f"the comparison of {pair}"
    )
    (counts,) = _query(client, comparison, tables.joined_sql(name))
    rows, ids, common, before, after, shortest, longest, later_shortest, later_longest = counts
    for trained, found in ((pair.before, before), (pair.after, after)):
        if found != trained.rows[tower]:
            raise AuditError(
                f"tower {tower!r}: {found:,} rows of run {trained.run_id} in partition {trained.train_date} where "
                f"there were {trained.rows[tower]:,}; it was published again or replaced meanwhile: start the job again"
            )
    if rows != ids:
        raise AuditError(
            f"tower {tower!r}: {rows - ids:,} ids are there more than once in {pair}, or have several labels; an id "
            "has one embedding and one label"
        )
    if shortest != longest or later_shortest != later_longest:
        raise BadVectorError(f"tower {tower!r}: vectors of different lengths within one training of {pair}")
    yield number, Joined(launch, number, tower, name, rows, common, before, after, shortest, later_shortest)


# The fit.


@dataclass(frozen=True)
class Facts:
    """What is known of a pair before its ids are measured.

    Attributes:
        joined: by tower.
        fit_path: file of the `Fit`.
        queries_path: file of the sampled ids and their vectors.
        score_correlation: of all scores; None without two towers.
        unrelated: by tower, the distance of ids that have nothing to do with each other.
        turn: the rotation.
        notes: by tower, why a value is missing.
    """

    joined: dict[str, Joined]
    fit_path: str
    queries_path: str
    score_correlation: float | None
    unrelated: dict[str, float]
    turn: np.ndarray | None
    notes: dict[str, str]


@dataclass(frozen=True)
class Stream:
    """A part of a joined table that is read by one worker.

    Attributes:
        joined: the table.
        name: of the stream in the Storage Read API.
        path: file with what its rows are compared by.
    """

    joined: Joined
    name: str
    path: str


def fit(client: bigquery.Client, comparison: Comparison, work: tuple[int, Iterable[Joined]]) -> Iterator[Any]:
    """Fits rotation and moments on a sample; streams of all ids out, and the pair's facts under FACTS.

    Memory is that of the sample, however many ids there are.
    """
    number, found = work
    joined = {one.tower: one for one in sorted(found, key=lambda one: one.tower)}
    storage = reading.make_client()
    samples = {tower: _sample(storage, one) for tower, one in joined.items()}
    launch = next(iter(joined.values())).launch
    pairs = {
        tower: (_scored(comparison, rows.before), _scored(comparison, rows.after))
        for tower, rows in samples.items()
        if len(rows)
    }
    notes: dict[str, list[str]] = {tower: [] for tower in joined}
    moments = {}
    for tower in joined:
        other = comparison.other(tower)
        if not len(samples[tower]):
            notes[tower].append("no common ids")
        elif other is None:
            notes[tower].append("no score change: there is no other tower to have scores with")
        elif other not in pairs:
            notes[tower].append(f"no score change: tower {other!r} has no common ids")
        else:
            moments[tower] = measures.score_moments(*pairs[other])
    turn, unrelated = None, {}
    if pairs:
        vectors = {tower: (samples[tower].before, samples[tower].after) for tower in pairs}
        if measures.fits_rotation([*vectors.values()]):
            turn = measures.rotation([*vectors.values()])
            unrelated = dict(zip(vectors, measures.distance_unrelated([*vectors.values()]), strict=True))
        else:
            dimension = max(max(one.dimension_before, one.dimension_after) for one in joined.values())
            for tower in pairs:
                notes[tower].append(
                    f"no distance: it takes {measures.IDS_PER_DIMENSION * dimension:,} common ids that are not zero, "
                    f"ten per dimension; there are {sum(len(rows) for rows in samples.values()):,}"
                )
    correlation = None
    if len(pairs) == 2:
        correlation = measures.score_correlation(*pairs.values())
    fit_path = comparison.new_file(launch, "fit.npz")
    _save(fit_path, _fit_arrays(Fit(comparison.cosine, moments, turn)))
    queries_path = comparison.new_file(launch, "queries.npz")
    _save(queries_path, _query_arrays(comparison, samples))
    yield TaggedOutput(
        FACTS,
        (
            number,
            Facts(
                joined,
                fit_path,
                queries_path,
                correlation,
                unrelated,
                turn,
                {tower: "; ".join(reasons) for tower, reasons in notes.items() if reasons},
            ),
        ),
    )
    for tower, one in joined.items():
        fields = reading.GROUPED_FIELDS if tower in comparison.labels else reading.FIELDS
        for name in reading.open_streams(storage, one.table, fields):
            yield Stream(one, name, fit_path)


def _scored(comparison: Comparison, vectors: np.ndarray) -> np.ndarray:
    return measures.unit(vectors) if comparison.cosine else vectors


def _sample(storage: BigQueryReadClient, joined: Joined) -> Rows:
    """Returns common ids of a tower, in the order of the hashes of their ids: the first ones are a sample as well."""
    dimension = max(joined.dimension_before, joined.dimension_after)
    wanted = min(SAMPLE_IDS, _SAMPLE_VALUES // dimension)
    restriction = f"before_length > 0 AND after_length > 0 AND {tables.sample_restriction(wanted, joined.common)}"
    pages = [
        page
        for stream in reading.open_streams(storage, joined.table, (*reading.FIELDS, "sample"), restriction, most=1)
        for page in reading.read(storage, stream)
        if page.num_rows
    ]
    if not pages:
        nothing = np.zeros(0, bool)
        before, after = np.zeros((0, joined.dimension_before)), np.zeros((0, joined.dimension_after))
        return Rows(np.zeros(0, object), before, after, nothing, nothing)
    hashes = np.concatenate([page.column("sample").to_numpy() for page in pages])
    rows = reading.to_rows(pages, joined.dimension_before, joined.dimension_after)
    # Two ids with one hash: the id decides.
    return rows.where(np.lexsort((rows.ids.astype(str), hashes))[:wanted])


def _fit_arrays(found: Fit) -> dict[str, np.ndarray]:
    arrays = {"cosine": np.array(found.cosine)}
    if found.turn is not None:
        arrays["turn"] = found.turn
    for tower, moments in found.moments.items():
        arrays |= {
            f"{tower}.before": moments.before,
            f"{tower}.after": moments.after,
            f"{tower}.across": moments.across,
        }
    return arrays


def _fit_of(arrays: Mapping[str, np.ndarray]) -> Fit:
    towers = [name.removesuffix(".across") for name in arrays if name.endswith(".across")]
    return Fit(
        bool(arrays["cosine"]),
        {t: ScoreMoments(arrays[f"{t}.before"], arrays[f"{t}.after"], arrays[f"{t}.across"]) for t in towers},
        arrays.get("turn"),
    )


def _query_arrays(comparison: Comparison, samples: Mapping[str, Rows]) -> dict[str, np.ndarray]:
    """Returns ids and vectors of the sampled users and items; those with a zero vector have no order of items."""
    arrays: dict[str, np.ndarray] = {}
    for tower, rows in samples.items():
        there = (np.linalg.norm(rows.before, axis=1) > 0) & (np.linalg.norm(rows.after, axis=1) > 0)
        chosen = rows.where(np.flatnonzero(there)[: comparison.queries])
        arrays |= {
            f"{tower}.ids": chosen.ids.astype(str),
            f"{tower}.before": chosen.before,
            f"{tower}.after": chosen.after,
        }
    return arrays


# The pass over all ids.


def measure(client: bigquery.Client, comparison: Comparison, stream: Stream) -> Iterator[Any]:
    """Measures the ids of a stream; ((pair, tower), Totals) out, and (tower, path) of the ids' rows under FILES."""
    joined = stream.joined
    fitted = _fit_of(_load(stream.path))
    totals = Totals(top=comparison.top)
    path = comparison.new_file(joined.launch, f"{joined.tower}.parquet")
    writer = _ChangeWriter(path, joined) if joined.tower in comparison.ids else None
    blocks = reading.read_blocks(reading.make_client(), stream.name, joined.dimension_before, joined.dimension_after)
    for rows in blocks:
        change, found = measures.measure(rows, joined.tower, fitted, comparison.top)
        totals.add(found)
        if writer:
            writer.write(rows.ids, change)
        metrics.count(READ_ROWS, len(rows))
    yield (joined.pair, joined.tower), totals
    if writer and writer.close():
        yield TaggedOutput(FILES, (joined.tower, path))


class _ChangeWriter:
    """Writes what became of ids to a Parquet file, which is not created before there is a row."""

    def __init__(self, path: str, joined: Joined) -> None:
        self._path = path
        self._pair = joined.pair
        self._schema = pa.schema(
            [
                ("pair", pa.int64()),
                (f"{joined.tower}_id", pa.string()),
                *((name, pa.float64()) for name in tables.CHANGE_COLUMNS),
            ]
        )
        self._writer: pq.ParquetWriter | None = None

    def write(self, ids: np.ndarray, change: measures.Change) -> None:
        if self._writer is None:
            self._file = FileSystems.create(
                self._path, "application/octet-stream", compression_type=CompressionTypes.UNCOMPRESSED
            )
            self._writer = pq.ParquetWriter(self._file, self._schema)
        values = [pa.array(getattr(change, name), from_pandas=True) for name in tables.CHANGE_COLUMNS]
        pairs = pa.array(np.full(len(ids), self._pair))
        self._writer.write_table(pa.table([pairs, pa.array(ids, pa.string()), *values], schema=self._schema))

    def close(self) -> bool:
        """Returns whether there is a file."""
        if self._writer is None:
            return False
        self._writer.close()
        self._file.close()
        return True


# Neighbours and recommendations.


@dataclass(frozen=True)
class Measured:
    """What is known of a pair before neighbours are looked for.

    Attributes:
        facts: from before.
        totals: by tower.
        asked: by tower, how many sampled ids are asked; those that moved far come after them.
    """

    facts: Facts
    totals: dict[str, Totals]
    asked: dict[str, int]


def ask(
    client: bigquery.Client, comparison: Comparison, work: tuple[int, Mapping[str, Iterable[Any]]]
) -> Iterator[Any]:
    """Puts the questions together: (pair, its facts and totals) in, streams of all items out, Measured under FACTS.

    Raises:
        AuditError: not every id was measured once.
    """
    number, found = work
    (facts,) = found["facts"]
    totals: dict[str, Totals] = {tower: Totals(top=comparison.top) for tower in facts.joined}
    totals |= dict(found["totals"])
    for tower, one in facts.joined.items():
        counts = (totals[tower].common, totals[tower].added, totals[tower].removed)
        if counts != (one.common, one.after - one.common, one.before - one.common):
            raise AuditError(
                f"tower {tower!r}: {sum(counts):,} ids were read of {one.rows:,} in {one.table}; start the job again, "
                "and report it if it happens twice"
            )
    queries = _load(facts.queries_path)
    arrays: dict[str, np.ndarray] = {}
    asked: dict[str, int] = {}
    for tower in facts.joined:
        movers = totals[tower].movers
        asked[tower] = len(queries[f"{tower}.ids"])
        arrays[f"{tower}.ids"] = np.concatenate([queries[f"{tower}.ids"].astype(str), [mover.id for mover in movers]])
        for when in ("before", "after"):
            sampled = queries[f"{tower}.{when}"]
            moved = [getattr(mover, when) for mover in movers]
            arrays[f"{tower}.{when}"] = np.concatenate([sampled, np.reshape(moved, (-1, sampled.shape[1]))])
    yield TaggedOutput(FACTS, (number, Measured(facts, totals, asked)))
    items = facts.joined.get(comparison.items or "")
    if items and items.rows:
        path = comparison.new_file(items.launch, "asked.npz")
        _save(path, arrays)
        for name in reading.open_streams(reading.make_client(), items.table, reading.FIELDS):
            yield Stream(items, name, path)


Found = dict[tuple[str, str], Nearest]
"""The nearest items by (tower of the queries, "before" or "after")."""


def look(client: bigquery.Client, comparison: Comparison, stream: Stream) -> Iterator[tuple[int, Found]]:
    """Looks for the nearest items of every query in a stream of items, by exact blocks; (pair, Found) out."""
    joined = stream.joined
    arrays = _load(stream.path)
    k = max(comparison.k, MOVER_NEIGHBOURS)
    found: Found = {}
    queries = {}
    for tower in comparison.towers:
        of_items = tower == joined.tower
        for when in ("before", "after"):
            vectors = arrays[f"{tower}.{when}"]
            queries[tower, when] = measures.unit(vectors) if of_items or comparison.cosine else vectors
            # An item finds itself first, which is left out later.
            found[tower, when] = Nearest.none(len(vectors), k + of_items)
    blocks = reading.read_blocks(reading.make_client(), stream.name, joined.dimension_before, joined.dimension_after)
    for rows in blocks:
        for (tower, when), vectors in queries.items():
            candidates = rows.before if when == "before" else rows.after
            chosen = rows.has_before if when == "before" else rows.has_after
            if tower == joined.tower or comparison.cosine:
                chosen = chosen & (np.linalg.norm(candidates, axis=1) > 0)  # zeros have no cosine
                candidates = measures.unit(candidates)
            if chosen.any() and len(vectors):
                found[tower, when].see(vectors, candidates[chosen], rows.ids[chosen])
    yield joined.pair, found


# The results.


@dataclass(frozen=True)
class Finished:
    """The results of a pair.

    Attributes:
        pair: its number.
        launch: of the job.
        rows: by tower, columns of the comparison table.
        spread: by tower, what is measured against the previous pair's 99th percentile.
    """

    pair: int
    launch: str
    rows: dict[str, dict[str, Any]]
    spread: dict[str, Distribution]


def finish(
    client: bigquery.Client, comparison: Comparison, work: tuple[int, Mapping[str, Iterable[Any]]]
) -> Iterator[Finished]:
    """Makes the rows of a pair's results; (pair, Measured and Found) in."""
    number, parts = work
    (measured,) = parts["measured"]
    looked = [*parts["found"]]
    found: Found = looked[0] if looked else {}
    pair, facts = comparison.pairs[number], measured.facts
    kept = {tower: _kept(comparison, facts, measured.asked[tower], tower, found) for tower in facts.joined}
    launch = next(iter(facts.joined.values())).launch
    rows, spread = {}, {}
    for tower, one in facts.joined.items():
        totals: Totals = measured.totals[tower]
        of_scores = totals.score_change.count > 0
        spread[tower] = totals.score_change if of_scores else totals.distance
        neighbours = kept.get(comparison.items or "")
        recommended = kept.get(comparison.users or "")
        common_before, common_after = totals.common_norms
        rows[tower] = {
            **_pair_values(pair),
            "tower": tower,
            "table_name": comparison.destination.table(tower),
            "ids_common": totals.common,
            "ids_added": totals.added,
            "ids_removed": totals.removed,
            "dimension": one.dimension_after,
            "previous_dimension": one.dimension_before,
            "score": "cosine" if comparison.cosine else "dot",
            **_quantile_values("score_change", totals.score_change),
            **_quantile_values("distance", totals.distance),
            "distance_unrelated": facts.unrelated.get(tower),
            "note": facts.notes.get(tower),
            **({} if tower != comparison.items else _kept_values("neighbours", neighbours)),
            **_kept_values("recommendations", recommended),
            "distinct_items_before": recommended.distinct_before if recommended else None,
            "distinct_items_after": recommended.distinct_after if recommended else None,
            "score_correlation": facts.score_correlation,
            "norm_ratio": common_after / common_before if common_before else None,
            "norm_mean_before": totals.before.mean_norm,
            "norm_mean_after": totals.after.mean_norm,
            "effective_rank_before": totals.before.effective_rank(),
            "effective_rank_after": totals.after.effective_rank(),
            "mean_cosine_before": totals.before.mean_cosine(),
            "mean_cosine_after": totals.after.mean_cosine(),
            "zero_vectors_before": totals.before.zeros,
            "zero_vectors_after": totals.after.zeros,
            "score_change_histogram": totals.score_change.histogram(),
            "distance_histogram": totals.distance.histogram(),
            "rotation": [] if facts.turn is None else facts.turn.ravel().tolist(),
            "spectrum_before": totals.before.spectrum(),
            "spectrum_after": totals.after.spectrum(),
            "distance_and_score_change": _plane_values(totals.plane),
            "norms": [
                {"before": measures.norm_of_bin(before), "after": measures.norm_of_bin(after), "ids": count}
                for (before, after), count in sorted(totals.norms.items())
            ],
            "groups": [
                {
                    "group_name": name,
                    "ids": group.count,
                    "score_change_mean": group.total / group.count,
                    "score_change_p50": group.median(),
                    "score_change_max": group.largest,
                }
                for name, group in sorted(totals.groups.items())
            ],
            "most_moved": _movers(client, comparison, facts, totals.movers, measured.asked[tower], tower, found),
            "added_examples": totals.added_ids,
            "removed_examples": totals.removed_ids,
            "job_name": comparison.job_name,
            "launch": launch,
            "pipeline_version": __version__,
        }
    yield Finished(number, launch, rows, spread)


def _pair_values(pair: Pair) -> dict[str, Any]:
    return {
        "train_date": str(pair.after.train_date),
        "mlflow_experiment_name": pair.after.experiment_name,
        "mlflow_run_id": pair.after.run_id,
        "mlflow_run_name": pair.after.run_name,
        "previous_train_date": str(pair.before.train_date),
        "previous_mlflow_run_id": pair.before.run_id,
        "previous_mlflow_run_name": pair.before.run_name,
    }


def _quantile_values(name: str, values: Distribution) -> dict[str, float | None]:
    quantiles = {f"{name}_p{round(100 * share)}": values.quantile(share) for share in (0.5, 0.9, 0.99)}
    return {**quantiles, f"{name}_mean": values.mean}


def _kept_values(name: str, found: measures.Kept | None) -> dict[str, Any]:
    return {
        f"{name}_kept": found and found.share,
        f"{name}_kept_error": found and found.error,
        f"{name}_k": found and found.k,
        f"{name}_queries": found and found.queries,
    }


def _plane_values(plane: np.ndarray) -> list[dict[str, Any]]:
    width = measures.LARGEST / len(plane)
    return [
        {
            "distance": round((across + 0.5) * width, 6),
            "score_change": round((up + 0.5) * width, 6),
            "ids": int(plane[across, up]),
        }
        for across, up in zip(*np.nonzero(plane), strict=True)
    ]


def _kept(comparison: Comparison, facts: Facts, asked: int, tower: str, found: Found) -> measures.Kept | None:
    if (tower, "before") not in found:
        return None
    own = None
    if tower == comparison.items:
        own = [str(name) for name in _load(facts.queries_path)[f"{tower}.ids"]]
    before, after = (
        Nearest(one.scores[:asked], one.ids[:asked]).lists(comparison.k, own)
        for one in (found[tower, "before"], found[tower, "after"])
    )
    return measures.kept(before, after, comparison.k, facts.joined[tower].common)


def _movers(
    client: bigquery.Client,
    comparison: Comparison,
    facts: Facts,
    movers: Sequence[Mover],
    asked: int,
    tower: str,
    found: Found,
) -> list[dict[str, Any]]:
    own = [mover.id for mover in movers]
    nearest: dict[str, list[list[str]]] = {}
    for when in ("before", "after"):
        one = found.get((tower, when))
        nearest[when] = (
            Nearest(one.scores[asked:], one.ids[asked:]).lists(
                MOVER_NEIGHBOURS, own if tower == comparison.items else None
            )
            if one
            else [[] for _ in movers]
        )
    labels = _labels(client, comparison, facts, tower, own)
    of_items = _labels(
        client,
        comparison,
        facts,
        comparison.items,
        sorted({n for lists in nearest.values() for one in lists for n in one}),
    )
    return [
        {
            "id": mover.id,
            "label": labels.get(mover.id, (None, None))[0],
            "group_name": labels.get(mover.id, (None, None))[1],
            "score_change": mover.score_change,
            "distance": mover.distance,
            "norm_before": float(np.linalg.norm(mover.before)),
            "norm_after": float(np.linalg.norm(mover.after)),
            **{
                f"nearest_{when}": [{"id": n, "label": of_items.get(n, (None, None))[0]} for n in nearest[when][place]]
                for when in nearest
            },
        }
        for place, mover in enumerate(movers)
    ]


def _labels(
    client: bigquery.Client, comparison: Comparison, facts: Facts, tower: str | None, ids: Sequence[str]
) -> dict[str, tuple[str | None, str | None]]:
    if not tower or tower not in comparison.labels or not ids:
        return {}
    wanted = bigquery.ArrayQueryParameter("ids", "STRING", list(ids))
    rows = _query(client, comparison, tables.joined_labels_sql(facts.joined[tower].table), wanted)
    return {name: (label, group) for name, label, group in rows}


def load(
    client: bigquery.Client,
    comparison: Comparison,
    work: tuple[None, Iterable[Finished]],
    files: Iterable[tuple[str, str]],
) -> Iterator[str]:
    """Loads results and ids into the staging tables and counts them; all pairs in, the launch out.

    Raises:
        AuditError: rows are missing or too many.
    """
    finished = sorted(work[1], key=lambda one: one.pair)
    launch = finished[0].launch
    destination = comparison.destination
    _compare_with_previous(client, comparison, finished)
    lines = [json.dumps({"pair": one.pair, **row}) for one in finished for row in one.rows.values()]
    path = comparison.new_file(launch, "results.json")
    with FileSystems.create(path, "application/json", compression_type=CompressionTypes.UNCOMPRESSED) as file:
        file.write("".join(f"{line}\n" for line in lines).encode())
    schema = tables.STAGED_COMPARISON_SCHEMA
    _load_files(client, comparison, launch, tables.staged_comparison(destination, launch), [path], "JSON", schema)
    by_tower: dict[str, list[str]] = {tower: [] for tower in comparison.ids}
    for tower, file_path in files:
        by_tower[tower].append(file_path)
    for tower, paths in by_tower.items():
        name = tables.staged_change(destination, tower, launch)
        if len(paths) > _MOST_FILES:
            raise AuditError(f"tower {tower!r}: {len(paths):,} files, and a load job takes {_MOST_FILES:,}")
        if paths:
            _load_files(client, comparison, launch, name, sorted(paths), "PARQUET", tables.staged_change_schema(tower))
        found = {pair: (rows, ids) for pair, rows, ids in _query(client, comparison, tables.audit_sql(name, tower))}
        for one in finished:
            row = one.rows[tower]
            wanted = row["ids_common"] + row["ids_added"] + row["ids_removed"]
            if found.get(one.pair, (0, 0)) != (wanted, wanted):
                raise AuditError(
                    f"tower {tower!r}: {found.get(one.pair, (0, 0))[0]:,} rows were loaded of {wanted:,} ids; nothing "
                    "was published: start the job again, and report it if it happens twice"
                )
    yield launch


def _compare_with_previous(client: bigquery.Client, comparison: Comparison, finished: Sequence[Finished]) -> None:
    """Adds the share of ids above the previous pair's 99th percentile, of this job or published before."""
    last = max(pair.after.train_date for pair in comparison.pairs)
    known: list[Percentile] = percentiles(client, comparison.destination, last)
    own = {(pair.before.run_id, pair.after.run_id) for pair in comparison.pairs}
    known = [one for one in known if (one.before_run, one.after_run) not in own]
    for one in finished:
        pair = comparison.pairs[one.pair]
        for tower, row in one.rows.items():
            earlier = previous(known, tower, pair)
            row["unusual_above"] = earlier and earlier.value
            row["unusual_share"] = one.spread[tower].share_above(earlier.value) if earlier else None
            p99 = one.spread[tower].quantile(0.99)
            if p99 is not None:
                known.append(
                    Percentile(
                        tower, pair.after.train_date, pair.before.train_date, pair.after.run_id, pair.before.run_id, p99
                    )
                )


# Publication.


def shape(client: bigquery.Client, comparison: Comparison, launch: str) -> Iterator[str]:
    """Creates the result tables, or adds the columns that they lack; yields the launch.

    Raises:
        IncompatibleTableError: a table exists that cannot be used.
    """
    destination = comparison.destination
    results = bigquery.Table(tables.comparison_table(destination), schema=tables.COMPARISON_SCHEMA)
    results.description = "How a tower's embeddings changed between two trainings; one row per pair and tower."
    wanted = [results]
    for tower in comparison.ids:
        table = bigquery.Table(tables.change_table(destination, tower), schema=tables.change_schema(tower))
        table.description = f"How the embedding of each {tower} changed between two trainings."
        table.clustering_fields = [f"{tower}_id"]
        wanted.append(table)
    for table in wanted:
        table.time_partitioning = bigquery.TimePartitioning(type_="DAY", field=PARTITION_COLUMN)
        table.require_partition_filter = comparison.require_partition_filter or None
        there = publication.create_table(client, table, comparison.encryption)
        if found := differences(there, table.schema):
            raise IncompatibleTableError(
                f"table {table.reference} cannot be used: {'; '.join(found)}; rename it, or choose another name with "
                "--table_prefix or --dataset"
            )
        publication.add_columns(client, there, table.schema)
    publication.ensure_lock(client, destination, comparison.encryption)
    yield launch


def differences(table: bigquery.Table, wanted: Sequence[bigquery.SchemaField]) -> list[str]:
    """Returns what keeps a table from being a result table, in words; missing columns are none."""
    found = []
    partitioning = table.time_partitioning
    if partitioning is None or (partitioning.type_, partitioning.field) != ("DAY", PARTITION_COLUMN):
        found.append(f"it is not partitioned by DAY({PARTITION_COLUMN})")
    existing = {column.name.lower(): column for column in table.schema}
    for column in wanted:
        other = existing.get(column.name.lower())
        if other is None:
            continue
        names = {"FLOAT64": "FLOAT", "INT64": "INTEGER", "STRUCT": "RECORD"}
        kinds = [(names.get(c.field_type, c.field_type), c.mode == "REPEATED") for c in (other, column)]
        if kinds[0] != kinds[1]:
            found.append(
                f"column {column.name} is {other.mode} {other.field_type}, not {column.mode} {column.field_type}"
            )
    return found


def publish(client: bigquery.Client, comparison: Comparison, launch: str) -> Iterator[str]:
    """Makes the results of each pair visible in one transaction; what was done before is found, not repeated."""
    destination = comparison.destination
    changed = [tower for tower in comparison.towers if _exists(client, tables.change_table(destination, tower))]
    for number, pair in enumerate(comparison.pairs):
        script = tables.publish_script(destination, number, pair, launch, comparison.ids, changed)
        publication.run_script(
            client, f"compare_embeddings_{launch}_publish_{number}", script, f"the comparison of {pair}"
        )
    for tower in comparison.towers:
        Lineage.sources().add("bigquery", *destination.table(tower).split("."))
    written = [tables.comparison_table(destination), *(tables.change_table(destination, one) for one in comparison.ids)]
    for name in written:
        Lineage.sinks().add("bigquery", *name.split("."))
    yield launch


def clean(client: bigquery.Client, comparison: Comparison, launch: str) -> Iterator[str]:
    """Drops the launch's staging tables and files, and files that dead launches left; yields the launch."""
    destination = comparison.destination
    names = [tables.staged_comparison(destination, launch)]
    for tower in comparison.towers:
        names.append(tables.staged_change(destination, tower, launch))
        names += [tables.joined_table(destination, tower, launch, number) for number in range(len(comparison.pairs))]
    for name in names:
        client.delete_table(name, not_found_ok=True)
    publication.delete_files(comparison.files)
    publication.delete_files(comparison.all_files, older_than=STAGING_LIFE)
    yield launch


def gate(client: bigquery.Client, comparison: Comparison, launch: str) -> Iterator[str]:
    """Fails the job if a pair is unusual, which is published by then.

    Raises:
        UnusualError: one is.
    """
    if comparison.fail_if_unusual:
        known = percentiles(client, comparison.destination, max(pair.after.train_date for pair in comparison.pairs))
        require_usual(known, comparison.pairs)
    yield launch


def discard(client: bigquery.Client, comparison: Comparison, token: str | None = None) -> None:
    """Removes what a failed launch has left, for a launcher that is still there; a missing thing is fine.

    Args:
        client: for the dataset.
        comparison: what was to be compared.
        token: whose; by default this comparison's own, and with "" everybody's.
    """
    destination = comparison.destination
    token = comparison.token if token is None else token
    staging = tables.staged_comparison(destination, token)
    dataset, first = staging.rsplit(".", 1)
    kinds = [
        first,
        *(
            name.rsplit(".", 1)[1].removesuffix("_0")
            for tower in comparison.towers
            for name in (
                tables.staged_change(destination, tower, token),
                tables.joined_table(destination, tower, token, 0),
            )
        ),
    ]
    for table in client.list_tables(dataset):
        if table.table_id.startswith(tuple(kinds)):
            client.delete_table(table, not_found_ok=True)
    publication.delete_files(comparison.files if token else comparison.all_files)


def _exists(client: bigquery.Client, name: str) -> bool:
    try:
        client.get_table(name)
    except NotFound:
        return False
    return True


def _query(client: bigquery.Client, comparison: Comparison, sql: str, *parameters: Any) -> list[tuple[Any, ...]]:
    # BigQuery keeps results for a day, under the key as well.
    config = bigquery.QueryJobConfig(
        query_parameters=list(parameters), destination_encryption_configuration=comparison.encryption
    )
    return [row.values() for row in client.query_and_wait(sql, job_config=config)]


def _load_files(
    client: bigquery.Client,
    comparison: Comparison,
    launch: str,
    table: str,
    paths: Sequence[str],
    kind: str,
    schema: Sequence[bigquery.SchemaField],
) -> None:
    formats = {
        "JSON": bigquery.SourceFormat.NEWLINE_DELIMITED_JSON,
        "PARQUET": bigquery.SourceFormat.PARQUET,
    }

    def start(job_id: str) -> bigquery.LoadJob:
        config = bigquery.LoadJobConfig(
            source_format=formats[kind],
            schema=schema,
            # However often it runs, the same rows, once.
            write_disposition=bigquery.WriteDisposition.WRITE_TRUNCATE,
            create_disposition=bigquery.CreateDisposition.CREATE_NEVER,
            destination_encryption_configuration=comparison.encryption,
            labels=LABELS,
        )
        return client.load_table_from_uri(list(paths), table, job_id=job_id, job_config=config)

    name = table.rsplit(".", 1)[1].split("_staging_")[0]
    publication.run_job(client, f"compare_embeddings_{launch}_load_{name}", start, "the comparison")


# Files with arrays, in the temp location.


def _save(path: str, arrays: Mapping[str, np.ndarray]) -> None:
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, **dict(arrays))
    with FileSystems.create(path, "application/octet-stream", compression_type=CompressionTypes.UNCOMPRESSED) as file:
        file.write(content.getvalue())


@lru_cache(maxsize=2)
def _load(path: str) -> dict[str, np.ndarray]:
    """Reads a file once for all streams of a worker; it is written once."""
    with FileSystems.open(path, compression_type=CompressionTypes.UNCOMPRESSED) as file:
        content = io.BytesIO(file.read())
    with np.load(content, allow_pickle=False) as arrays:
        return dict(arrays)
