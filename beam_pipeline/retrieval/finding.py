"""Runs a search: on BigQuery by VECTOR_SEARCH, in an emulator by comparing with every vector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from google.api_core.exceptions import GoogleAPICallError
from google.cloud import bigquery

from beam_pipeline.bigquery import history
from beam_pipeline.errors import IdMissingError, LabelsError, SearchError, ZeroVectorError
from beam_pipeline.retrieval import exact, sql
from beam_pipeline.retrieval.sql import Search


@dataclass(frozen=True)
class Neighbour:
    """An id that was found.

    Attributes:
        id: the id.
        value: its distance, or its score.
        label, group_name: from --labels.
    """

    id: str
    value: float
    label: str | None = None
    group_name: str | None = None


def find_vector(client: bigquery.Client, search: Search) -> list[float]:
    """Returns the vector of the id.

    Raises:
        IdMissingError: the training has none.
        ZeroVectorError: it has no cosine, and that is what is searched by.
        SearchError: BigQuery refuses.
    """
    rows = _ask(client, sql.vector_sql(search))
    where = f"training {search.training} ({search.training.run_id})"
    if not rows:
        raise IdMissingError(
            f"there is no {search.tower} {search.id!r} in {where}: {search.destination.table(search.tower)} has "
            f"{search.training.rows[search.tower]:,} others; name one of them, or another training"
        )
    vector = list(rows[0][0])
    if search.distance == "COSINE" and not any(vector):
        raise ZeroVectorError(
            f"the vector of {search.tower} {search.id!r} in {where} is zero, and has no cosine; search with "
            "--distance=DOT_PRODUCT or EUCLIDEAN"
        )
    return vector


def find(client: bigquery.Client, search: Search, vector: Sequence[float], *, emulated: bool) -> list[Neighbour]:
    """Returns the neighbours, nearest first.

    Args:
        client: for the dataset.
        search: what is wanted.
        vector: of the id.
        emulated: the tables are in an emulator.

    Raises:
        ZeroVectorError: a vector has no cosine.
        SearchError: BigQuery refuses.
    """
    if emulated:
        return [Neighbour(*one) for one in exact.find(search, vector)]
    if search.distance == "COSINE" and (zeros := _zero_vectors(client, search)):
        raise exact.no_cosine(search, zeros)
    return [Neighbour(*row) for row in _ask(client, sql.search_sql(search))]


def label(client: bigquery.Client, query: str, neighbours: Sequence[Neighbour]) -> list[Neighbour]:
    """Returns the neighbours with what a query for labels says of them.

    Raises:
        LabelsError: the query fails.
    """
    ids = bigquery.ArrayQueryParameter("ids", "STRING", [one.id for one in neighbours])
    try:
        found = {name: rest for name, *rest in history.query(client, sql.found_labels_sql(query), ids)}
    except GoogleAPICallError as error:
        raise LabelsError(f"the query for labels fails: {_reason(error)}") from error
    return [
        replace(one, label=found[one.id][0], group_name=found[one.id][1]) if one.id in found else one
        for one in neighbours
    ]


def plan(client: bigquery.Client, search: Search, *, emulated: bool) -> list[str]:
    """Returns what the search would read and cost, in lines."""
    table = search.destination.table(search.among)
    result = [f"table       {table}, partition {search.training.train_date}"]
    if emulated:
        return [*result, "reads       every vector of the partition; emulators do not say how many bytes a query reads"]
    # An answer from the cache would cost nothing, and say so.
    dry = bigquery.QueryJobConfig(dry_run=True, use_query_cache=False)
    try:
        size = client.query(sql.search_sql(search), job_config=dry).total_bytes_processed or 0
    except GoogleAPICallError as error:
        raise SearchError(f"BigQuery refuses the search: {_reason(error)}") from error
    dollars = size / (1 << 40) * history.DOLLARS_PER_TIB
    return [*result, f"reads       {size / 1e9:,.3f} GB: about ${dollars:,.4f} at ${history.DOLLARS_PER_TIB}/TiB"]


def _zero_vectors(client: bigquery.Client, search: Search) -> int:
    try:
        return next((zeros or 0 for (zeros,) in history.query(client, sql.zero_vectors_sql(search))), 0)
    except GoogleAPICallError:  # No log, or an old one: then the search itself says so.
        return 0


def _ask(client: bigquery.Client, text: str) -> list[tuple[Any, ...]]:
    try:
        return history.query(client, text)
    except GoogleAPICallError as error:
        raise SearchError(f"BigQuery refuses the search: {_reason(error)}") from error


def _reason(error: GoogleAPICallError) -> str:
    return (error.message or str(error)).strip().splitlines()[0]
