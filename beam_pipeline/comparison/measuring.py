"""The steps that read vectors: join, fit, measure, ask, look. Each can be repeated, anywhere, at any time.

A BigQuery job that exists already is waited for, not repeated; each attempt names its files differently, and those of a
failed one are not passed on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

import numpy as np
from apache_beam.pvalue import TaggedOutput
from google.cloud import bigquery
from google.cloud.bigquery_storage_v1 import BigQueryReadClient

from beam_pipeline import metrics
from beam_pipeline.bigquery import publication, storage_read
from beam_pipeline.bigquery.publication import LABELS, STAGING_LIFE
from beam_pipeline.comparison import measures, reading, tables
from beam_pipeline.comparison.files import ChangeWriter, fit_arrays, fit_of, load_arrays, save_arrays
from beam_pipeline.comparison.measures import Fit, Nearest, Rows, Totals
from beam_pipeline.comparison.work import (
    FACTS,
    FILES,
    MOVER_NEIGHBOURS,
    READ_ROWS,
    Comparison,
    Facts,
    Found,
    Joined,
    Measured,
    Stream,
    query,
)
from beam_pipeline.errors import AuditError, BadVectorError

SAMPLE_IDS = 100_000
"""Ids of a tower on which rotation and moments are fitted, at most."""

_SAMPLE_VALUES = 1 << 24  # of all their vectors of one training, so that many dimensions take no more memory


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
    (counts,) = query(client, comparison, tables.joined_sql(name))
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


def fit(client: bigquery.Client, comparison: Comparison, work: tuple[int, Iterable[Joined]]) -> Iterator[Any]:
    """Fits rotation and moments on a sample; streams of all ids out, and the pair's facts under FACTS.

    Memory is that of the sample, however many ids there are.
    """
    number, found = work
    joined = {one.tower: one for one in sorted(found, key=lambda one: one.tower)}
    storage = storage_read.make_client()
    samples = {tower: _sample(storage, comparison.destination.job_project, one) for tower, one in joined.items()}
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
    save_arrays(fit_path, fit_arrays(Fit(comparison.cosine, moments, turn)))
    queries_path = comparison.new_file(launch, "queries.npz")
    save_arrays(queries_path, _query_arrays(comparison, samples))
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
        for name in storage_read.open_streams(storage, comparison.destination.job_project, one.table, fields):
            yield Stream(one, name, fit_path)


def _scored(comparison: Comparison, vectors: np.ndarray) -> np.ndarray:
    return measures.unit(vectors) if comparison.cosine else vectors


def _sample(storage: BigQueryReadClient, project: str, joined: Joined) -> Rows:
    """Returns common ids of a tower, in the order of the hashes of their ids: the first ones are a sample as well."""
    dimension = max(joined.dimension_before, joined.dimension_after)
    wanted = min(SAMPLE_IDS, _SAMPLE_VALUES // dimension)
    restriction = f"before_length > 0 AND after_length > 0 AND {tables.sample_restriction(wanted, joined.common)}"
    pages = [
        page
        for stream in storage_read.open_streams(
            storage, project, joined.table, (*reading.FIELDS, "sample"), restriction, most=1
        )
        for page in storage_read.read(storage, stream)
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


def _query_arrays(comparison: Comparison, samples: Mapping[str, Rows]) -> dict[str, np.ndarray]:
    """Returns ids and vectors of the sampled users and items; those with a zero vector have no order of items."""
    arrays: dict[str, np.ndarray] = {}
    for tower, rows in samples.items():
        nonzero = (np.linalg.norm(rows.before, axis=1) > 0) & (np.linalg.norm(rows.after, axis=1) > 0)
        chosen = rows.where(np.flatnonzero(nonzero)[: comparison.queries])
        arrays |= {
            f"{tower}.ids": chosen.ids.astype(str),
            f"{tower}.before": chosen.before,
            f"{tower}.after": chosen.after,
        }
    return arrays


def measure(client: bigquery.Client, comparison: Comparison, stream: Stream) -> Iterator[Any]:
    """Measures the ids of a stream; ((pair, tower), Totals) out, and (tower, path) of the ids' rows under FILES."""
    joined = stream.joined
    fitted = fit_of(load_arrays(stream.path))
    totals = Totals(top=comparison.top)
    path = comparison.new_file(joined.launch, f"{joined.tower}.parquet")
    writer = ChangeWriter(path, joined) if joined.tower in comparison.ids else None
    blocks = reading.read_blocks(
        storage_read.make_client(), stream.name, joined.dimension_before, joined.dimension_after
    )
    for rows in blocks:
        change, found = measures.measure(rows, joined.tower, fitted, comparison.top)
        totals.add(found)
        if writer:
            writer.write(rows.ids, change)
        metrics.count(READ_ROWS, len(rows))
    yield (joined.pair, joined.tower), totals
    if writer and writer.close():
        yield TaggedOutput(FILES, (joined.tower, path))


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
    queries = load_arrays(facts.queries_path)
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
        save_arrays(path, arrays)
        project = comparison.destination.job_project
        for name in storage_read.open_streams(storage_read.make_client(), project, items.table, reading.FIELDS):
            yield Stream(items, name, path)


def look(client: bigquery.Client, comparison: Comparison, stream: Stream) -> Iterator[tuple[int, Found]]:
    """Looks for the nearest items of every query in a stream of items, by exact blocks; (pair, Found) out."""
    joined = stream.joined
    arrays = load_arrays(stream.path)
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
    blocks = reading.read_blocks(
        storage_read.make_client(), stream.name, joined.dimension_before, joined.dimension_after
    )
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
