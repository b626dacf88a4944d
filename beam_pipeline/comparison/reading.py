"""Turns Arrow pages of joined tables into NumPy arrays; no Beam."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from google.cloud.bigquery_storage_v1 import BigQueryReadClient

from beam_pipeline.bigquery.storage_read import read
from beam_pipeline.comparison.measures import Rows
from beam_pipeline.errors import BadVectorError

FIELDS = ("id", "before_vector", "after_vector")
GROUPED_FIELDS = (*FIELDS, "group_name")

BLOCK_ROWS = 8192
"""Rows that are measured at once: matrix products of few rows cost more per row, those of many more memory."""


def read_blocks(
    client: BigQueryReadClient, stream: str, before: int, after: int, rows: int = BLOCK_ROWS
) -> Iterator[Rows]:
    """Yields a stream's rows, so many at once; pages are cut or put together.

    Args:
        client: of the Storage Read API.
        stream: its name.
        before: values in a vector before.
        after: values in a vector after.
        rows: at most, of a block.
    """
    waiting: list[pa.RecordBatch] = []
    count = 0
    for page in read(client, stream):
        at = 0
        while at < page.num_rows:
            part = page.slice(at, min(page.num_rows - at, rows - count))
            at += part.num_rows
            count += part.num_rows
            waiting.append(part)
            if count == rows:
                yield to_rows(waiting, before, after)
                waiting, count = [], 0
    if count:
        yield to_rows(waiting, before, after)


def to_rows(pages: Sequence[pa.RecordBatch], before: int, after: int) -> Rows:
    """Returns Arrow rows of a joined table as arrays.

    Raises:
        BadVectorError: a vector has another length, or holds NaN or infinity.
    """
    table = pa.Table.from_batches(pages)
    ids = _objects(table.column("id"))
    earlier, has_before = _vectors(table.column("before_vector"), before, ids)
    later, has_after = _vectors(table.column("after_vector"), after, ids)
    groups = _objects(table.column("group_name")) if "group_name" in table.column_names else None
    return Rows(ids, earlier, later, has_before, has_after, groups)


def _objects(column: pa.ChunkedArray) -> np.ndarray:
    # Not to_numpy(): an array of strings without a missing one would have another type.
    found = np.empty(len(column), object)
    found[:] = column.to_pylist()
    return found


def _vectors(column: pa.ChunkedArray, dimension: int, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
    present = lengths > 0
    wrong = np.flatnonzero(present & (lengths != dimension))
    if len(wrong):
        raise BadVectorError(f"id {ids[wrong[0]]!r} has a vector of {lengths[wrong[0]]} values, not {dimension}")
    # Flattening leaves out what is missing, and follows the offsets of a slice.
    values = np.concatenate([_flat(chunk) for chunk in column.chunks]) if column.num_chunks else np.zeros(0)
    finite = np.isfinite(values)
    if not finite.all():
        place = int(np.flatnonzero(~finite)[0]) // dimension
        raise BadVectorError(f"id {ids[np.flatnonzero(present)[place]]!r} has a vector with NaN or infinity")
    values = values.reshape(-1, dimension)
    if present.all():
        return values, present
    vectors = np.zeros((len(present), dimension))
    vectors[present] = values
    return vectors, present


def _flat(chunk: Any) -> np.ndarray:
    values: np.ndarray = chunk.flatten().to_numpy(zero_copy_only=False)
    return values.astype(np.float64, copy=False)
