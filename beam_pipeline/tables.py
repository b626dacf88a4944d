"""The destination tables: names, schema, what is compatible with it, and the SQL that touches them.

Functions only; nothing here talks to BigQuery.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

from google.cloud import bigquery

from beam_pipeline.runs import Run

PARTITION_COLUMN = "train_date"
_TYPE_ALIASES = {"FLOAT64": "FLOAT", "INT64": "INTEGER", "BOOL": "BOOLEAN"}
_SAFE_LITERAL = re.compile(r"[A-Za-z0-9_.:-]{1,256}")


@dataclass(frozen=True)
class Destination:
    """Where the towers' tables are.

    Attributes:
        project, dataset: of BigQuery.
        location: the dataset's, where every job has to run.
        prefix: first part of every table's name.
    """

    project: str
    dataset: str
    location: str
    prefix: str

    def table(self, tower: str) -> str:
        """Returns `project.dataset.table` of a tower's history."""
        return f"{self.project}.{self.dataset}.{self.prefix}_{tower}_embedding"

    def staging(self, tower: str, launch: str) -> str:
        """Returns `project.dataset.table` of a tower's staging table, which no other launch uses."""
        return f"{self.table(tower)}_staging_{launch}"

    @property
    def lock(self) -> str:
        """`project.dataset.table` of the one-row table that makes publications conflict."""
        return f"{self.project}.{self.dataset}.{self.prefix}_embedding_lock"


def schema(tower: str) -> list[dict[str, str]]:
    """Returns a tower's columns in the form that Beam, its Avro writer and google-cloud-bigquery all take."""
    return [
        {
            "name": PARTITION_COLUMN,
            "type": "DATE",
            "mode": "REQUIRED",
            "description": "Day on which the training started, in UTC",
        },
        {"name": "mlflow_experiment_id", "type": "STRING", "mode": "REQUIRED", "description": "MLflow experiment"},
        {
            "name": "mlflow_experiment_name",
            "type": "STRING",
            "mode": "REQUIRED",
            "description": "Name of the MLflow experiment",
        },
        {"name": "mlflow_run_id", "type": "STRING", "mode": "REQUIRED", "description": "MLflow run of the training"},
        {"name": "mlflow_run_name", "type": "STRING", "mode": "REQUIRED", "description": "Name of the MLflow run"},
        {"name": f"{tower}_id", "type": "STRING", "mode": "REQUIRED", "description": f"The {tower}"},
        {
            "name": f"{tower}_embedding",
            "type": "FLOAT64",
            "mode": "REPEATED",
            "description": f"The {tower}'s embedding after this training",
        },
    ]


def schema_fields(tower: str) -> list[bigquery.SchemaField]:
    """Returns the same columns as google-cloud-bigquery's fields."""
    return [bigquery.SchemaField.from_api_repr(column) for column in schema(tower)]


def run_values(run: Run) -> dict[str, Any]:
    """Returns the values of all columns but the last two: they are the same in every row of a training."""
    return {
        PARTITION_COLUMN: run.train_date,
        "mlflow_experiment_id": run.experiment_id,
        "mlflow_experiment_name": run.experiment_name,
        "mlflow_run_id": run.run_id,
        "mlflow_run_name": run.run_name,
    }


def differences(table: bigquery.Table, tower: str) -> list[str]:
    """Returns what keeps a table from being a tower's history, in words; empty if it can be used.

    Missing columns are no difference, they can be added; NULLABLE where we would write REQUIRED is none either.
    """
    found = []
    if table.table_type not in (None, "TABLE"):
        found.append(f"it is a {table.table_type}, not a table")
    partitioning = table.time_partitioning
    if partitioning is None:
        by_range = getattr(table, "range_partitioning", None)
        found.append(
            f"it is {'partitioned by range' if by_range else 'not partitioned'}, not by DAY({PARTITION_COLUMN})"
        )
    elif partitioning.type_ != "DAY" or partitioning.field != PARTITION_COLUMN:
        field = partitioning.field or "_PARTITIONTIME"
        found.append(f"it is partitioned by {partitioning.type_}({field}), not by DAY({PARTITION_COLUMN})")
    existing = {column.name.lower(): column for column in table.schema}
    wanted = schema_fields(tower)
    for column in wanted:
        other = existing.pop(column.name.lower(), None)
        if other is None:
            continue
        if _type(other) != _type(column):
            found.append(f"column {column.name} is {other.field_type}, not {column.field_type}")
        if (other.mode == "REPEATED") != (column.mode == "REPEATED"):
            found.append(f"column {column.name} is {other.mode or 'NULLABLE'}, not {column.mode}")
    for other in existing.values():
        if other.mode == "REQUIRED" and not other.default_value_expression:
            found.append(f"column {other.name} is REQUIRED, and this job does not write it")
    return found


def missing_columns(table: bigquery.Table, tower: str) -> list[bigquery.SchemaField]:
    """Returns the columns that a table lacks."""
    existing = {column.name.lower() for column in table.schema}
    return [column for column in schema_fields(tower) if column.name.lower() not in existing]


def add_columns_sql(name: str, table: bigquery.Table, tower: str) -> list[str]:
    """Returns the statements that add a table's missing columns, NULLABLE or REPEATED as BigQuery allows it."""
    return [
        f"ALTER TABLE `{name}` ADD COLUMN IF NOT EXISTS {column.name} "
        + (f"ARRAY<{column.field_type}>" if column.mode == "REPEATED" else column.field_type)
        for column in missing_columns(table, tower)
    ]


def literal(value: date | str) -> str:
    """Returns a SQL literal for the publish script, which takes no query parameters.

    Raises:
        ValueError: a string with anything but letters, digits and `_ . : -`, so that no value can end its literal.
    """
    if isinstance(value, date):
        return f"DATE '{value.isoformat()}'"
    if not _SAFE_LITERAL.fullmatch(value):
        raise ValueError(f"{value!r} cannot stand in the publish script: only letters, digits and _ . : - can")
    return f"'{value}'"


def publish_script(
    destination: Destination, towers: Sequence[str], run: Run, launch: str, if_partition_taken: str
) -> str:
    """Returns the one transaction that makes all towers of a training visible at once.

    It begins by updating the lock table, so that of two publications at the same time BigQuery cancels one, which
    then starts over: reading and appending alone would not conflict, and both could pass the same check.
    """
    day, run_id = literal(run.train_date), literal(run.run_id)
    partition = f"{PARTITION_COLUMN} = {day}"
    of_others = f"{partition} AND (mlflow_run_id IS NULL OR mlflow_run_id != {run_id})"
    of_ours = f"{partition} AND mlflow_run_id = {run_id}"
    statements = [
        "BEGIN TRANSACTION",
        f"UPDATE `{destination.lock}` SET launch = {literal(launch)}, locked_at = CURRENT_TIMESTAMP() WHERE TRUE",
    ]
    if if_partition_taken == "fail":
        statements += [
            f"SELECT IF(EXISTS(SELECT 1 FROM `{destination.table(tower)}` WHERE {of_others}), "
            f"ERROR('{TAKEN_MARK} {destination.table(tower)}'), 1)"
            for tower in towers
        ]
    for tower in towers:
        columns = ", ".join(column["name"] for column in schema(tower))
        # By the partition column alone a DELETE drops the whole partition, which costs nothing.
        statements += [
            f"DELETE FROM `{destination.table(tower)}` WHERE {of_ours if if_partition_taken == 'keep' else partition}",
            f"INSERT INTO `{destination.table(tower)}` ({columns}) "
            f"SELECT {columns} FROM `{destination.staging(tower, launch)}`",
        ]
    statements.append("COMMIT TRANSACTION")
    return "".join(f"{statement};\n" for statement in statements)


TAKEN_MARK = "partition taken:"
"""How the publish script's own error about a taken partition begins."""


def audit_sql(destination: Destination, tower: str, launch: str) -> str:
    """Returns a query for the rows and the distinct ids of a staging table; it reads the id column alone."""
    return f"SELECT COUNT(*), COUNT(DISTINCT {tower}_id) FROM `{destination.staging(tower, launch)}`"


def duplicates_sql(destination: Destination, tower: str, launch: str) -> str:
    """Returns a query for one id that appears more than once."""
    return (
        f"SELECT {tower}_id, COUNT(*) FROM `{destination.staging(tower, launch)}` "
        f"GROUP BY {tower}_id HAVING COUNT(*) > 1 ORDER BY COUNT(*) DESC, {tower}_id LIMIT 1"
    )


def taken_sql(table: str) -> str:
    """Returns a query for another run in a partition; parameters: day (DATE), run_id (STRING)."""
    return (
        f"SELECT mlflow_run_id, COUNT(*) FROM `{table}` WHERE {PARTITION_COLUMN} = @day "
        "AND (mlflow_run_id IS NULL OR mlflow_run_id != @run_id) GROUP BY mlflow_run_id ORDER BY 2 DESC LIMIT 1"
    )


def latest_partition_sql(destination: Destination) -> str:
    """Returns a query for the newest partition that holds rows, by metadata; parameter: table (STRING)."""
    return (
        f"SELECT MAX(partition_id) FROM `{destination.project}.{destination.dataset}`.INFORMATION_SCHEMA.PARTITIONS "
        "WHERE table_name = @table AND total_rows > 0 AND partition_id NOT LIKE '\\\\_\\\\_%'"
    )


def dimension_sql(table: str, tower: str) -> str:
    """Returns a query for the vector length in a partition; parameter: day (DATE)."""
    return f"SELECT ARRAY_LENGTH({tower}_embedding) FROM `{table}` WHERE {PARTITION_COLUMN} = @day LIMIT 1"


def _type(column: bigquery.SchemaField) -> str:
    return _TYPE_ALIASES.get(column.field_type.upper(), column.field_type.upper())
