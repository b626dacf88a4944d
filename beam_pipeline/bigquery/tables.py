"""The destination tables: names, schema, what is compatible with it, and the SQL that touches them.

Functions only; nothing here talks to BigQuery.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import TYPE_CHECKING, Any

from google.cloud import bigquery

from beam_pipeline import __version__
from beam_pipeline.formats.model import Tower
from beam_pipeline.training import Run, Training

if TYPE_CHECKING:
    from beam_pipeline.reading.tally import Tally

PARTITION_COLUMN, TRAINING_COLUMN = "train_date", "training"
_TYPE_ALIASES = {"FLOAT64": "FLOAT", "INT64": "INTEGER", "BOOL": "BOOLEAN"}
_SAFE_LITERAL = re.compile(r"[A-Za-z0-9_.:-]{1,256}")


@dataclass(frozen=True)
class Destination:
    """Where the towers' tables are.

    Attributes:
        project, dataset: of BigQuery.
        location: the dataset's, where every job has to run.
        prefix: first part of every table's name.
        staging_dataset: `project.dataset` of the staging tables, if it is another.
        suffix: last part of every table's name; log and lock carry it too, so that histories do not mix.
        billing_project: where jobs run and are billed, if --project names it; None: in the tables' project.
    """

    project: str
    dataset: str
    location: str
    prefix: str
    staging_dataset: str | None = None
    suffix: str = ""
    billing_project: str | None = None

    @property
    def job_project(self) -> str:
        """The project in which jobs run and are billed."""
        return self.billing_project or self.project

    def table(self, tower: str) -> str:
        """Returns `project.dataset.table` of a tower's history."""
        return f"{self.project}.{self.dataset}.{self.prefix}_{tower}_embedding{self.suffix}"

    def staging(self, tower: str, launch: str) -> str:
        """Returns `project.dataset.table` of a tower's staging table, which no other launch uses."""
        dataset = self.staging_dataset or f"{self.project}.{self.dataset}"
        return f"{dataset}.{self.prefix}_{tower}_embedding{self.suffix}_staging_{launch}"

    def latest(self, tower: str) -> str:
        """Returns `project.dataset.table` of a tower's newest training alone."""
        return f"{self.project}.{self.dataset}.{self.prefix}_{tower}_embedding_latest{self.suffix}"

    @property
    def log(self) -> str:
        """`project.dataset.table` of the record of every publication."""
        return f"{self.project}.{self.dataset}.{self.prefix}_embedding{self.suffix}_log"

    @property
    def lock(self) -> str:
        """`project.dataset.table` of the one-row table that makes publications conflict."""
        return f"{self.project}.{self.dataset}.{self.prefix}_embedding{self.suffix}_lock"


def split_name(table: str) -> tuple[str, str, str]:
    """Returns project, dataset and table of `project.dataset.table`; a project may be `example.com:project`."""
    project, dataset, name = table.rsplit(".", 2)
    return project, dataset, name


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


def staging_schema(tower: str) -> list[dict[str, str]]:
    """Returns the columns of a tower's staging table: what differs from row to row, and which training it is."""
    partition, *_, name, vector = schema(tower)
    number = {
        "name": TRAINING_COLUMN,
        "type": "INTEGER",
        "mode": "REQUIRED",
        "description": "Number of the training in its launch",
    }
    return [partition, number, name, vector]


LOG_SCHEMA = [
    bigquery.SchemaField(name, type_, description=description)
    for name, type_, description in (
        ("published_at", "TIMESTAMP", "When the transaction of the publication began"),
        ("train_date", "DATE", "The partition"),
        ("mlflow_experiment_id", "STRING", "MLflow experiment"),
        ("mlflow_experiment_name", "STRING", "Name of the MLflow experiment"),
        ("mlflow_run_id", "STRING", "MLflow run of the training"),
        ("mlflow_run_name", "STRING", "Name of the MLflow run"),
        ("model_uri", "STRING", "Where the model was"),
        ("tower", "STRING", "The tower"),
        ("table_name", "STRING", "The table, as project.dataset.table"),
        ("row_count", "INTEGER", "Rows published: ids of the tower"),
        ("dimension", "INTEGER", "Values in a vector"),
        ("norm_min", "FLOAT", "Smallest Euclidean norm of a vector"),
        ("norm_mean", "FLOAT", "Mean Euclidean norm"),
        ("norm_max", "FLOAT", "Largest Euclidean norm"),
        ("zero_vectors", "INTEGER", "Vectors of zeros alone, which have no cosine"),
        ("bytes_read", "INTEGER", "Bytes read of the embedding matrix"),
        ("checksum", "STRING", "The artifact's own checksum, verified: algorithm and hexadecimal value"),
        (
            "vector_source",
            "STRING",
            "What the vectors are: embedding, which the model serves; embedding_rows, after which the tower continues; "
            "computed, the tower's output",
        ),
        ("computed_by", "STRING", "Library that computed the vectors, and its version; NULL if they were read"),
        ("job_name", "STRING", "Beam job"),
        ("launch", "STRING", "Launch of the job; BigQuery's job ids carry it"),
        ("pipeline_version", "STRING", "Version of beam_pipeline"),
        ("run_started_at", "TIMESTAMP", "When the training started; of two of one date, the later one is the newer"),
    )
]

LOCK_SCHEMA = [
    bigquery.SchemaField("launch", "STRING", description="Launch that published last"),
    bigquery.SchemaField("locked_at", "TIMESTAMP", description="When its transaction began"),
]


def schema_fields(tower: str) -> list[bigquery.SchemaField]:
    """Returns the same columns as google-cloud-bigquery's fields."""
    return [bigquery.SchemaField.from_api_repr(column) for column in schema(tower)]


def staging_fields(tower: str) -> list[bigquery.SchemaField]:
    """Returns the columns of a staging table as google-cloud-bigquery's fields."""
    return [bigquery.SchemaField.from_api_repr(column) for column in staging_schema(tower)]


def run_values(run: Run) -> dict[str, Any]:
    """Returns the values of all columns but the last two: they are the same in every row of a training."""
    return {
        PARTITION_COLUMN: run.train_date,
        "mlflow_experiment_id": run.experiment_id,
        "mlflow_experiment_name": run.experiment_name,
        "mlflow_run_id": run.run_id,
        "mlflow_run_name": run.run_name,
    }


def staged_values(trainings: Sequence[Training]) -> dict[str, dict[str, Any]]:
    """Returns run id → the values of a staging table's columns but the last two; they distinguish the trainings."""
    return {
        training.run.run_id: {PARTITION_COLUMN: training.run.train_date, TRAINING_COLUMN: number}
        for number, training in enumerate(trainings)
    }


def differences(table: bigquery.Table, tower: str, *, partitioned: bool = True) -> list[str]:
    """Returns what keeps a table from being a tower's history, in words; empty if it can be used.

    A table of the newest training alone has the same columns, and is not `partitioned`.

    Missing columns are no difference, they can be added; NULLABLE where we would write REQUIRED is none either.
    """
    found = []
    if table.table_type not in (None, "TABLE"):
        found.append(f"it is a {table.table_type}, not a table")
    partitioning = table.time_partitioning
    if not partitioned:
        if partitioning is not None:
            found.append("it is partitioned, and holds one training alone")
    elif partitioning is None:
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
        if other.mode == "REQUIRED" and not other.default_value_expression:  # An INSERT without it would fail.
            found.append(f"column {other.name} is REQUIRED, and this job does not write it")
    return found


def missing_columns(table: bigquery.Table, wanted: Sequence[bigquery.SchemaField]) -> list[bigquery.SchemaField]:
    """Returns the columns that a table lacks."""
    existing = {column.name.lower() for column in table.schema}
    return [column for column in wanted if column.name.lower() not in existing]


def add_columns_sql(name: str, table: bigquery.Table, wanted: Sequence[bigquery.SchemaField]) -> list[str]:
    """Returns the statement that adds a table's missing columns, NULLABLE or REPEATED as BigQuery allows it, or none.

    One for all columns: BigQuery takes five changes of a table's metadata in ten seconds
    (https://cloud.google.com/bigquery/quotas#standard_tables).
    """
    added = [
        f"ADD COLUMN IF NOT EXISTS {column.name} "
        + (f"ARRAY<{_sql_type(column)}>" if column.mode == "REPEATED" else _sql_type(column))
        for column in missing_columns(table, wanted)
    ]
    return [f"ALTER TABLE `{name}` {', '.join(added)}"] if added else []


def keep_forever_sql(table: str, partitioned: bool) -> str:
    """Returns the statement that takes the expirations from a table which inherited them from its dataset."""
    options = ["expiration_timestamp = NULL", *(["partition_expiration_days = NULL"] if partitioned else [])]
    return f"ALTER TABLE `{table}` SET OPTIONS ({', '.join(options)})"


def lock_rows_sql(destination: Destination) -> str:
    """Returns a query for the number of rows of the lock table."""
    return f"SELECT COUNT(*) FROM `{destination.lock}`"


def fill_lock_sql(destination: Destination) -> str:
    """Returns the statement that gives an empty lock table its row."""
    return f"INSERT INTO `{destination.lock}` (launch) VALUES (NULL)"


def literal(value: date | datetime | float | str) -> str:
    """Returns a SQL literal for the publish script, which takes no query parameters.

    Raises:
        ValueError: a string with anything but letters, digits and `_ . : -`, so that no value can end its literal.
    """
    if isinstance(value, datetime):
        return f"TIMESTAMP '{value.astimezone(UTC):%Y-%m-%d %H:%M:%S.%f}+00'"
    if isinstance(value, date):
        return f"DATE '{value.isoformat()}'"
    if isinstance(value, float | int):
        return repr(value)
    if not _SAFE_LITERAL.fullmatch(value):
        raise ValueError(f"{value!r} is not allowed in the publish script: only letters, digits and _ . : - are")
    return f"'{value}'"


def text(value: str) -> str:
    """Returns a SQL expression for any string, of letters and digits alone: no value can end its literal."""
    return f"SAFE_CONVERT_BYTES_TO_STRING(FROM_HEX('{value.encode().hex()}'))"


def publish_script(
    destination: Destination,
    number: int,
    training: Training,
    launch: str,
    if_partition_taken: str,
    tallies: Mapping[str, Tally],
    job_name: str,
    *,
    latest_tables: bool = False,
) -> str:
    """Returns the one transaction that makes all towers of a training visible at once, and records it.

    It begins by updating the lock table, so that of two publications at the same time BigQuery cancels one, which
    then starts over: reading and appending alone would not conflict, and both could pass the same check.

    Args:
        destination: the tables.
        number: of the training in its launch; its staged rows carry it.
        training: what is published.
        launch: the launch id.
        if_partition_taken: "fail", "replace" or "keep".
        tallies: tower → what was read of it, for the log.
        job_name: of the Beam job, for the log.
        latest_tables: also replace the latest tables, unless a newer training is published.
    """
    run, towers = training.run, [*training.towers]
    day, run_id = literal(run.train_date), literal(run.run_id)
    partition = f"{PARTITION_COLUMN} = {day}"
    of_others = f"{partition} AND (mlflow_run_id IS NULL OR mlflow_run_id != {run_id})"
    of_ours = f"{partition} AND mlflow_run_id = {run_id}"
    statements = [
        "BEGIN TRANSACTION",
        lock_sql(destination, launch),
    ]
    if if_partition_taken == "fail":
        # Again: another run may have published since the report. ERROR() aborts the transaction; so would RAISE or
        # ASSERT, but not in the emulator.
        statements += [
            f"SELECT IF(EXISTS(SELECT 1 FROM `{destination.table(tower)}` WHERE {of_others}), "
            f"ERROR('{TAKEN_MARK} {destination.table(tower)}'), 1)"
            for tower in towers
        ]
    # What is the same in every row is not staged.
    of_run = [
        day,
        literal(run.experiment_id),
        text(run.experiment_name),
        run_id,
        text(run.run_name),
    ]
    for tower in towers:
        columns = [column["name"] for column in schema(tower)]
        # By the partition column alone a DELETE drops the whole partition, which costs nothing.
        statements += [
            f"DELETE FROM `{destination.table(tower)}` WHERE {of_ours if if_partition_taken == 'keep' else partition}",
            f"INSERT INTO `{destination.table(tower)}` ({', '.join(columns)}) "
            f"SELECT {', '.join([*of_run, *columns[-2:]])} FROM `{destination.staging(tower, launch)}` "
            f"WHERE {_staged(run, number)}",
        ]
    if latest_tables:
        for tower in towers:
            statements += replace_latest_sql(
                destination, tower, run.train_date, run.run_id, _newest(destination, tower, run)
            )
    entries = ", ".join(
        f"({', '.join(_log_entry(destination, training, tower, launch, tallies[tower.name], job_name).values())})"
        for tower in training.towers.values()
    )
    log_columns = ", ".join(column.name for column in LOG_SCHEMA)
    statements.append(f"INSERT INTO `{destination.log}` ({log_columns}) VALUES {entries}")
    statements.append("COMMIT TRANSACTION")
    return "".join(f"{statement};\n" for statement in statements)


def _log_entry(
    destination: Destination, training: Training, tower: Tower, launch: str, tally: Tally, job_name: str
) -> dict[str, str]:
    """Returns column → SQL expression of a tower's row in the log, in the order of the log's columns."""
    run, checksum = training.run, tower.matrix.checksum
    return {
        "published_at": "CURRENT_TIMESTAMP()",
        "train_date": literal(run.train_date),
        "mlflow_experiment_id": literal(run.experiment_id),
        "mlflow_experiment_name": text(run.experiment_name),
        "mlflow_run_id": literal(run.run_id),
        "mlflow_run_name": text(run.run_name),
        "model_uri": text(tower.model_uri or training.model_uri),
        "tower": literal(tower.name),
        "table_name": text(destination.table(tower.name)),
        "row_count": literal(tally.ids),
        "dimension": literal(tower.matrix.dimension),
        "norm_min": literal(tally.norm_min),
        "norm_mean": literal(tally.norm_mean),
        "norm_max": literal(tally.norm_max),
        "zero_vectors": literal(tally.zero_vectors),
        "bytes_read": literal(tally.bytes),
        "checksum": literal(f"{checksum.algorithm}:{checksum.value:08x}") if checksum else "NULL",
        "vector_source": literal(tower.vector_source),
        "computed_by": text(tower.computed_by) if tower.computed_by else "NULL",
        "job_name": text(job_name),
        "launch": literal(launch),
        "pipeline_version": literal(__version__),
        "run_started_at": literal(run.started_at),
    }


def create_features_sql(table: str, select: str, kms_key: str | None) -> str:
    """Returns the statement that keeps the result of a query for features in a table for two days at most."""
    options = ["expiration_timestamp = TIMESTAMP_ADD(CURRENT_TIMESTAMP(), INTERVAL 48 HOUR)"]
    if kms_key:
        options.append(f"kms_key_name = '{kms_key}'")
    return f"CREATE OR REPLACE TABLE `{table}` OPTIONS ({', '.join(options)}) AS\n{select}"


def count_sql(table: str) -> str:
    """Returns a query for the number of a table's rows."""
    return f"SELECT COUNT(*) FROM `{table}`"


def _newest(destination: Destination, tower: str, run: Run) -> str:
    """Returns the condition that no training of a tower is newer than a run: by date, then by when it started."""
    day = f"{PARTITION_COLUMN} = {literal(run.train_date)}"
    return (
        f"NOT EXISTS(SELECT 1 FROM `{destination.table(tower)}` WHERE {PARTITION_COLUMN} > {literal(run.train_date)}) "
        f"AND NOT EXISTS(SELECT 1 FROM `{destination.log}` WHERE tower = {literal(tower)} AND {day} "
        f"AND run_started_at > {literal(run.started_at)})"
    )


def replace_latest_sql(
    destination: Destination, tower: str, train_date: date, run_id: str, condition: str
) -> list[str]:
    """Returns the statements that put a published training in place of a tower's latest one, on a condition."""
    columns = ", ".join(column["name"] for column in schema(tower))
    latest = destination.latest(tower)
    return [
        f"DELETE FROM `{latest}` WHERE {condition}",
        f"INSERT INTO `{latest}` ({columns}) SELECT {columns} FROM `{destination.table(tower)}` "
        f"WHERE {PARTITION_COLUMN} = {literal(train_date)} AND mlflow_run_id = {literal(run_id)} AND {condition}",
    ]


def rollback_script(destination: Destination, towers: Sequence[str], train_date: date, run_id: str, launch: str) -> str:
    """Returns the one transaction that puts a published training into the latest tables, whatever is there."""
    statements = ["BEGIN TRANSACTION", lock_sql(destination, launch)]
    for tower in towers:
        statements += replace_latest_sql(destination, tower, train_date, run_id, "TRUE")
    return "".join(f"{statement};\n" for statement in [*statements, "COMMIT TRANSACTION"])


def lock_sql(destination: Destination, launch: str) -> str:
    """Returns the statement that makes publications conflict, the first of each."""
    return f"UPDATE `{destination.lock}` SET launch = {literal(launch)}, locked_at = CURRENT_TIMESTAMP() WHERE TRUE"


TAKEN_MARK = "partition taken:"
"""How the publish script's own error about a taken partition begins."""


def audit_sql(destination: Destination, tower: str, launch: str) -> str:
    """Returns a query for rows and distinct ids of each training in a staging table; it reads no vectors."""
    return (
        f"SELECT {PARTITION_COLUMN}, {TRAINING_COLUMN}, COUNT(*), COUNT(DISTINCT {tower}_id) "
        f"FROM `{destination.staging(tower, launch)}` GROUP BY {PARTITION_COLUMN}, {TRAINING_COLUMN}"
    )


def duplicates_sql(destination: Destination, tower: str, launch: str, run: Run, number: int) -> str:
    """Returns a query for one id that appears more than once in a training."""
    return (
        f"SELECT {tower}_id, COUNT(*) FROM `{destination.staging(tower, launch)}` "
        f"WHERE {_staged(run, number)} "
        f"GROUP BY {tower}_id HAVING COUNT(*) > 1 ORDER BY COUNT(*) DESC, {tower}_id LIMIT 1"
    )


def _staged(run: Run, number: int) -> str:
    """Returns the condition for a training's rows in a staging table."""
    # The number would do; by the date BigQuery reads one partition of many trainings'.
    return f"{PARTITION_COLUMN} = {literal(run.train_date)} AND {TRAINING_COLUMN} = {literal(number)}"


def partitions_sql(table: str) -> str:
    """Returns a query for the rows of each run in each partition; parameters: first, last (DATE)."""
    return (
        f"SELECT {PARTITION_COLUMN}, mlflow_run_id, COUNT(*) FROM `{table}` "
        f"WHERE {PARTITION_COLUMN} BETWEEN @first AND @last GROUP BY {PARTITION_COLUMN}, mlflow_run_id"
    )


def latest_partition_sql(table: str) -> str:
    """Returns a query for the newest partition of a table that holds rows, by metadata.

    The name is a literal, no parameter: by a literal alone BigQuery knows which table is meant, and it refuses to look
    at more than a thousand (https://cloud.google.com/bigquery/docs/information-schema-partitions).
    """
    project, dataset, name = split_name(table)
    # Not the partitions __NULL__ and __UNPARTITIONED__, which are no dates.
    return (
        f"SELECT MAX(partition_id) FROM `{project}.{dataset}`.INFORMATION_SCHEMA.PARTITIONS "
        f"WHERE table_name = {literal(name)} AND total_rows > 0 AND partition_id NOT LIKE '\\\\_\\\\_%'"
    )


def latest_publication_sql(destination: Destination) -> str:
    """Returns a query for the log's rows of a run's latest publication; parameter: run_id (STRING)."""
    log = f"`{destination.log}`"
    return (
        f"SELECT tower, table_name, train_date, row_count FROM {log} WHERE mlflow_run_id = @run_id "
        f"AND published_at = (SELECT MAX(published_at) FROM {log} WHERE mlflow_run_id = @run_id) ORDER BY tower"
    )


def dimension_sql(table: str, tower: str) -> str:
    """Returns a query for the vector length in a partition; parameter: day (DATE)."""
    return f"SELECT ARRAY_LENGTH({tower}_embedding) FROM `{table}` WHERE {PARTITION_COLUMN} = @day LIMIT 1"


def _sql_type(column: bigquery.SchemaField) -> str:
    """The type as SQL spells it; the API has older names."""
    return {alias: name for name, alias in _TYPE_ALIASES.items()}.get(column.field_type, column.field_type)


def _type(column: bigquery.SchemaField) -> str:
    return _TYPE_ALIASES.get(column.field_type.upper(), column.field_type.upper())
