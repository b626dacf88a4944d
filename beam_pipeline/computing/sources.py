"""Where a tower's ids come from, with its other inputs: its vocabulary, Parquet files, or a query.

A source is cut into shares, which are descriptions, and a share is read where it lands, some thousands of rows at a
time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from google.api_core.exceptions import GoogleAPICallError
from google.cloud import bigquery

from beam_pipeline.bigquery import storage_read, tables
from beam_pipeline.computing.columns import Columns
from beam_pipeline.errors import CorruptFileError, FeaturesError
from beam_pipeline.files import open_file
from beam_pipeline.formats.files import parquet
from beam_pipeline.formats.model import Tower
from beam_pipeline.reading import pieces, unordered

CHUNK_ROWS = 4096
"""Rows that a tower is called with at once: enough for its matrix products, few enough for its memory."""

_LARGEST_GROUP = 1 << 30
"""Bytes of a column in a row group, uncompressed: those of a chunk are decoded at once, and all may be in one."""

_CHUNK_VALUES = 4 << 20
"""Values of the lists in a chunk, about."""

_ARROW_TYPES = {
    "STRING": pa.string(),
    "BYTES": pa.binary(),
    "INTEGER": pa.int64(),
    "INT64": pa.int64(),
    "FLOAT": pa.float64(),
    "FLOAT64": pa.float64(),
    "BOOLEAN": pa.bool_(),
    "BOOL": pa.bool_(),
    "DATE": pa.date32(),
    "TIMESTAMP": pa.timestamp("us"),
    "DATETIME": pa.timestamp("us"),
    "NUMERIC": pa.decimal128(38, 9),
}


class Source(Protocol):
    """Where a tower's ids come from."""

    def cut(self, columns: Columns, context: Context) -> Iterator[tuple[Any, int]]:
        """Yields shares that together are all rows, each with the number of rows that the source says it has."""
        ...

    def read(self, share: Any, columns: Columns) -> Iterator[pa.RecordBatch]:
        """Yields a share's rows, at most `CHUNK_ROWS` at a time."""
        ...

    def __str__(self) -> str:
        """Returns what it is, for the report."""
        ...


@dataclass(frozen=True)
class Context:
    """What a source needs of the launch.

    Attributes:
        client: of BigQuery.
        table: `project.dataset.table` for the result of a query, which no other launch uses.
        kms_key: Cloud KMS key of that table.
    """

    client: bigquery.Client | None = None
    table: str = ""
    kms_key: str | None = None


@dataclass(frozen=True)
class Vocabulary:
    """The ids of a lookup in the model.

    Attributes:
        tower: where they are; its matrix is not read.
    """

    tower: Tower

    def cut(self, columns: Columns, context: Context) -> Iterator[tuple[Any, int]]:
        """Yields pieces of the vocabulary."""
        if not self.tower.vocabulary.in_row_order:
            for entries in unordered.cut_entries(self.tower, open_file, pieces.PIECE_BYTES // 256):
                yield entries, entries.count
            return
        for piece in pieces.cut(self.tower, open_file, pieces.PIECE_BYTES):
            if piece.ids is not None:  # Rows without ids, and bytes that only a checksum needs, are not called with.
                yield piece, piece.rows

    def read(self, share: Any, columns: Columns) -> Iterator[pa.RecordBatch]:
        """Yields the ids, as the tower takes them."""
        if isinstance(share, unordered.Entries):
            _, names = unordered.read_entries(share, self.tower, open_file)
        else:
            names = pieces.read(share, self.tower, open_file)
        if columns.inputs[0].dtype not in ("string", ""):
            names = pa.array(np.array(names.to_pylist()).astype(np.int64))
        yield from _chunks(pa.RecordBatch.from_arrays([names], [columns.id_column]))

    def __str__(self) -> str:
        return f"the ids of its lookup in {self.tower.vocabulary.path}"


@dataclass(frozen=True)
class ParquetFiles:
    """Files of features.

    Attributes:
        pattern: as given.
        paths: the files, at least one.
    """

    pattern: str
    paths: tuple[str, ...]

    def schema(self) -> pa.Schema:
        """Returns the columns of the first file."""
        with parquet.opened(self.paths[0], open_file) as file:
            return file.parquet.schema_arrow

    def cut(self, columns: Columns, context: Context) -> Iterator[tuple[Any, int]]:
        """Yields the row groups of each file, whose columns are those of the first.

        Raises:
            FeaturesError: the columns of a file are others, or a row group is too large for a worker.
            CorruptFileError: a file contradicts its format.
        """
        first = None
        for path in self.paths:
            with parquet.opened(path, open_file) as file:
                own = file.parquet.schema_arrow
                first = first or own
                for name in columns.all:
                    is_there = own.names.count(name) == 1
                    if not is_there or own.field(name).type != first.field(name).type:
                        found = own.field(name).type if is_there else f"there {own.names.count(name)} times"
                        raise FeaturesError(
                            f"the features of tower {columns.tower!r}: column {name!r} is {found} in {path}, and "
                            f"{first.field(name).type} in {self.paths[0]}"
                        )
                for number, rows in enumerate(parquet.row_counts(path, file)):
                    for name in columns.all:
                        _require_size(path, file, number, name, own.field(name).type)
                    yield (path, number), rows

    def read(self, share: Any, columns: Columns) -> Iterator[pa.RecordBatch]:
        """Yields the rows of a row group.

        Raises:
            CorruptFileError: the file contradicts its format, or is another one than before.
        """
        path, number = share
        with parquet.opened(path, open_file) as file:
            if number >= len(file.groups):
                raise CorruptFileError(f"{path} has no row group {number} any more: it changed since the job started")
            group, found = file.groups[number], 0
            most = max(parquet.find_leaf(path, file, number, name).values for name in columns.all)
            rows = max(1, min(CHUNK_ROWS, _CHUNK_VALUES * group.rows // max(1, most)))
            for batch in file.parquet.iter_batches(
                rows, row_groups=[number], columns=list(columns.all), use_threads=False
            ):
                found += batch.num_rows
                yield batch
            if found != group.rows:
                raise CorruptFileError(f"{path}: row group {number} has {found:,} rows, its footer says {group.rows:,}")

    def __str__(self) -> str:
        more = f" and {len(self.paths) - 1:,} more" if len(self.paths) > 1 else ""
        return f"{self.paths[0]}{more}"


@dataclass(frozen=True)
class Query:
    """A query for features, run once by the job; its result is kept in a table that the job drops.

    Attributes:
        sql: a SELECT.
        project: where its result is read and billed.
    """

    sql: str
    project: str

    def schema(self, client: bigquery.Client, tower: str) -> pa.Schema:
        """Returns the columns; nothing is run.

        Raises:
            FeaturesError: BigQuery refuses it.
        """
        try:
            job = client.query(self.sql, job_config=bigquery.QueryJobConfig(dry_run=True, use_query_cache=False))
        except GoogleAPICallError as error:
            raise _failed(tower, error) from error
        return arrow_schema(job.schema or [])

    def cut(self, columns: Columns, context: Context) -> Iterator[tuple[Any, int]]:
        """Runs the query and yields streams of its result; the rows of all are those of the first."""
        client = context.client
        assert client is not None
        try:
            client.query_and_wait(tables.create_features_sql(context.table, self.sql, context.kms_key))
            rows = next(iter(client.query_and_wait(tables.count_sql(context.table))))[0]
        except GoogleAPICallError as error:
            raise _failed(columns.tower, error) from error
        reader = storage_read.make_client()
        for stream in storage_read.open_streams(reader, self.project, context.table, columns.all):
            yield stream, rows
            rows = 0

    def read(self, share: Any, columns: Columns) -> Iterator[pa.RecordBatch]:
        """Yields the rows of a stream."""
        for page in storage_read.read(storage_read.make_client(), share):
            yield from _chunks(page)

    def __str__(self) -> str:
        text = " ".join(self.sql.split())
        return text if len(text) <= 60 else f"{text[:57]}..."


def arrow_schema(fields: Sequence[bigquery.SchemaField]) -> pa.Schema:
    """Returns BigQuery's columns as the Storage Read API sends them; of other types, one that no input takes."""
    found = []
    for each in fields:
        kind = _ARROW_TYPES.get(each.field_type, pa.struct([]))
        found.append(pa.field(each.name, pa.list_(kind) if each.mode == "REPEATED" else kind))
    return pa.schema(found)


def _failed(tower: str, error: GoogleAPICallError) -> FeaturesError:
    # What BigQuery says, without the request that it was asked by.
    said = next((each["message"] for each in error.errors if isinstance(each, dict) and each.get("message")), "")
    reason = (said or error.message or str(error)).strip().splitlines()[0]
    return FeaturesError(f"--features {tower}=…: the query fails: {reason}")


def _chunks(table: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    for start in range(0, table.num_rows, CHUNK_ROWS):
        yield table.slice(start, CHUNK_ROWS)


def _require_size(path: str, file: parquet.File, number: int, column: str, kind: pa.DataType) -> None:
    """Raises if the footer has a column larger than a worker reads, or with another number of values than of rows."""
    group, leaf = file.groups[number], parquet.find_leaf(path, file, number, column)
    size = leaf.size
    if pa.types.is_nested(kind):
        size = max(size, 8 * leaf.values)  # A value that is repeated takes no bytes in the file.
    if leaf.values < group.rows or leaf.size < 0 or (leaf.values != group.rows and not pa.types.is_nested(kind)):
        raise CorruptFileError(
            f"{path}: row group {number} has {leaf.values:,} values in column {column!r}, and {group.rows:,} rows; "
            "write it again"
        )
    if size > _LARGEST_GROUP:
        raise FeaturesError(
            f"{path}: column {column!r} has {size:,} bytes in row group {number}, and a worker reads at most "
            f"{_LARGEST_GROUP:,} at once; write it in smaller row groups"
        )
