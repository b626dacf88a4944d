"""Which trainings there are in the tables, and which pairs of them are compared."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any

from google.api_core.exceptions import NotFound
from google.cloud import bigquery

from beam_pipeline.bigquery.tables import PARTITION_COLUMN, Destination
from beam_pipeline.comparison import tables
from beam_pipeline.comparison.tables import Pair, Trained
from beam_pipeline.errors import ConfigError, IncompatibleTableError, TrainingMissingError

_NAMED = 10  # trainings in a message


@dataclass(frozen=True)
class Towers:
    """What each tower is.

    Attributes:
        users: the one whose ids are recommended to; None if there is none.
        items: the one whose ids are recommended; None if there is none.
    """

    users: str | None
    items: str | None

    @property
    def names(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(name for name in (self.users, self.items) if name)


def find_towers(client: bigquery.Client, destination: Destination, named: Sequence[str] = ()) -> Towers:
    """Returns the towers of a history, as named (users first, or items alone) or as found by their tables.

    Raises:
        TrainingMissingError: there are no tables, or not those that were named.
        ConfigError: which tower is which cannot be told.
        IncompatibleTableError: a table lacks a column.
    """
    dataset = f"{destination.project}.{destination.dataset}"
    pattern = re.compile(rf"{re.escape(destination.prefix)}_([a-z][a-z0-9_]*)_embedding{re.escape(destination.suffix)}")
    there = sorted(match[1] for table in client.list_tables(dataset) if (match := pattern.fullmatch(table.table_id)))
    if not there:
        raise TrainingMissingError(
            f"there is no history in {dataset}: no table {destination.prefix}_TOWER_embedding{destination.suffix}; "
            "publish a training with python -m beam_pipeline, or name another place with --env, --dataset, "
            "--table_prefix or --table_suffix"
        )
    if missing := [name for name in named if name not in there]:
        raise TrainingMissingError(
            f"--towers: there is no table {destination.table(missing[0])}; towers there are {', '.join(there)}"
        )
    found = _roles(named, there)
    for name in found.names:
        _require_columns(client.get_table(destination.table(name)), name)
    return found


def _roles(named: Sequence[str], there: Sequence[str]) -> Towers:
    names = [*named] or [*there]
    if len(names) == 1:
        return Towers(names[0], None) if names[0] == "user" else Towers(None, names[0])
    if named:
        return Towers(names[0], names[1])
    if {"user", "item"} <= {*names}:
        return Towers("user", "item")
    if len(names) == 2 and {"user", "item"} & {*names}:
        items = "item" if "item" in names else next(name for name in names if name != "user")
        return Towers(next(name for name in names if name != items), items)
    raise ConfigError(f"towers are {', '.join(there)}; say which is which with --towers=USERS,ITEMS")


def _require_columns(table: bigquery.Table, tower: str) -> None:
    wanted = {
        PARTITION_COLUMN: ("DATE", False),
        "mlflow_run_id": ("STRING", False),
        f"{tower}_id": ("STRING", False),
        f"{tower}_embedding": ("FLOAT", True),
    }
    there = {c.name: (c.field_type.replace("FLOAT64", "FLOAT"), c.mode == "REPEATED") for c in table.schema}
    bad = [name for name, kind in wanted.items() if there.get(name) != kind]
    if bad:
        raise IncompatibleTableError(
            f"table {table.reference} cannot be compared: it has no column {', '.join(bad)} of the type that "
            "python -m beam_pipeline writes; publish the trainings with it"
        )


def find_trainings(client: bigquery.Client, destination: Destination, towers: Sequence[str]) -> list[Trained]:
    """Returns the trainings in the tables, oldest first; of one date, the one that was published first.

    The log says which run a partition holds as long as the counts of rows agree; partitions that are older than the
    log, or were changed since, are asked themselves.
    """
    names = [destination.table(tower).rsplit(".", 1)[1] for tower in towers]
    tower_of = dict(zip(names, towers, strict=True))
    held: dict[tuple[str, date], int] = {}
    for name, partition, rows in _query(client, tables.partitions_sql(destination, names)):
        if re.fullmatch(r"\d{8}", partition):
            held[tower_of[name], datetime.strptime(partition, "%Y%m%d").date()] = rows
    logged: dict[tuple[str, date], list[tuple[str, int]]] = {}
    order: dict[str, int] = {}
    about: dict[str, tuple[str, str]] = {}
    try:
        entries = _query(client, tables.logged_sql(destination))
    except NotFound:
        entries = []
    for number, (day, tower, run_id, run_name, experiment_name, rows) in enumerate(entries):
        logged.setdefault((tower, day), []).append((run_id, rows))
        order.setdefault(run_id, -number)
        about.setdefault(run_id, (run_name or "", experiment_name or ""))
    found: dict[tuple[date, str], dict[str, int]] = {}
    asked: dict[str, list[date]] = {}
    for (tower, day), rows in held.items():
        known = logged.get((tower, day), [])
        if known and known[0][1] == rows:
            known = known[:1]
        elif sum(count for _, count in known) != rows:
            asked.setdefault(tower, []).append(day)
            continue
        for run_id, count in known:
            found.setdefault((day, run_id), {})[tower] = count
    for tower, days in asked.items():
        table = client.get_table(destination.table(tower))
        parameter = bigquery.ArrayQueryParameter("days", "DATE", sorted(days))
        sql = tables.runs_sql(str(table.reference), [column.name for column in table.schema])
        for day, run_id, rows, run_name, experiment_name in _query(client, sql, parameter):
            if run_id is not None:
                found.setdefault((day, run_id), {})[tower] = rows
                about.setdefault(run_id, (run_name or "", experiment_name or ""))
    ordered = sorted(found, key=lambda key: (key[0], order.get(key[1], -len(entries)), key[1]))
    return [Trained(day, run_id, *about[run_id], found[day, run_id]) for day, run_id in ordered]


def choose(
    trainings: Sequence[Trained], towers: Sequence[str], earlier: str | None = None, later: str | None = None
) -> Pair | None:
    """Returns the pair that is meant: by default the two latest trainings; None if there is none before the later one.

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
    after = _resolve(trainings, later, "--to") if later else _only(trainings, trainings[-1].train_date, "--to")
    if earlier:
        before = _resolve(trainings, earlier, "--from")
    else:
        days = [one.train_date for one in trainings if one.train_date < after.train_date]
        if not days:
            return None
        before = _only(trainings, days[-1], "--from")
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
        if len(runs) > 1:
            left_out(f"{day} has {len(runs)} runs, {_named(runs)}; compare them with --from and --to")
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
        return [(before, after) for before, after in _query(client, tables.compared_sql(destination))]
    except NotFound:
        return []


def _resolve(trainings: Sequence[Trained], wanted: str, flag: str) -> Trained:
    try:
        return _only(trainings, date.fromisoformat(wanted), flag)
    except ValueError:
        pass
    runs = [one for one in trainings if one.run_id == wanted]
    if not runs:
        raise TrainingMissingError(f"{flag}={wanted}: the tables hold no such run; there are {_named(trainings)}")
    return runs[-1]


def _only(trainings: Sequence[Trained], day: date, flag: str) -> Trained:
    runs = [one for one in trainings if one.train_date == day]
    if not runs:
        raise TrainingMissingError(
            f"{flag}={day}: the tables hold no training of that date; there are {_named(trainings)}"
        )
    if len(runs) > 1:
        raise ConfigError(f"{day} has {len(runs)} runs, {_named(runs)}; name one by its run id with {flag}")
    return runs[0]


def _named(trainings: Sequence[Trained]) -> str:
    more = len(trainings) - _NAMED
    named = ", ".join(f"{one} ({one.run_id})" for one in trainings[-_NAMED:])
    return f"{named} and {more:,} earlier" if more > 0 else named


def _query(client: bigquery.Client, sql: str, *parameters: Any) -> list[tuple[Any, ...]]:
    config = bigquery.QueryJobConfig(query_parameters=list(parameters))
    return [row.values() for row in client.query_and_wait(sql, job_config=config)]
