"""The rows of the comparison table, from all that was measured of a pair."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from google.cloud import bigquery

from beam_pipeline import __version__
from beam_pipeline.comparison import measures, tables
from beam_pipeline.comparison.files import load_arrays
from beam_pipeline.comparison.measures import Distribution, Mover, Nearest, Totals
from beam_pipeline.comparison.tables import Pair
from beam_pipeline.comparison.work import MOVER_NEIGHBOURS, Comparison, Facts, Finished, Found, query


def finish(
    client: bigquery.Client, comparison: Comparison, work: tuple[int, Mapping[str, Iterable[Any]]]
) -> Iterator[Finished]:
    """Yields a pair's results, as rows of the comparison table; (pair, Measured and Found) in."""
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
        # A tower alone has no scores: its ids are compared by distance.
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
            "by_group": [
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
    queries = None
    if tower == comparison.items:
        queries = [str(name) for name in load_arrays(facts.queries_path)[f"{tower}.ids"]]
    # Sampled ids come first; those that moved far, which follow them, would not be a fair sample.
    before, after = (
        Nearest(one.scores[:asked], one.ids[:asked]).lists(comparison.k, queries)
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
    ids = [mover.id for mover in movers]
    nearest: dict[str, list[list[str]]] = {}
    for when in ("before", "after"):
        one = found.get((tower, when))
        nearest[when] = (
            Nearest(one.scores[asked:], one.ids[asked:]).lists(
                MOVER_NEIGHBOURS, ids if tower == comparison.items else None
            )
            if one
            else [[] for _ in movers]
        )
    labels = _labels(client, comparison, facts, tower, ids)
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
    rows = query(client, comparison, tables.joined_labels_sql(facts.joined[tower].table), wanted)
    return {name: (label, group) for name, label, group in rows}
