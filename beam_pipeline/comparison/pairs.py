"""Which pairs of the trainings in the tables are compared."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from datetime import date

from google.api_core.exceptions import NotFound
from google.cloud import bigquery

from beam_pipeline.bigquery import history
from beam_pipeline.bigquery.history import Trained
from beam_pipeline.bigquery.tables import Destination
from beam_pipeline.comparison import tables
from beam_pipeline.comparison.tables import Pair
from beam_pipeline.errors import ConfigError, TrainingMissingError


def choose(
    trainings: Sequence[Trained], towers: Sequence[str], earlier: str | None = None, later: str | None = None
) -> Pair | None:
    """Returns the pair to compare: by default the two latest trainings; None if there is none before the later one.

    Args:
        trainings: oldest first.
        towers: that both must have.
        earlier: date or run id; by default the last date before the later one.
        later: date or run id; by default the latest date.

    Raises:
        TrainingMissingError: there is no such training, or one lacks a tower.
        ConfigError: a date has several runs, or the two are in the wrong order or the same.
    """
    if not trainings:
        raise TrainingMissingError("the tables hold no training; publish one with python -m beam_pipeline")
    after = (
        history.resolve(trainings, later, "--to")
        if later
        else history.of_date(trainings, trainings[-1].train_date, "--to")
    )
    if earlier:
        before = history.resolve(trainings, earlier, "--from")
    else:
        days = [one.train_date for one in trainings if one.train_date < after.train_date]
        if not days:
            return None
        before = history.of_date(trainings, days[-1], "--from")
    if (before.run_id, before.train_date) == (after.run_id, after.train_date):
        raise ConfigError(f"--from and --to are both {after} ({after.run_id}); name two trainings")
    if before.train_date > after.train_date:
        raise ConfigError(f"--from={before.train_date} is after --to={after.train_date}; exchange them")
    pair = Pair(before, after)
    if reason := lacking(pair, towers):
        raise TrainingMissingError(reason)
    return pair


def consecutive(
    trainings: Sequence[Trained],
    towers: Sequence[str],
    compared: Sequence[tuple[str, str]],
    left_out: Callable[[str], None],
) -> list[Pair]:
    """Returns every pair of successive trainings that has no result yet, oldest first.

    Args:
        trainings: oldest first.
        towers: that both must have.
        compared: (earlier, later) run ids of pairs that have a result.
        left_out: is called with the reason for what is left out.
    """
    by_day: dict[date, list[Trained]] = {}
    for one in trainings:
        by_day.setdefault(one.train_date, []).append(one)
    alone = []
    for day, runs in by_day.items():
        if len(runs) > 1:  # Nothing says which of them was served.
            left_out(f"{day} has {len(runs)} runs, {history.named(runs)}; compare them with --from and --to")
        else:
            alone += runs
    wanted = []
    for before, after in itertools.pairwise(alone):
        pair = Pair(before, after)
        if (before.run_id, after.run_id) in compared:
            continue
        if reason := lacking(pair, towers):
            left_out(reason)
        else:
            wanted.append(pair)
    return wanted


def lacking(pair: Pair, towers: Sequence[str]) -> str | None:
    """Returns which tower only one of the two trainings has, in words; None if both have all."""
    for tower in towers:
        for one in (pair.before, pair.after):
            if tower not in one.rows:
                others = ",".join(name for name in towers if name != tower)
                remedy = f"leave it out with --towers={others}" if others else "name other trainings"
                return f"training {one} ({one.run_id}) has no tower {tower!r}; {remedy}"
    return None


def compared(client: bigquery.Client, destination: Destination) -> list[tuple[str, str]]:
    """Returns (earlier, later) run ids of the pairs that have a result."""
    try:
        return [(before, after) for before, after in history.query(client, tables.compared_sql(destination))]
    except NotFound:
        return []
