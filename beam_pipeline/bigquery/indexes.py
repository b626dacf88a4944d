"""Vector indexes: their SQL, which ones a table has, and creating one."""

from __future__ import annotations

import re
from dataclasses import dataclass

from google.api_core.exceptions import GoogleAPICallError
from google.cloud import bigquery

from beam_pipeline import emulators
from beam_pipeline.bigquery.tables import PARTITION_COLUMN, literal, split_name
from beam_pipeline.errors import PublishError

LEAST_BYTES = 10 * 1000 * 1000
"""Of a table: below, BigQuery builds no index (https://cloud.google.com/bigquery/docs/vector-index)."""

_DISTANCE = re.compile(r"distance_type\s*=\s*[\"'](\w+)", re.IGNORECASE)


@dataclass(frozen=True)
class Index:
    """A vector index of a table.

    Attributes:
        name: without project and dataset, which are the table's.
        distance: COSINE, DOT_PRODUCT or EUCLIDEAN.
        status: ACTIVE, PENDING DISABLEMENT, TEMPORARILY DISABLED or PERMANENTLY DISABLED.
        coverage: percentage of the rows that are indexed.
        reason: why it is disabled; empty if it is not.
    """

    name: str
    distance: str
    status: str
    coverage: int
    reason: str = ""


def find_indexes(client: bigquery.Client, table: str) -> list[Index]:
    """Returns a table's vector indexes; those of the embedding, as it has no other column that could have one."""
    found = []
    for name, status, coverage, reason, ddl in (row.values() for row in client.query_and_wait(indexes_sql(table))):
        distance = _DISTANCE.search(ddl or "")
        found.append(
            Index(name, distance[1].upper() if distance else "EUCLIDEAN", status, int(coverage or 0), reason or "")
        )
    return found


def ensure_index(client: bigquery.Client, table: str, tower: str, distance: str, *, partitioned: bool = True) -> None:
    """Creates the index of a tower's table, which BigQuery then builds by itself, unless the table has one.

    Raises:
        PublishError: BigQuery refuses; nothing is published.
    """
    if emulators.emulated():  # They accept the statement, and have no index.
        return
    try:
        if not find_indexes(client, table):
            client.query_and_wait(create_index_sql(table, tower, distance, partitioned=partitioned))
    except GoogleAPICallError as error:
        raise PublishError(
            f"BigQuery refused the vector index of {table}: {error.message}; nothing was published: leave out "
            "--vector_index to publish without one"
        ) from error


def create_index_sql(table: str, tower: str, distance: str, *, partitioned: bool = True) -> str:
    """Returns the statement that creates the index, partitioned as the table is, so that a search of a date prunes."""
    partitions = f"PARTITION BY {PARTITION_COLUMN} " if partitioned else ""
    return (
        f"CREATE VECTOR INDEX IF NOT EXISTS `{index_name(table)}` ON `{table}`({tower}_embedding) "
        f"{partitions}OPTIONS (index_type = 'TREE_AH', distance_type = {literal(distance)})"
    )


def indexes_sql(table: str) -> str:
    """Returns the query for a table's vector indexes."""
    project, dataset, name = split_name(table)
    return (
        "SELECT index_name, index_status, coverage_percentage, disable_reason, ddl "
        f"FROM `{project}.{dataset}`.INFORMATION_SCHEMA.VECTOR_INDEXES WHERE table_name = {literal(name)}"
    )


def index_name(table: str) -> str:
    """Returns the name of the index that is created for a table, in the table's dataset."""
    return f"{split_name(table)[2]}_index"
