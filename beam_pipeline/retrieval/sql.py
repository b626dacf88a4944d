"""A search and its SQL. Functions only; nothing here talks to BigQuery."""

from __future__ import annotations

import json
from dataclasses import dataclass

from beam_pipeline.bigquery.history import Trained, labels_sql
from beam_pipeline.bigquery.tables import PARTITION_COLUMN, Destination, literal


@dataclass(frozen=True)
class Search:
    """The k nearest ids of one id, in one training.

    Attributes:
        destination: the tables.
        training: whose vectors are compared; those of two trainings cannot be.
        tower: of the id.
        id: whose neighbours are wanted.
        among: the tower that is searched.
        k: neighbours.
        distance: COSINE, DOT_PRODUCT or EUCLIDEAN.
        alone: the training's partition holds no other run.
    """

    destination: Destination
    training: Trained
    tower: str
    id: str
    among: str
    k: int
    distance: str
    alone: bool = True

    @property
    def measure(self) -> str:
        """Name of the number that orders the neighbours: a score, where more is nearer, or a distance."""
        return "score" if self.distance == "DOT_PRODUCT" else "distance"

    @property
    def without_itself(self) -> bool:
        """Whether the id is among those that are searched, and left out."""
        return self.tower == self.among


def quoted(value: str) -> str:
    r"""Returns a GoogleSQL string literal: JSON's escapes (\" \\ \n \u0001) are GoogleSQL's too."""
    return json.dumps(value, ensure_ascii=False)


def search_sql(search: Search) -> str:
    """Returns the query for the neighbours, nearest first: columns id, and distance or score."""
    id_column, vector = f"{search.among}_id", f"{search.among}_embedding"
    # The id itself is the nearest, and is taken out afterwards: a filter on a column that an index does not store is
    # applied after the search anyway.
    top_k = search.k + search.without_itself
    without = f"\nWHERE base.{id_column} != {quoted(search.id)}" if search.without_itself else ""
    # So is the filter on the run, which would leave less than k: where a date has several runs, no index is used.
    exactly = "" if search.alone else """,\n  options => '{"use_brute_force": true}'"""
    value = "-distance AS score" if search.measure == "score" else "distance"
    order = "score DESC" if search.measure == "score" else "distance"
    return (
        f"SELECT base.{id_column} AS id, {value}\n"
        "FROM VECTOR_SEARCH(\n"
        f"  (SELECT {id_column}, {vector} FROM `{search.destination.table(search.among)}`\n"
        f"   WHERE {_of_training(search)}), '{vector}',\n"
        f"  ({vector_sql(search)}),\n"
        f"  query_column_to_search => '{search.tower}_embedding', top_k => {top_k}, "
        f"distance_type => '{search.distance}'{exactly}){without}\n"
        f"ORDER BY {order}, id\nLIMIT {search.k}"
    )


def vector_sql(search: Search) -> str:
    """Returns the query for the vector of the id."""
    return (
        f"SELECT {search.tower}_embedding FROM `{search.destination.table(search.tower)}`\n"
        f"   WHERE {_of_training(search)} AND {search.tower}_id = {quoted(search.id)}"
    )


def zero_vectors_sql(search: Search) -> str:
    """Returns the query for the number of zero vectors in the tower that is searched, from the newest of its log."""
    return (
        f"SELECT zero_vectors FROM `{search.destination.log}` WHERE tower = {literal(search.among)} "
        f"AND {_of_training(search)} ORDER BY published_at DESC LIMIT 1"
    )


def found_labels_sql(query: str) -> str:
    """Returns the query for the labels of some ids; parameter: ids (ARRAY<STRING>)."""
    return f"SELECT id, label, group_name FROM {labels_sql(query)} WHERE id IN UNNEST(@ids)"


def _of_training(search: Search) -> str:
    of_date = f"{PARTITION_COLUMN} = {literal(search.training.train_date)}"
    return of_date if search.alone else f"{of_date} AND mlflow_run_id = {quoted(search.training.run_id)}"
