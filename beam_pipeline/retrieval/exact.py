"""A search that compares with every vector: for emulators, which know no VECTOR_SEARCH.

Rows come in pages of the Storage Read API, and of each page only the nearest are kept: memory does not grow with the
table.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from beam_pipeline.bigquery import storage_read
from beam_pipeline.bigquery.tables import PARTITION_COLUMN, literal
from beam_pipeline.errors import DimensionChangedError, ZeroVectorError
from beam_pipeline.retrieval.sql import Search


def find(search: Search, vector: Sequence[float]) -> list[tuple[str, float]]:
    """Returns (id, distance or score) of the neighbours, nearest first; of equally near ones the first by id.

    Args:
        search: what is wanted.
        vector: of the id.

    Raises:
        ZeroVectorError: a vector has no cosine.
        DimensionChangedError: a vector has another length.
    """
    return nearest(_pages(search), search, np.asarray(vector, float))


def nearest(pages: Iterable[tuple[pa.Array, pa.Array]], search: Search, vector: np.ndarray) -> list[tuple[str, float]]:
    """Returns the same of pages of ids and vectors."""
    ids, distances = np.empty(0, object), np.empty(0)
    for names, column in pages:
        found = _distances(_matrix(column, len(vector)), vector, search)
        ids = np.concatenate([ids, names.to_numpy(zero_copy_only=False).astype(object)])
        distances = np.concatenate([distances, found])
        if search.without_itself:
            others = ids != search.id
            ids, distances = ids[others], distances[others]
        if len(ids) > search.k:  # Sorting all of a page would take longer than measuring it.
            near = distances <= np.partition(distances, search.k - 1)[search.k - 1]
            ids, distances = ids[near], distances[near]
        order = np.lexsort((ids, distances))[: search.k]
        ids, distances = ids[order], distances[order]
    values = -distances if search.measure == "score" else distances
    return [*zip(ids.tolist(), values.tolist(), strict=True)]


def _pages(search: Search) -> Iterator[tuple[pa.Array, pa.Array]]:
    client = storage_read.make_client()
    destination, tower = search.destination, search.among
    fields = [f"{tower}_id", f"{tower}_embedding", "mlflow_run_id"]
    restriction = f"{PARTITION_COLUMN} = {literal(search.training.train_date)}"
    for stream in storage_read.open_streams(
        client, destination.job_project, destination.table(tower), fields, restriction
    ):
        for page in storage_read.read(client, stream):
            of_run = page.filter(pc.equal(page.column("mlflow_run_id"), search.training.run_id))
            if of_run.num_rows:
                yield of_run.column(fields[0]), of_run.column(fields[1])


def _matrix(column: pa.Array, dimension: int) -> np.ndarray:
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
    if (lengths != dimension).any():
        other = lengths[lengths != dimension][0]
        raise DimensionChangedError(
            f"there are vectors of {other} values, and the id's own has {dimension}: they have no distance"
        )
    values: np.ndarray = column.flatten().to_numpy(zero_copy_only=False)
    return values.reshape(-1, dimension)


def _distances(vectors: np.ndarray, vector: np.ndarray, search: Search) -> np.ndarray:
    distances: np.ndarray
    if search.distance == "EUCLIDEAN":
        distances = np.linalg.norm(vectors - vector, axis=1)
    elif search.distance == "DOT_PRODUCT":
        distances = -(vectors @ vector)
    else:
        norms = np.linalg.norm(vectors, axis=1)
        if zeros := int((norms == 0).sum()):
            raise no_cosine(search, zeros)
        distances = np.maximum(1 - vectors @ vector / (norms * np.linalg.norm(vector)), 0)
    return distances


def no_cosine(search: Search, zeros: int) -> ZeroVectorError:
    """Returns the error of a tower with vectors that have no cosine, at which BigQuery's own search fails too."""
    return ZeroVectorError(
        f"tower {search.among!r} of training {search.training} has {zeros:,} or more vectors of zeros, which have no "
        "cosine; search with --distance=DOT_PRODUCT or EUCLIDEAN"
    )
