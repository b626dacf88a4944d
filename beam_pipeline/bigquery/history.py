"""What the tables hold: the towers and trainings of a history, and labels for their ids.

Reads only; whatever queries the tables (a comparison, a search) begins here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any

from google.api_core.exceptions import GoogleAPICallError, NotFound
from google.cloud import bigquery

from beam_pipeline import emulators
from beam_pipeline.bigquery.tables import (
    PARTITION_COLUMN,
    Destination,
    dimension_sql,
    literal,
    schema_fields,
    split_name,
)
from beam_pipeline.errors import ConfigError, IncompatibleTableError, LabelsError, TrainingMissingError

DOLLARS_PER_TIB = 6.25
"""BigQuery on demand, US and EU (https://cloud.google.com/bigquery/pricing); loads, copies and DELETEs are free."""

_NAMED = 10  # trainings in a message


@dataclass(frozen=True)
class Trained:
    """A training whose embeddings are in the tables.

    Attributes:
        train_date: its partition.
        run_id: MLflow run.
        run_name, experiment_name: of the run; empty where a table does not have them.
        rows: ids of each tower.
    """

    train_date: date
    run_id: str
    run_name: str
    experiment_name: str
    rows: dict[str, int]

    def __str__(self) -> str:
        return f"{self.train_date} {self.run_name or self.run_id}"


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
        ConfigError: it is unclear which tower is which.
        IncompatibleTableError: a table lacks a column.
    """
    dataset = f"{destination.project}.{destination.dataset}"
    pattern = re.compile(rf"{re.escape(destination.prefix)}_([a-z][a-z0-9_]*)_embedding{re.escape(destination.suffix)}")
    existing = sorted(match[1] for table in client.list_tables(dataset) if (match := pattern.fullmatch(table.table_id)))
    if not existing:
        raise TrainingMissingError(
            f"there is no history in {dataset}: no table {destination.prefix}_TOWER_embedding{destination.suffix}; "
            "publish a training with python -m beam_pipeline, or name another place with --env, --dataset, "
            "--table_prefix or --table_suffix"
        )
    if missing := [name for name in named if name not in existing]:
        raise TrainingMissingError(
            f"--towers: there is no table {destination.table(missing[0])}; the towers are {', '.join(existing)}"
        )
    found = _roles(named, existing)
    for name in found.names:
        _require_columns(client.get_table(destination.table(name)), name)
    return found


def _roles(named: Sequence[str], existing: Sequence[str]) -> Towers:
    names = [*named] or [*existing]
    if len(names) == 1:
        return Towers(names[0], None) if names[0] == "user" else Towers(None, names[0])
    if named:
        return Towers(names[0], names[1])
    if {"user", "item"} <= {*names}:
        return Towers("user", "item")
    if len(names) == 2 and {"user", "item"} & {*names}:
        items = "item" if "item" in names else next(name for name in names if name != "user")
        return Towers(next(name for name in names if name != items), items)
    raise ConfigError(f"the towers are {', '.join(existing)}; say which is which with --towers=USERS,ITEMS")


def _require_columns(table: bigquery.Table, tower: str) -> None:
    wanted = {
        PARTITION_COLUMN: ("DATE", False),
        "mlflow_run_id": ("STRING", False),
        f"{tower}_id": ("STRING", False),
        f"{tower}_embedding": ("FLOAT", True),
    }
    kinds = {c.name: (c.field_type.replace("FLOAT64", "FLOAT"), c.mode == "REPEATED") for c in table.schema}
    bad = [name for name, kind in wanted.items() if kinds.get(name) != kind]
    if bad:
        raise IncompatibleTableError(
            f"table {table.reference} cannot be read: it has no column {', '.join(bad)} of the type that "
            "python -m beam_pipeline writes; publish the trainings with it"
        )


def find_trainings(client: bigquery.Client, destination: Destination, towers: Sequence[str]) -> list[Trained]:
    """Returns the trainings in the tables, oldest first; of one date, the one that was published first.

    The log says which run a partition holds as long as the counts of rows agree; partitions that are older than the
    log, or were changed since, are queried themselves.
    """
    names = [destination.table(tower).rsplit(".", 1)[1] for tower in towers]
    tower_of = dict(zip(names, towers, strict=True))
    held: dict[tuple[str, date], int] = {}
    for name, partition, rows in query(client, partitions_sql(destination, names)):
        if re.fullmatch(r"\d{8}", partition):
            held[tower_of[name], datetime.strptime(partition, "%Y%m%d").date()] = rows
    logged: dict[tuple[str, date], list[tuple[str, int]]] = {}
    order: dict[str, int] = {}
    about: dict[str, tuple[str, str]] = {}
    try:
        entries = query(client, logged_sql(destination))
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
        sql = runs_sql(str(table.reference), [column.name for column in table.schema])
        for day, run_id, rows, run_name, experiment_name in query(client, sql, parameter):
            if run_id is not None:
                found.setdefault((day, run_id), {})[tower] = rows
                about.setdefault(run_id, (run_name or "", experiment_name or ""))
    ordered = sorted(found, key=lambda key: (key[0], order.get(key[1], -len(entries)), key[1]))
    return [Trained(day, run_id, *about[run_id], found[day, run_id]) for day, run_id in ordered]


def resolve(trainings: Sequence[Trained], wanted: str, flag: str) -> Trained:
    """Returns the training of a date or run id.

    Args:
        trainings: oldest first.
        wanted: the date or run id.
        flag: that named it, for the message.

    Raises:
        TrainingMissingError: there is none.
        ConfigError: a date has several runs.
    """
    try:
        return of_date(trainings, date.fromisoformat(wanted), flag)
    except ValueError:
        pass
    runs = [one for one in trainings if one.run_id == wanted]
    if not runs:
        raise TrainingMissingError(f"{flag}={wanted}: the tables hold no such run; there are {named(trainings)}")
    return runs[-1]


def of_date(trainings: Sequence[Trained], day: date, flag: str) -> Trained:
    """Returns the only training of a date; raises as `resolve` does."""
    runs = [one for one in trainings if one.train_date == day]
    if not runs:
        raise TrainingMissingError(
            f"{flag}={day}: the tables hold no training of that date; there are {named(trainings)}"
        )
    if len(runs) > 1:
        raise ConfigError(f"{day} has {len(runs)} runs, {named(runs)}; name one by its run id with {flag}")
    return runs[0]


def named(trainings: Sequence[Trained]) -> str:
    """Returns the latest of the trainings in words."""
    more = len(trainings) - _NAMED
    latest = ", ".join(f"{one} ({one.run_id})" for one in trainings[-_NAMED:])
    return f"{latest} and {more:,} earlier" if more > 0 else latest


def check_labels(client: bigquery.Client, labels: Mapping[str, str], towers: Sequence[str]) -> None:
    """Raises LabelsError if a query for labels fails, gives an id twice, or is for a tower that is not there.

    Args:
        client: for the dataset.
        labels: tower → the query.
        towers: those that are there.
    """
    for tower, query in labels.items():
        if tower not in towers:
            raise LabelsError(f"--labels={tower}=…: there is no tower {tower!r}; towers are {', '.join(towers)}")
        sql = double_labels_sql(query)
        try:
            client.query(sql, job_config=bigquery.QueryJobConfig(dry_run=True))  # A mistake costs nothing.
            twice = [row.values() for row in client.query_and_wait(sql)]
        except GoogleAPICallError as error:
            reason = (error.message or str(error)).strip().splitlines()[0]
            raise LabelsError(f"--labels={tower}=…: the query for id, label and group_name fails: {reason}") from error
        for name, times in twice:
            raise LabelsError(f"--labels={tower}=…: the query gives id {name!r} {times} times; an id has one label")


def vector_lengths(client: bigquery.Client, destination: Destination, tower: str) -> dict[date, int]:
    """Returns date → length of a vector in each partition that holds rows.

    The log says so without reading a vector; where it has no entry, one row is looked at.
    """
    name = destination.table(tower)
    partitions = query(client, partitions_sql(destination, [split_name(name)[2]]))
    days = [datetime.strptime(partition, "%Y%m%d").date() for _, partition, _ in partitions if partition.isdigit()]
    try:
        logged = dict(query(client, dimensions_sql(destination, tower)))
    except NotFound:
        logged = {}
    found = {day: logged.get(day) or vector_length(client, name, tower, day) for day in sorted(days)}
    return {day: length for day, length in found.items() if length}


def vector_length(client: bigquery.Client, table: str, tower: str, day: date) -> int | None:
    """Returns the length of a vector in a partition; None if its rows have been deleted meanwhile.

    One row is listed, which is free: a query, LIMIT 1 or not, is billed for the vectors of the whole partition. The log
    would cost its 10 MB, and does not know what was deleted or written by others since.
    """
    if emulators.emulated():  # They do not know `table$day`, and bill nobody.
        parameter = bigquery.ScalarQueryParameter("day", "DATE", day)
        for (length,) in query(client, dimension_sql(table, tower), parameter):
            return int(length)
        return None
    partition = bigquery.TableReference.from_string(f"{table}${day:%Y%m%d}")
    vectors = [column for column in schema_fields(tower) if column.name == f"{tower}_embedding"]
    for (vector,) in client.list_rows(partition, selected_fields=vectors, max_results=1):
        return len(vector)
    return None


def query(client: bigquery.Client, sql: str, *parameters: Any) -> list[tuple[Any, ...]]:
    """Returns all rows of a query with these parameters."""
    config = bigquery.QueryJobConfig(query_parameters=list(parameters))
    return [row.values() for row in client.query_and_wait(sql, job_config=config)]


# The SQL.


def partitions_sql(destination: Destination, names: Sequence[str]) -> str:
    """Returns a query for the partitions of these tables that hold rows, by metadata.

    The names are literals: of a dataset with more than a thousand tables, BigQuery refuses to look at all of them.
    """
    listed = ", ".join(map(literal, names))
    return (
        "SELECT table_name, partition_id, total_rows "
        f"FROM `{destination.project}.{destination.dataset}`.INFORMATION_SCHEMA.PARTITIONS "
        f"WHERE table_name IN ({listed}) AND total_rows > 0 AND partition_id NOT LIKE '\\\\_\\\\_%'"
    )


def logged_sql(destination: Destination) -> str:
    """Returns a query for what the log says of each run and tower, latest publication first."""
    return (
        "SELECT train_date, tower, mlflow_run_id, mlflow_run_name, mlflow_experiment_name, row_count "
        f"FROM `{destination.log}` WHERE TRUE "  # without one, QUALIFY is an error
        "QUALIFY ROW_NUMBER() OVER (PARTITION BY train_date, tower, mlflow_run_id ORDER BY published_at DESC) = 1 "
        "ORDER BY published_at DESC"
    )


def dimensions_sql(destination: Destination, tower: str) -> str:
    """Returns a query for the length of the vectors that were published last of each date."""
    return (
        f"SELECT {PARTITION_COLUMN}, dimension FROM `{destination.log}` WHERE tower = {literal(tower)} "
        f"QUALIFY ROW_NUMBER() OVER (PARTITION BY {PARTITION_COLUMN} ORDER BY published_at DESC) = 1"
    )


def runs_sql(table: str, names: Sequence[str]) -> str:
    """Returns a query for the runs in some partitions; parameter: days (ARRAY<DATE>).

    Args:
        table: a tower's history.
        names: columns that the table has of mlflow_run_name and mlflow_experiment_name.
    """
    named = [f"ANY_VALUE({name})" if name in names else "''" for name in ("mlflow_run_name", "mlflow_experiment_name")]
    return (
        f"SELECT {PARTITION_COLUMN}, mlflow_run_id, COUNT(*), {', '.join(named)} FROM `{table}` "
        f"WHERE {PARTITION_COLUMN} IN UNNEST(@days) GROUP BY {PARTITION_COLUMN}, mlflow_run_id"
    )


def labels_sql(query: str) -> str:
    """Returns the query for labels as strings, in parentheses, whatever types it gives."""
    columns = ", ".join(f"CAST(given.{name} AS STRING) AS {name}" for name in ("id", "label", "group_name"))
    return f"(SELECT {columns} FROM ({query}\n) AS given)"


def double_labels_sql(query: str) -> str:
    """Returns a query for one id that a labels query gives twice."""
    return f"SELECT id, COUNT(*) FROM {labels_sql(query)} GROUP BY id HAVING COUNT(*) > 1 ORDER BY id LIMIT 1"
