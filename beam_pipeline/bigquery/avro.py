"""Batches straight to Avro blocks: a `WriteToBigQuery` whose files are written column by column.

Stock `WriteToBigQuery` encodes Avro a value at a time, 30,000 rows of 64 floats a second. But an Avro array of doubles
is a count, the doubles as they are in memory, and a zero: a whole column can be joined by Arrow at memory speed. Only
the step from rows to file bytes is replaced. Load jobs, their ids, retries and limits stay Beam's, and so does the
Avro schema: the files hold what the stock sink would have written.
"""

import json
import secrets
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import date
from typing import Any, BinaryIO

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from apache_beam.io.filesystem import CompressionTypes
from apache_beam.io.filesystems import FileSystems
from apache_beam.io.gcp.bigquery import WriteResult, WriteToBigQuery
from apache_beam.io.gcp.bigquery_avro_tools import get_record_schema_from_dict_table_schema
from apache_beam.io.gcp.bigquery_file_loads import BigQueryBatchFileLoads
from apache_beam.io.gcp.bigquery_tools import get_hashable_destination
from apache_beam.pvalue import PCollection
from apache_beam.transforms.window import GlobalWindows

from beam_pipeline import emulators
from beam_pipeline.reading.rows import Batch

BLOCK_BYTES = 1 << 20
"""Of vectors in an Avro block."""

_LARGEST_BLOCK = 8 << 20  # BigQuery takes 16 MB.
_BLOCKS_AHEAD = 8

_MAGIC = b"Obj\x01"
_EPOCH = date(1970, 1, 1)


def avro_schema(table_schema: dict[str, Any]) -> dict[str, Any]:
    """Returns the Avro schema that Beam's own sink writes for a table schema."""
    return get_record_schema_from_dict_table_schema("root", table_schema)


def file_header(schema: dict[str, Any], sync: bytes) -> bytes:
    """Returns the header of an Avro object container file (https://avro.apache.org/docs/1.12.0/specification)."""
    metadata = {b"avro.schema": json.dumps(schema).encode(), b"avro.codec": b"null"}
    entries = b"".join(_bytes(key) + _bytes(value) for key, value in metadata.items())
    return _MAGIC + _long(len(metadata)) + entries + _long(0) + sync


def encode(batch: Batch, constants: list[date | str], start: int = 0, end: int | None = None) -> pa.Array:
    """Returns the Avro record of each row of a batch as one binary array, in row order.

    A record is the constant columns, the id, and the vector as an array of doubles, all of them REQUIRED or REPEATED.

    Args:
        batch: the rows.
        constants: values of the columns before the id, the same in every row.
        start: the first row.
        end: the row after the last; None for all.
    """
    vectors = np.ascontiguousarray(batch.vectors[start:end], "<f8")
    ids = batch.ids[start:end]
    rows, dimension = vectors.shape
    prefix = b"".join(_long((v - _EPOCH).days) if isinstance(v, date) else _bytes(v.encode()) for v in constants)
    offsets = np.arange(0, (rows + 1) * 8 * dimension, 8 * dimension, dtype=np.int32)
    doubles = pa.Array.from_buffers(pa.binary(), rows, [None, pa.py_buffer(offsets), pa.py_buffer(vectors)])
    return pc.binary_join_element_wise(
        pa.scalar(prefix, pa.binary()),
        _longs(pc.binary_length(ids).to_numpy(zero_copy_only=False)),
        ids.cast(pa.binary()),
        pa.scalar(_long(dimension), pa.binary()),
        doubles,
        pa.scalar(_long(0), pa.binary()),  # the end of an array
        pa.scalar(b"", pa.binary()),  # the separator
    )


def blocks(batch: Batch, constants: list[date | str], sync: bytes) -> Iterator[tuple[bytes | memoryview, ...]]:
    """Yields the bytes of Avro blocks that hold a batch, each as its head, its records and its end.

    Rows are widened, encoded and yielded a block at a time, which stays in the processor's cache and keeps memory to a
    block beside the batch. A block has BLOCK_BYTES of vectors and whatever their ids take, which is cut further where
    ids are very long.
    """
    step = max(1, BLOCK_BYTES // (8 * batch.vectors.shape[1]))
    for start in range(0, len(batch.ids), step):
        records = encode(batch, constants, start, start + step)
        _, offsets_buffer, data = records.buffers()
        offsets = np.frombuffer(offsets_buffer, np.int32)[: len(records) + 1]
        body = memoryview(data)
        row = 0
        while row < len(records):
            end = int(np.searchsorted(offsets, offsets[row] + _LARGEST_BLOCK, side="right")) - 1
            end = max(end, row + 1)
            head = _long(end - row) + _long(int(offsets[end] - offsets[row]))
            yield head, body[offsets[row] : offsets[end]], sync
            row = end


class WriteBatches(WriteToBigQuery):
    """`WriteToBigQuery` for batches instead of rows; Batch in, `WriteResult` out.

    Files that fit one load job are loaded into the destination directly, although its name is computed while the job
    runs; Beam's own transform would load a temporary table and copy it.

    Takes the arguments of `WriteToBigQuery` for FILE_LOADS with AVRO, and `constants`: the columns before the id, by
    run id.
    """

    def __init__(self, *, constants: dict[str, list[date | str]], **options: Any) -> None:
        super().__init__(**options)
        self._constants = constants

    def expand(self, batches: PCollection[Batch]) -> Any:
        """Applies the transform."""
        loads = _BatchFileLoads(
            constants=self._constants,
            destination=self.table_reference,
            schema=self.schema,
            create_disposition=self.create_disposition,
            write_disposition=self.write_disposition,
            temp_file_format=self._temp_file_format,
            max_file_size=self.max_file_size,
            max_partition_size=self.max_partition_size,
            custom_gcs_temp_location=self.custom_gcs_temp_location,
            table_side_inputs=self.table_side_inputs,
            additional_bq_parameters=self.additional_bq_parameters,
            test_client=self.test_client,
            validate=self._validate,
            load_job_project_id=self.load_job_project_id,
        )
        output = batches | loads
        return WriteResult(
            method=WriteToBigQuery.Method.FILE_LOADS,
            destination_load_jobid_pairs=output[loads.DESTINATION_JOBID_PAIRS],
            destination_file_pairs=output[loads.DESTINATION_FILE_PAIRS],
            destination_copy_jobid_pairs=output[loads.DESTINATION_COPY_JOBID_PAIRS],
        )


class _BatchFileLoads(BigQueryBatchFileLoads):
    def __init__(self, *, constants: dict[str, list[date | str]], **options: Any) -> None:
        super().__init__(**options)
        self._constants = constants
        # Beam takes every computed destination for many destinations. Here it is one, so one load job needs no
        # temporary table to be atomic.
        self.dynamic_destinations = False

    # A private method of Beam: setup.py pins the version, and a test compares the files with the stock sink's.
    def _write_files(self, destination_data_kv_pc: PCollection[Any], file_prefix_pcv: Any) -> PCollection[Any]:
        write = beam.ParDo(_WriteFilesFn(self.schema, self._constants, self.max_file_size), file_prefix_pcv)
        files: PCollection[Any] = destination_data_kv_pc | "WriteBatchesToFiles" >> write
        return files


class _WriteFilesFn(beam.DoFn):
    """Writes (destination, Batch) to files and emits (destination, (path, size)) of each.

    A file that has reached `max_bytes` is closed before the next batch.
    A file is open for as long as the bundle lasts, so small pieces share one.
    """

    def __init__(self, schema: dict[str, Any], constants: dict[str, list[date | str]], max_bytes: int) -> None:
        self._schema = schema
        self._constants = constants
        self._max_bytes = max_bytes

    def setup(self) -> None:
        emulators.connect_if_emulated()

    def start_bundle(self) -> None:
        self._files: dict[str, _AvroFile] = {}

    def process(self, element: tuple[Any, Batch], file_prefix: str) -> Iterator[Any]:
        destination = get_hashable_destination(element[0])
        file = self._files.get(destination)
        if file and file.size >= self._max_bytes:
            yield destination, self._files.pop(destination).close()
            file = None
        if file is None:
            folder = FileSystems.join(file_prefix, destination.replace(":", "."))
            file = self._files[destination] = _AvroFile(folder, avro_schema(self._schema))
        file.write(element[1], self._constants[element[1].run_id])

    def finish_bundle(self) -> Iterator[Any]:
        for destination, file in self._files.items():
            yield GlobalWindows.windowed_value((destination, file.close()))
        self._files = {}


class _AvroFile:
    """An Avro file whose blocks a second thread writes, while the next ones are encoded."""

    def __init__(self, folder: str, schema: dict[str, Any]) -> None:
        self._sync = secrets.token_bytes(16)
        self._path = FileSystems.join(folder, secrets.token_hex(16))
        if not self._path.startswith("gs://") and not FileSystems.exists(folder):
            FileSystems.mkdirs(folder)
        self._stream: BinaryIO = FileSystems.create(
            self._path, "application/avro", compression_type=CompressionTypes.UNCOMPRESSED
        )
        self.size = self._stream.write(file_header(schema, self._sync))
        self._writer = ThreadPoolExecutor(1)
        self._unwritten: deque[Future[Any]] = deque()

    def write(self, batch: Batch, constants: list[date | str]) -> None:
        for block in blocks(batch, constants, self._sync):
            if len(self._unwritten) == _BLOCKS_AHEAD:
                self._unwritten.popleft().result()
            self._unwritten.append(self._writer.submit(self._stream.writelines, block))
            self.size += sum(map(len, block))

    def close(self) -> tuple[str, int]:
        """Returns (path, size), once everything is written."""
        for write in self._unwritten:
            write.result()
        self._writer.shutdown()
        self._stream.close()
        return self._path, self.size


def _long(number: int) -> bytes:
    """An Avro long: zigzag, then seven bits to a byte."""
    number = (number << 1) ^ (number >> 63)
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _bytes(value: bytes) -> bytes:
    return _long(len(value)) + value


def _longs(numbers: np.ndarray) -> pa.Array:
    """Avro longs of an array; few distinct ones, as lengths of ids are."""
    distinct, index = np.unique(numbers, return_inverse=True)
    encoded = pa.array([_long(int(number)) for number in distinct], pa.binary())
    return encoded.take(pa.array(index))
