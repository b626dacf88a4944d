"""Reads tables through BigQuery's Storage Read API, as Arrow pages; no Beam.

Beam's own source decodes Avro into a dictionary per row, or, with Arrow, an object per value; of the pages themselves a
core reads several times as many rows (docs/comparison.md has the rates).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa
from google.api_core.exceptions import GoogleAPICallError, PermissionDenied
from google.cloud.bigquery_storage_v1 import BigQueryReadClient
from google.cloud.bigquery_storage_v1 import types as storage_types

from beam_pipeline import emulators
from beam_pipeline.bigquery.tables import split_name
from beam_pipeline.credentials import credentials
from beam_pipeline.errors import ConfigError

MOST_STREAMS = 1000
"""Asked of BigQuery, which gives as many as the table's size is worth."""


def make_client() -> BigQueryReadClient:
    """Returns a client of the Storage Read API, or of the emulator's."""
    if not emulators.emulated():
        return BigQueryReadClient(credentials=credentials())
    import grpc
    from google.cloud.bigquery_storage_v1.services.big_query_read.transports import BigQueryReadGrpcTransport

    channel = grpc.insecure_channel(emulators.read_host(), options=[("grpc.max_receive_message_length", -1)])
    return BigQueryReadClient(transport=BigQueryReadGrpcTransport(channel=channel))


def open_streams(
    client: BigQueryReadClient,
    project: str,
    table: str,
    fields: Sequence[str],
    restriction: str = "",
    most: int = MOST_STREAMS,
) -> list[str]:
    """Returns the names of streams that together hold the table's rows as of now.

    Args:
        client: of the Storage Read API.
        project: where the session runs and is billed.
        table: `project.dataset.table`.
        fields: columns that are read.
        restriction: SQL condition on the rows.
        most: streams.

    Raises:
        ConfigError: the permission is missing.
    """
    of_table, dataset, name = split_name(table)
    session = storage_types.ReadSession(
        table=f"projects/{of_table}/datasets/{dataset}/tables/{name}",
        data_format=storage_types.DataFormat.ARROW,
        read_options=storage_types.ReadSession.TableReadOptions(
            selected_fields=list(fields), row_restriction=restriction
        ),
    )
    try:
        opened = client.create_read_session(parent=f"projects/{project}", read_session=session, max_stream_count=most)
    except PermissionDenied as error:
        raise ConfigError(
            f"this account may not read {table} through the Storage Read API ({error.message}); grant it "
            f"roles/bigquery.readSessionUser on project {project} and roles/bigquery.dataViewer on the dataset"
        ) from error
    except GoogleAPICallError as error:
        raise ConfigError(f"the Storage Read API cannot open {table}: {error.message}") from error
    return [stream.name for stream in opened.streams]


def read(client: BigQueryReadClient, stream: str) -> Iterator[pa.RecordBatch]:
    """Yields the pages of a stream; if the connection breaks, it is resumed where it broke."""
    schema = None
    for response in client.read_rows(stream):
        if response.arrow_schema.serialized_schema:  # in the first
            schema = pa.ipc.read_schema(pa.py_buffer(response.arrow_schema.serialized_schema))
        if serialized := response.arrow_record_batch.serialized_record_batch:
            yield pa.ipc.read_record_batch(pa.py_buffer(serialized), schema)
