"""What the result tables say: of a pair, and beside earlier pairs, without which no number means anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Any

from google.api_core.exceptions import NotFound
from google.cloud import bigquery

from beam_pipeline.bigquery.tables import Destination
from beam_pipeline.comparison import measures, tables
from beam_pipeline.comparison.measures import Usual
from beam_pipeline.comparison.tables import Pair
from beam_pipeline.errors import TrainingMissingError, UnusualError

_NAMED = 3  # ids in a verdict


@dataclass(frozen=True)
class Percentile:
    """The 99th percentile of a pair and tower: of the score change, or of the distance where there is one tower."""

    tower: str
    after: date
    before: date
    after_run: str
    before_run: str
    value: float


def percentiles(client: bigquery.Client, destination: Destination, last: date) -> list[Percentile]:
    """Returns what earlier pairs had, oldest first; nothing if there is no table yet."""
    parameter = bigquery.ScalarQueryParameter("last", "DATE", last)
    config = bigquery.QueryJobConfig(query_parameters=[parameter])
    try:
        rows = client.query_and_wait(tables.percentiles_sql(destination), job_config=config)
        return [Percentile(*row.values()) for row in rows if row[5] is not None]
    except NotFound:
        return []


def previous(known: Sequence[Percentile], tower: str, pair: Pair) -> Percentile | None:
    """Returns the pair that ends where this one begins, or else the last one that ends before."""
    earlier = [
        one
        for one in known
        if one.tower == tower
        and one.after <= pair.before.train_date
        and (one.before_run, one.after_run) != (pair.before.run_id, pair.after.run_id)
    ]
    adjacent = [one for one in earlier if one.after_run == pair.before.run_id]
    return next(reversed(adjacent or earlier), None)


def earlier_values(known: Sequence[Percentile], tower: str, after: date) -> list[float]:
    """Returns the percentiles of the pairs whose later training is older than that, oldest first."""
    return [one.value for one in known if one.tower == tower and one.after < after]


def require_usual(known: Sequence[Percentile], pairs: Sequence[Pair]) -> None:
    """Raises UnusualError if one of the pairs is unusual beside earlier ones."""
    for pair in pairs:
        for one in known:
            if (one.before_run, one.after_run) != (pair.before.run_id, pair.after.run_id):
                continue
            band = measures.usual(earlier_values(known, one.tower, one.after))
            if band.unusual(one.value) and band.low is not None:
                raise UnusualError(
                    f"tower {one.tower!r}, {pair}: the 99th percentile is {one.value:.2f}, outside of the usual "
                    f"{band.low:.2f} to {band.high:.2f} of {band.pairs} earlier pairs; the results are published"
                )


@dataclass(frozen=True)
class Result:
    """A pair and tower.

    Attributes:
        values: columns of the comparison table.
        usual: what the 99th percentile was before.
        of_movers: id → its mean in earlier pairs, and in how many, of the ids that moved farthest.
        farthest: how far any id moved in the earlier pairs, at most; None if there was none.
    """

    values: Mapping[str, Any]
    usual: Usual
    of_movers: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    farthest: float | None = None

    @property
    def measure(self) -> str:
        """What ids are ranked by: "score_change", or "distance" where there is one tower."""
        return "score_change" if self.values["score_change_p99"] is not None else "distance"

    @property
    def p99(self) -> float | None:
        """The 99th percentile of that."""
        found: float | None = self.values[f"{self.measure}_p99"]
        return found

    @property
    def unusual(self) -> bool | None:
        """Whether the pair is; None if that is unknown."""
        return self.usual.unusual(self.p99)

    @property
    def pair(self) -> tuple[str, str]:
        """Run ids, the earlier one first."""
        return self.values["previous_mlflow_run_id"], self.values["mlflow_run_id"]

    @property
    def farther(self) -> list[str]:
        """The ids that moved farther than any did before: few of many ids leave the 99th percentile where it was."""
        if self.farthest is None or self.usual.low is None:
            return []
        return [one["id"] for one in self.values["most_moved"] if (one[self.measure] or 0) > self.farthest]

    @property
    def verdict(self) -> str:
        """One sentence."""
        values, name = self.values, self.measure.replace("_", " ")
        if self.p99 is None:
            return f"No verdict: {values['note'] or 'no id has a value'}."
        share = values["unusual_share"]
        above = f"; {share:.1%} of the ids are above the previous pair's 99th percentile" if share is not None else ""
        if self.farther:
            more = len(self.farther) - _NAMED
            ids = ", ".join(self.farther[:_NAMED]) + (f" and {more} more" if more > 0 else "")
            above += f"; farther than any id in {self.usual.pairs} earlier pairs ({self.farthest:.2f}): {ids}"
        if self.unusual is None:
            return f"Too few trainings to say whether this is usual ({self.usual.pairs} of {measures.ENOUGH}){above}."
        band = f"{self.usual.low:.2f} to {self.usual.high:.2f} over {self.usual.pairs} earlier pairs"
        if self.unusual:
            return f"Unusual: the 99th percentile of {name} is {self.p99:.2f}, and {band} is usual{above}."
        return f"As usual: the 99th percentile of {name} is {self.p99:.2f}, within {band}{above}."


def date_of(client: bigquery.Client, destination: Destination, later: str) -> date:
    """Returns the partition of the results whose later training is named, by date or run id.

    Raises:
        TrainingMissingError: there is none.
    """
    try:
        return date.fromisoformat(later)
    except ValueError:
        pass
    days = [one.after for one in percentiles(client, destination, date.max) if one.after_run == later]
    if not days:
        raise TrainingMissingError(
            f"--to={later}: there is no comparison of that run in {tables.comparison_table(destination)}"
        )
    return days[-1]


def find_results(
    client: bigquery.Client,
    destination: Destination,
    last: date | None = None,
    wanted: Callable[[Mapping[str, Any]], bool] = lambda row: True,
) -> list[Result]:
    """Returns the results of the last pairs up to a date, oldest first; of the last one, what its movers did before.

    Args:
        client: for the dataset.
        destination: the tables.
        last: date of the last training; None for all.
        wanted: of the pairs of that date, which one is meant; the others come before it.

    Raises:
        TrainingMissingError: there is no result.
    """
    last = last or date.max
    known = percentiles(client, destination, last)
    days = sorted({one.after for one in known})[-measures.HISTORY - 1 :]
    first = days[0] if days else date.min
    bounds = [bigquery.ScalarQueryParameter(name, "DATE", day) for name, day in (("first", first), ("last", last))]
    try:
        rows = [dict(row.items()) for row in _query(client, tables.results_sql(destination), *bounds)]
    except NotFound:
        rows = []
    if not rows:
        raise TrainingMissingError(
            f"there is no comparison up to {last} in {tables.comparison_table(destination)}; "
            "run python -m beam_pipeline.compare first"
        )
    rows.sort(key=lambda row: (row["train_date"], wanted(row)))
    newest = rows[-1]["mlflow_run_id"], rows[-1]["previous_mlflow_run_id"]
    found: list[Result] = []
    for row in rows:
        of_movers: dict[str, tuple[float, int]] = {}
        if (row["mlflow_run_id"], row["previous_mlflow_run_id"]) == newest:
            of_movers = _usual_of_movers(client, destination, row, first)
        earlier = earlier_values(known, row["tower"], row["train_date"])
        moved = [
            one.values["most_moved"][0][one.measure] or 0.0
            for one in found
            if one.values["tower"] == row["tower"]
            and one.values["train_date"] < row["train_date"]
            and one.values["most_moved"]
        ]
        found.append(Result(row, measures.usual(earlier), of_movers, max(moved, default=None)))
    return found


def _usual_of_movers(
    client: bigquery.Client, destination: Destination, row: Mapping[str, Any], first: date
) -> dict[str, tuple[float, int]]:
    parameters = [
        bigquery.ScalarQueryParameter("first", "DATE", first),
        bigquery.ScalarQueryParameter("last", "DATE", row["train_date"]),
        bigquery.ArrayQueryParameter("ids", "STRING", [mover["id"] for mover in row["most_moved"]]),
    ]
    try:
        found = _query(client, tables.usual_sql(destination, row["tower"]), *parameters)
        return {name: (mean, count) for name, mean, count in (one.values() for one in found) if count}
    except NotFound:  # Ids of this tower are not published.
        return {}


def _query(client: bigquery.Client, sql: str, *parameters: Any) -> list[Any]:
    return [*client.query_and_wait(sql, job_config=bigquery.QueryJobConfig(query_parameters=list(parameters)))]
