"""What the launcher checks before anything is written."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from google.api_core.exceptions import GoogleAPICallError, NotFound
from google.auth.exceptions import GoogleAuthError
from google.cloud import bigquery

from beam_pipeline import tables
from beam_pipeline.errors import (
    ConfigError,
    DatasetMissingError,
    DimensionChangedError,
    IncompatibleTableError,
    PartitionTakenError,
)
from beam_pipeline.formats.artifact import Tower
from beam_pipeline.publication import require_compatible
from beam_pipeline.runs import Run
from beam_pipeline.tables import Destination


def find_destination(project: str, dataset: str, prefix: str, *, make_dataset: bool = False) -> Destination:
    """Returns the destination in the dataset's own location.

    Args:
        project: BigQuery project.
        dataset: its dataset.
        prefix: first part of the tables' names.
        make_dataset: make it if missing; for the embedded warehouse alone.

    Raises:
        DatasetMissingError: there is no such dataset.
        ConfigError: BigQuery cannot be asked.
    """
    try:
        client = bigquery.Client(project=project)
        if make_dataset:
            client.create_dataset(f"{project}.{dataset}", exists_ok=True)
        location = client.get_dataset(f"{project}.{dataset}").location
    except NotFound as error:
        raise DatasetMissingError(
            f"dataset {project}.{dataset} does not exist; make it where the bucket is: "
            f"bq --location=EU mk --dataset {project}:{dataset}"
        ) from error
    except (GoogleAPICallError, GoogleAuthError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"BigQuery does not answer for dataset {project}.{dataset}: {reason}") from error
    return Destination(project, dataset, location or "US", prefix)


def check_table(
    client: bigquery.Client,
    destination: Destination,
    tower: Tower,
    run: Run,
    *,
    if_partition_taken: str,
    allow_dimension_change: bool,
) -> None:
    """Checks one tower's table, if it exists already.

    Raises:
        IncompatibleTableError: it cannot be the tower's history.
        PartitionTakenError: its partition holds another run, which is named, and may not be replaced.
        DimensionChangedError: its latest partition holds vectors of another length.
    """
    name = destination.table(tower.name)
    try:
        table = client.get_table(name)
    except NotFound:
        return
    require_compatible(table, tower.name)
    _require_lasting(table, run)
    day = bigquery.ScalarQueryParameter("day", "DATE", run.train_date)
    if if_partition_taken == "fail":
        run_id = bigquery.ScalarQueryParameter("run_id", "STRING", run.run_id)
        for other, rows in _query(client, tables.taken_sql(name), day, run_id):
            raise PartitionTakenError(
                f"partition {run.train_date} of {name} holds {rows:,} rows of run {other}; "
                "--if_partition_taken=replace puts this run in its place, keep leaves both"
            )
    if not allow_dimension_change:
        _require_dimension(client, destination, tower)


def _require_lasting(table: bigquery.Table, run: Run) -> None:
    expiration = table.time_partitioning.expiration_ms
    age = (datetime.now(UTC).date() - run.train_date).days
    if expiration and age * 24 * 3600 * 1000 >= expiration:
        raise IncompatibleTableError(
            f"table {table.table_id} keeps partitions for {expiration // (24 * 3600 * 1000)} days, and "
            f"{run.train_date} was {age} days ago: BigQuery would delete its rows at once; lengthen that expiration"
        )


def _require_dimension(client: bigquery.Client, destination: Destination, tower: Tower) -> None:
    name = destination.table(tower.name)
    table = bigquery.ScalarQueryParameter("table", "STRING", name.rsplit(".", 1)[1])
    ((latest,),) = _query(client, tables.latest_partition_sql(destination), table)
    if latest is None:
        return
    newest = datetime.strptime(latest, "%Y%m%d").date()
    day = bigquery.ScalarQueryParameter("day", "DATE", newest)
    for (length,) in _query(client, tables.dimension_sql(name, tower.name), day):
        if length != tower.matrix.dimension:
            raise DimensionChangedError(
                f"tower {tower.name!r}: vectors of {tower.matrix.dimension} values, but the latest partition of {name} "
                f"({newest}) holds vectors of {length}, and VECTOR_SEARCH needs one length; "
                "--allow_dimension_change publishes all the same"
            )


def _query(client: bigquery.Client, sql: str, *parameters: bigquery.ScalarQueryParameter) -> list[tuple[Any, ...]]:
    config = bigquery.QueryJobConfig(query_parameters=list(parameters))
    return [row.values() for row in client.query_and_wait(sql, job_config=config)]
