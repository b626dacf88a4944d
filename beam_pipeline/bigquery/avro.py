"""Pieces straight to Avro blocks: Beam's file loads for BigQuery, with files that are written column by column.

The built-in `WriteToBigQuery` encodes Avro a value at a time, 30,000 rows of 64 floats a second. But an Avro array of
floats is a count, the floats as they are in memory, and a zero: a whole column can be joined by Arrow at memory speed.
Only the step from elements to file bytes is replaced. Load jobs, their ids, retries and limits stay Beam's, and so does
the Avro schema but for one type: the built-in sink has doubles where these files have floats, if the model has no wider
ones. BigQuery loads both into FLOAT64, which has every float exactly
(https://cloud.google.com/bigquery/docs/loading-data-cloud-storage-avro#primitive_types).
"""

import json
import secrets
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import date
from typing import Any, BinaryIO

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from apache_beam.io.filesystem import CompressionTypes
from apache_beam.io.filesystems import FileSystems
from apache_beam.io.gcp.bigquery_avro_tools import get_record_schema_from_dict_table_schema
from apache_beam.io.gcp.bigquery_file_loads import BigQueryBatchFileLoads
from apache_beam.io.gcp.bigquery_tools import get_hashable_destination
from apache_beam.pvalue import PCollection, TaggedOutput
from apache_beam.transforms.window import GlobalWindows

from beam_pipeline import emulators, metrics
from beam_pipeline.files import open_file
from beam_pipeline.formats.model import Tower
from beam_pipeline.reading import rows
from beam_pipeline.reading.rows import Batch, Element
from beam_pipeline.reading.tally import Report
from beam_pipeline.reading.transforms import REPORTS, count_read, display_data

BLOCK_BYTES = 1 << 20
"""Of vectors in an Avro block."""

_LARGEST_BLOCK = 8 << 20  # BigQuery takes 16 MB.
_BLOCKS_AHEAD = 8

_MAGIC = b"Obj\x01"
_EPOCH = date(1970, 1, 1)


@dataclass(frozen=True)
class Writing:
    """What the step that reads and writes pieces has to know.

    Attributes:
        tower: name of the tower.
        towers: run id → the tower in that run's model.
        constants: run id → the columns before the id.
        dtype: floats of the file, "<f4" or "<f8": wide enough for every run's.
        displayed: display data beside those of the towers.
    """

    tower: str
    towers: dict[str, Tower]
    constants: dict[str, list[date | int]]
    dtype: str
    displayed: dict[str, Any] = field(default_factory=dict)


def avro_schema(table_schema: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Returns the Avro schema that Beam's own sink writes for a table schema; arrays of floats if those are narrow."""
    schema: dict[str, Any] = get_record_schema_from_dict_table_schema("root", table_schema)
    if dtype == "<f4":
        for column in schema["fields"]:
            if column["type"] == {"type": "array", "items": "double"}:
                column["type"] = {"type": "array", "items": "float"}
    return schema


def file_header(schema: dict[str, Any], sync: bytes) -> bytes:
    """Returns the header of an Avro object container file (https://avro.apache.org/docs/1.12.0/specification)."""
    metadata = {b"avro.schema": json.dumps(schema).encode(), b"avro.codec": b"null"}
    entries = b"".join(_bytes(key) + _bytes(value) for key, value in metadata.items())
    return _MAGIC + _long(len(metadata)) + entries + _long(0) + sync


def encode(batch: Batch, constants: list[date | int], dtype: str, start: int, end: int) -> pa.Array:
    """Returns the Avro record of each row from `start` to `end` of a batch as one binary array, in row order.

    A record is the constant columns, the id, and the vector as an array, all of them REQUIRED or REPEATED.

    Args:
        batch: the rows.
        constants: values of the columns before the id, the same in every row.
        dtype: floats of the record, "<f4" or "<f8".
        start: the first row.
        end: the row after the last, which may be beyond the batch.

    Raises:
        TypeError: the record's floats are narrower than the batch's.
    """
    vectors = np.ascontiguousarray(batch.vectors[start:end].astype(dtype, casting="safe", copy=False))
    ids = batch.ids[start:end]
    count, dimension = vectors.shape
    prefix = b"".join(_long((v - _EPOCH).days if isinstance(v, date) else v) for v in constants)
    offsets = np.arange(count + 1, dtype=np.int32) * np.int32(vectors.itemsize * dimension)
    floats = pa.Array.from_buffers(pa.binary(), count, [None, pa.py_buffer(offsets), pa.py_buffer(vectors)])
    return pc.binary_join_element_wise(
        pa.scalar(prefix),
        _longs(pc.binary_length(ids).to_numpy()),
        ids.cast(pa.binary()),
        pa.scalar(_long(dimension)),
        floats,
        pa.scalar(_long(0)),  # the end of an array
        pa.scalar(b""),  # the separator
    )


def blocks(
    batch: Batch, constants: list[date | int], sync: bytes, dtype: str
) -> Iterator[tuple[bytes | memoryview, ...]]:
    """Yields the bytes of Avro blocks that hold a batch, each as its head, its records and its end.

    Rows are widened, encoded and yielded a block at a time, which stays in the processor's cache and keeps memory to a
    block beside the batch. A block has BLOCK_BYTES of vectors and whatever their ids take, which is cut further where
    ids are very long.
    """
    step = max(1, BLOCK_BYTES // (np.dtype(dtype).itemsize * batch.vectors.shape[1]))
    for start in range(0, len(batch.ids), step):
        records = encode(batch, constants, dtype, start, start + step)
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


class WritePieces(BigQueryBatchFileLoads):
    """Beam's file loads for pieces instead of rows; `Element` in, a dict of PCollections out.

    A piece is read, checked, encoded and written in one step: its vectors are in no element. The outputs are those of
    `BigQueryBatchFileLoads`, and the report of each element as "reports".

    Files that fit one load job are loaded into the destination directly, although its name is computed while the job
    runs; Beam's own transform would load a temporary table and copy it.

    Takes the arguments of `BigQueryBatchFileLoads` and `writing`: what the step that writes has to know.
    """

    def __init__(self, *, writing: Writing, **options: Any) -> None:
        super().__init__(**options)
        self._writing = writing
        # Beam takes every computed destination for many destinations. Here it is one, so one load job needs no
        # temporary table to be atomic.
        self.dynamic_destinations = False

    def expand(self, elements: PCollection[Element]) -> dict[str, PCollection[Any]]:
        """Applies the transform."""
        outputs = super().expand(elements)
        return {**outputs, REPORTS: self._reports}

    # A private method of Beam: setup.py pins the version, and a test compares the files with the built-in sink's.
    def _write_files(self, destination_data_kv_pc: PCollection[Any], file_prefix_pcv: Any) -> PCollection[Any]:
        write = beam.ParDo(_WriteFn(self.schema, self._writing, self.max_file_size), file_prefix_pcv)
        written = destination_data_kv_pc | "WritePiecesToFiles" >> write.with_outputs(REPORTS, main="files")
        self._reports: PCollection[Any] = written[REPORTS]
        files: PCollection[Any] = written.files
        return files


class _WriteFn(beam.DoFn):
    """Reads the pieces of (destination, Element), writes them to files and emits (destination, (path, size)) of each.

    Pieces are read one ahead: while one is encoded and written, a second thread reads the next. Two are in memory at a
    time, whatever their number. A file that has reached `max_bytes` is closed before the next piece. A file is open for
    as long as the bundle lasts, so small pieces share one; a bundle that is retried reads again and writes files of its
    own.
    """

    def __init__(self, schema: dict[str, Any], writing: Writing, max_bytes: int) -> None:
        self._schema = avro_schema(schema, writing.dtype)
        self._writing = writing
        self._max_bytes = max_bytes

    def display_data(self) -> dict[str, Any]:
        return {**display_data(self._writing.towers), **self._writing.displayed}

    def setup(self) -> None:
        emulators.connect_if_emulated()
        self._reader = ThreadPoolExecutor(1)

    def start_bundle(self) -> None:
        self._files: dict[str, _AvroFile] = {}
        self._ahead: tuple[Any, str, Future[tuple[Batch | None, Report]]] | None = None

    def process(self, element: tuple[Any, Element], file_prefix: str) -> Iterator[Any]:
        read = self._reader.submit(rows.read, element[1], self._writing.towers, open_file)
        before, self._ahead = self._ahead, (element[0], file_prefix, read)
        if before:
            yield from self._write(*before)

    def finish_bundle(self) -> Iterator[Any]:
        outputs = [*self._write(*self._ahead)] if self._ahead else []
        outputs += [(destination, file.close()) for destination, file in self._files.items()]
        self._files, self._ahead = {}, None
        for output in outputs:
            if isinstance(output, TaggedOutput):
                yield TaggedOutput(output.tag, GlobalWindows.windowed_value(output.value))
            else:
                yield GlobalWindows.windowed_value(output)

    def teardown(self) -> None:
        self._reader.shutdown()

    def _write(self, table: Any, file_prefix: str, read: Future[tuple[Batch | None, Report]]) -> Iterator[Any]:
        batch, report = read.result()
        count_read(report)
        yield TaggedOutput(REPORTS, report)
        if batch is None:
            return
        destination = get_hashable_destination(table)
        file = self._files.get(destination)
        if file and file.size >= self._max_bytes:
            yield destination, self._files.pop(destination).close()
            file = None
        if file is None:
            folder = FileSystems.join(file_prefix, destination.replace(":", "."))
            file = self._files[destination] = _AvroFile(folder, self._schema)
        file.write(batch, self._writing.constants[batch.run_id], self._writing.dtype)
        metrics.count(f"write-rows-{self._writing.tower}", len(batch.ids))


class _AvroFile:
    """An Avro file whose blocks a second thread writes, while the next ones are encoded."""

    def __init__(self, folder: str, schema: dict[str, Any]) -> None:
        self._sync = secrets.token_bytes(16)
        self._path = FileSystems.join(folder, secrets.token_hex(16))
        self._stream: BinaryIO = FileSystems.create(
            self._path, "application/avro", compression_type=CompressionTypes.UNCOMPRESSED
        )
        self.size = self._stream.write(file_header(schema, self._sync))
        self._writer = ThreadPoolExecutor(1)
        self._unwritten: deque[Future[Any]] = deque()

    def write(self, batch: Batch, constants: list[date | int], dtype: str) -> None:
        for block in blocks(batch, constants, self._sync, dtype):
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
