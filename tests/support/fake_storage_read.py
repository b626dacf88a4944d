"""A small BigQuery Storage Read API: gRPC, pages of rows that are made as they are sent, and refusals.

What an emulator does not show: pages of the size that BigQuery sends, any number of rows without keeping them, and an
account that lacks a permission.
"""

import itertools
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import numpy as np
import pyarrow as pa
from google.cloud.bigquery_storage_v1 import types

SERVICE = "google.cloud.bigquery.storage.v1.BigQueryRead"
PAGE_ROWS = 2000


def page(start, count, dimension, fields):
    """Returns rows of a joined table: common ids, whose vectors are noise."""
    vectors = np.random.default_rng(start).normal(size=(2, count, dimension))
    offsets = np.arange(count + 1, dtype=np.int32) * dimension
    ids = [f"id {n:08}" for n in range(start, start + count)]
    columns = {
        "id": pa.array(ids),
        "before_vector": pa.ListArray.from_arrays(offsets, vectors[0].ravel()),
        "after_vector": pa.ListArray.from_arrays(offsets, vectors[1].ravel()),
        "sample": pa.array(np.arange(start, start + count)),
    }
    return pa.record_batch([columns[name] for name in fields], [*fields])


class _Reads:
    def __init__(self, rows, dimension, streams, sampled):
        self._rows, self._dimension, self._streams, self._sampled = rows, dimension, streams, sampled

    def create(self, request, context):
        session, fields = request.read_session, [*request.read_session.read_options.selected_fields]
        rows = self._sampled if session.read_options.row_restriction else self._rows
        count = min(self._streams, request.max_stream_count)
        cuts = np.linspace(0, rows, count + 1).astype(int)
        session.streams = [
            types.ReadStream(name=f"{start}/{end}/{','.join(fields)}") for start, end in itertools.pairwise(cuts)
        ]
        return session

    def read(self, request, context):
        start, end, fields = request.read_stream.split("/")
        first = True
        for at in range(int(start), int(end), PAGE_ROWS):
            rows = page(at, min(PAGE_ROWS, int(end) - at), self._dimension, fields.split(","))
            response = types.ReadRowsResponse(row_count=rows.num_rows)
            response.arrow_record_batch.serialized_record_batch = rows.serialize().to_pybytes()
            if first:
                response.arrow_schema.serialized_schema = rows.schema.serialize().to_pybytes()
                first = False
            yield response


class _Refuses:
    def create(self, request, context):
        context.abort(
            grpc.StatusCode.PERMISSION_DENIED,
            f"request failed: the user does not have 'bigquery.readsessions.create' permission for '{request.parent}' "
            f"to read {request.read_session.table}",
        )

    def read(self, request, context):
        raise AssertionError("no stream was given")


@contextmanager
def serve(*, rows=0, dimension=16, streams=10, sampled=0, refuses=False):
    """Yields host:port."""
    reads = _Refuses() if refuses else _Reads(rows, dimension, streams, sampled)
    handlers = {
        "CreateReadSession": grpc.unary_unary_rpc_method_handler(
            reads.create, types.CreateReadSessionRequest.deserialize, types.ReadSession.serialize
        ),
        "ReadRows": grpc.unary_stream_rpc_method_handler(
            reads.read, types.ReadRowsRequest.deserialize, types.ReadRowsResponse.serialize
        ),
    }
    server = grpc.server(ThreadPoolExecutor(4))
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, handlers)])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None)
