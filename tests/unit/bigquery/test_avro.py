"""The columnar writer against the built-in sink: the same records, for any ids and vectors.

The Avro schema is the same too, where the vectors are of doubles.
"""

import dataclasses
import inspect
import io
import pickle
import re
import threading
import time
from concurrent.futures import Future
from datetime import date
from pathlib import Path

import apache_beam as beam
import fastavro
import numpy as np
import pyarrow as pa
import pytest
from apache_beam.io.gcp import bigquery_file_loads
from apache_beam.io.gcp.bigquery_tools import AvroRowWriter
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.pvalue import TaggedOutput
from hypothesis import given, settings
from hypothesis import strategies as st
from towers import described

from beam_pipeline.bigquery import avro, tables
from beam_pipeline.bigquery.publication import Publication
from beam_pipeline.bigquery.staging import MAX_FILE_BYTES, WriteStaging
from beam_pipeline.bigquery.tables import Destination
from beam_pipeline.files import open_file
from beam_pipeline.formats.saved_model.reader import SavedModel
from beam_pipeline.reading import pieces
from beam_pipeline.reading.rows import Batch, to_rows
from beam_pipeline.reading.tally import Report
from beam_pipeline.reading.transforms import REPORTS
from beam_pipeline.training import Run, Training

CONSTANTS = {"train_date": date(2026, 3, 1), "training": 2}
SYNC = bytes(range(16))


def columnar_file(batch, constants, dtype="<f8"):
    schema = avro.avro_schema({"fields": tables.staging_schema("user")}, dtype)
    blocks = avro.blocks(batch, constants, SYNC, dtype)
    return avro.file_header(schema, SYNC) + b"".join(b"".join(block) for block in blocks)


def stock_file(batch, constants):
    class Kept(io.BytesIO):
        def close(self):
            self.kept = self.getvalue()
            super().close()

    out = Kept()
    writer = AvroRowWriter(out, {"fields": tables.staging_schema("user")})
    for row in to_rows(batch, "user", {"run": constants}):
        writer.write(row)
    writer.close()
    return out.kept


def read(data):
    reader = fastavro.reader(io.BytesIO(data))
    return reader.writer_schema, list(reader)


ids = st.text(st.characters(exclude_categories=("Cs",)), max_size=400)
finite = st.floats(allow_nan=False, allow_infinity=False)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(ids, min_size=1, max_size=40),
    st.integers(1, 70),
    st.data(),
    st.integers(1, 5000),
    st.integers(1, 5000),
    st.dates(date(1600, 1, 1), date(9000, 1, 1)),
    st.integers(0, 10_000),
    st.sampled_from([("<f8", "<f8"), ("<f4", "<f8"), ("<f4", "<f4"), ("<f2", "<f4"), (">f4", "<f4")]),
)
def test_the_file_has_the_rows_that_the_built_in_sink_writes(
    names, dimension, data, block, largest, day, number, dtypes
):
    dtype, written = dtypes
    values = data.draw(st.lists(finite, min_size=dimension, max_size=dimension))
    with np.errstate(over="ignore"):
        vectors = np.nan_to_num(np.array([np.roll(values, i) for i in range(len(names))]).astype(dtype))
    batch = Batch("run", pa.array(names, pa.string()), vectors)
    constants = {"train_date": day, "training": number}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(avro, "BLOCK_BYTES", block)
        patch.setattr(avro, "_LARGEST_BLOCK", largest)
        schema, found = read(columnar_file(batch, [*constants.values()], written))
    built_in, expected = read(stock_file(batch, constants))
    assert found == expected
    assert (schema == built_in) == (written == "<f8")


def test_the_schema_differs_in_the_vectors_alone():
    batch = Batch("run", pa.array(["a"]), np.zeros((1, 2), "<f4"))
    built_in, _ = read(stock_file(batch, CONSTANTS))
    ours, _ = read(columnar_file(batch, [*CONSTANTS.values()], "<f4"))
    assert built_in["fields"][-1].pop("type") == {"type": "array", "items": "double"}
    assert ours["fields"][-1].pop("type") == {"type": "array", "items": "float"}
    assert ours == built_in


def test_doubles_are_never_narrowed():
    batch = Batch("run", pa.array(["a"]), np.full((1, 2), 0.1))
    with pytest.raises(TypeError, match="Cannot cast"):
        columnar_file(batch, [*CONSTANTS.values()], "<f4")


@pytest.mark.parametrize("dimension", [1, 64, 1024])
@pytest.mark.parametrize("length", [1, 10, 60])
def test_the_bytes_of_a_row(dimension, length):
    """What the issue allows for float32 vectors: the id, the values and 16 bytes."""
    count = 5000
    ids = pa.array([f"{at}".rjust(length, "x")[-length:] for at in range(count)])
    batch = Batch("run", ids, np.ones((count, dimension), "<f4"))
    size = sum(len(part) for block in avro.blocks(batch, [date(2026, 3, 1), 5000], SYNC, "<f4") for part in block)
    assert size <= count * (length + 4 * dimension + 16)


def test_slices_and_other_layouts():
    batch = Batch(
        "run", pa.array(["a", "b", "c", "d"]).slice(1, 2), np.asfortranarray(np.arange(8.0).reshape(4, 2))[1:3]
    )
    assert read(columnar_file(batch, [*CONSTANTS.values()])) == read(stock_file(batch, CONSTANTS))


@pytest.mark.parametrize(("rows", "length"), [(10_000, 10), (200, 100_000), (10, 3_000_000)])
def test_blocks_keep_to_their_size(rows, length):
    batch = Batch("run", pa.array([f"{i}".rjust(length, "x") for i in range(rows)]), np.zeros((rows, 64), "<f4"))
    bodies = [len(body) for _, body, _ in avro.blocks(batch, [*CONSTANTS.values()], SYNC, "<f4")]
    assert max(bodies) < 9 << 20 < 16 << 20
    assert sum(bodies) > rows * (length + 256)


def rows_of_blocks(batch, dtype):
    blocks = fastavro.block_reader(io.BytesIO(columnar_file(batch, [*CONSTANTS.values()], dtype)))
    return [block.num_records for block in blocks]


def test_a_block_has_a_mebibyte_of_vectors_and_at_least_a_row(monkeypatch):
    batch = Batch("run", pa.array([f"{i}" for i in range(10_000)]), np.zeros((10_000, 64), "<f4"))
    assert rows_of_blocks(batch, "<f4") == [4096, 4096, 1808]
    assert rows_of_blocks(batch, "<f8") == [2048] * 4 + [1808]
    monkeypatch.setattr(avro, "BLOCK_BYTES", 255)
    assert rows_of_blocks(Batch("run", batch.ids[:3], batch.vectors[:3]), "<f4") == [1] * 3


@pytest.mark.parametrize(("more", "rows"), [(0, [2, 2, 1]), (-1, [1] * 5)])
def test_a_block_may_reach_its_limit_to_the_byte(monkeypatch, more, rows):
    batch = Batch("run", pa.array([*"abcde"]), np.zeros((5, 8), "<f4"))
    record = len(avro.encode(batch, [*CONSTANTS.values()], "<f4", 0, 1)[0].as_py())
    monkeypatch.setattr(avro, "_LARGEST_BLOCK", 2 * record + more)
    assert rows_of_blocks(batch, "<f4") == rows


def test_no_rows_are_no_records():
    batch = Batch("run", pa.array([], pa.string()), np.zeros((0, 8), "<f4"))
    records = avro.encode(batch, [*CONSTANTS.values()], "<f4", 0, 1)
    assert (len(records), records.type) == (0, pa.binary())


def test_the_header_says_that_nothing_is_compressed():
    batch = Batch("run", pa.array(["a"]), np.zeros((1, 2), "<f4"))
    assert fastavro.reader(io.BytesIO(columnar_file(batch, [*CONSTANTS.values()]))).metadata["avro.codec"] == "null"


def test_beam_still_has_what_is_overridden():
    """Fails on the day that an upgrade of Beam moves a part that the columnar writer stands on."""
    loads = bigquery_file_loads.BigQueryBatchFileLoads
    assert [*inspect.signature(loads._write_files).parameters] == ["self", "destination_data_kv_pc", "file_prefix_pcv"]
    assert "self._write_files(" in inspect.getsource(loads.expand)
    assert "self.dynamic_destinations" in inspect.getsource(loads.expand)
    options = {*inspect.signature(loads.__init__).parameters}
    assert {
        "destination",
        "schema",
        "create_disposition",
        "write_disposition",
        "temp_file_format",
        "max_file_size",
        "max_partition_size",
        "custom_gcs_temp_location",
        "table_side_inputs",
        "test_client",
        "validate",
    } <= options


@pytest.mark.parametrize("number", [0, 1, -1, 63, 64, -64, -65, 1 << 31, -(1 << 31), (1 << 62) - 1])
def test_longs(number):
    out = io.BytesIO()
    fastavro.schemaless_writer(out, "long", number)
    assert avro._long(number) == out.getvalue()


def test_a_file_that_has_reached_its_limit_is_closed(tmp_path):
    """Cloud Storage takes no file without end, and a load job none of more than its limit."""
    batch = Batch("run", pa.array(["a", "b"]), np.ones((2, 8), "<f4"))
    schema = {"fields": tables.staging_schema("user")}
    writing = avro.Writing("user", {}, {"run": [*CONSTANTS.values()]}, "<f4")
    block = sum(len(part) for block in avro.blocks(batch, [*CONSTANTS.values()], SYNC, "<f4") for part in block)
    header = len(avro.file_header(avro.avro_schema(schema, "<f4"), SYNC))
    # Two batches reach the limit to the byte.
    step = avro._WriteFn(schema, writing, header + 2 * block)
    step.start_bundle()
    outputs = []
    for number in range(5):
        read_ahead = Future()
        read_ahead.set_result((batch, Report("run", "user", 2 * number, rows=2, ids=2)))
        outputs += step._write("p:d.t", str(tmp_path), read_ahead)
    outputs += [windowed.value for windowed in step.finish_bundle()]
    files = [output[1] for output in outputs if isinstance(output, tuple)]
    assert [size for _, size in files] == [header + 2 * block, header + 2 * block, header + block]
    assert len({path for path, _ in files}) == 3
    for path, size in files:
        assert re.fullmatch(re.escape(f"{tmp_path}/p.d.t/") + "[0-9a-f]{32}", path)
        data = Path(path).read_bytes()
        assert len(data) == size
        assert {record["user_id"] for record in read(data)[1]} == {"a", "b"}


def bundle(step, elements, folder):
    """Runs a bundle to its end; returns its reports and the ids in its files."""
    step.start_bundle()
    outputs = [output for element in elements for output in step.process(("p:d.t", element), folder)]
    for output in step.finish_bundle():
        outputs.append(
            TaggedOutput(output.tag, output.value.value) if isinstance(output, TaggedOutput) else output.value
        )
    files = [output[1][0] for output in outputs if isinstance(output, tuple)]
    reports = [output.value for output in outputs if isinstance(output, TaggedOutput)]
    return reports, [record["user_id"] for path in files for record in read(Path(path).read_bytes())[1]]


@pytest.fixture
def sink():
    """A function that returns the step that reads and writes pieces of a tower."""
    steps = []

    def make(tower, **changes):
        writing = avro.Writing("user", {"run": tower}, {"run": [*CONSTANTS.values()]}, "<f4", **changes)
        steps.append(avro._WriteFn({"fields": tables.staging_schema("user")}, writing, 1 << 30))
        steps[-1].setup()
        return steps[-1]

    yield make
    for step in steps:
        step.teardown()


def test_a_bundle_that_is_retried_reads_again_and_writes_files_of_its_own(models, sink, tmp_path):
    tower = SavedModel(str(models("plain").folder), open_file).tower("user", "user_layer")
    cut = [("run", piece) for piece in pieces.cut(tower, open_file, 10_000)]
    assert len(cut) > 5
    assert all(len(pickle.dumps(element)) < 500 for element in cut)  # No vector travels.
    step = sink(tower)
    step.start_bundle()
    for element in cut[:4]:  # Then the bundle fails.
        assert not [output for output in step.process(("p:d.t", element), str(tmp_path)) if isinstance(output, tuple)]
    reports, ids = bundle(step, cut, str(tmp_path))
    assert ids == models("plain").ids("user")
    assert [report.first_row for report in reports] == [piece.first_row for _, piece in cut]


def test_blocks_are_written_in_their_order(tmp_path):
    """By one thread: two would mix them."""

    class Slow(io.BytesIO):
        def writelines(self, parts):
            time.sleep(0.2 * (self.tell() == 0))
            super().writelines(parts)

        def close(self):
            pass

    batch = Batch("run", pa.array([*"abcde"]), np.zeros((5, 8), "<f4"))
    file = avro._AvroFile(str(tmp_path), avro.avro_schema({"fields": tables.staging_schema("user")}, "<f4"))
    file._stream.close()
    file._stream, header = Slow(), file.size
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(avro, "BLOCK_BYTES", 32)
        file.write(batch, [*CONSTANTS.values()], "<f4")
        blocks = [*avro.blocks(batch, [*CONSTANTS.values()], file._sync, "<f4")]
    _, size = file.close()
    assert file._stream.getvalue() == b"".join(b"".join(block) for block in blocks)
    assert size == header + len(file._stream.getvalue())


def test_load_files_are_avro_objects_that_nothing_compresses(monkeypatch):
    created = []
    monkeypatch.setattr(
        avro.FileSystems, "create", lambda *args, **options: created.append((args, options)) or io.BytesIO()
    )
    path, _ = avro._AvroFile("gs://bucket/folder", {}).close()
    assert path.startswith("gs://bucket/folder/")
    assert created == [((path, "application/avro"), {"compression_type": avro.CompressionTypes.UNCOMPRESSED})]


def test_one_piece_is_read_at_a_time(sink, monkeypatch, tmp_path):
    """One more is in memory, which is written meanwhile."""
    reading, at_once = threading.Lock(), []

    def read(element, towers, open_file):
        at_once.append(not reading.acquire(blocking=False))
        time.sleep(0.05)
        reading.release()
        return None, Report("run", "user", element)

    monkeypatch.setattr(avro.rows, "read", read)
    reports, _ = bundle(sink(described("user")), [1, 2, 3, 4], str(tmp_path))
    assert [report.first_row for report in reports] == [1, 2, 3, 4]
    assert at_once == [False] * 4


def test_what_is_shown_of_the_step(sink):
    shown = sink(described("user"), displayed={"writer": "columnar"}).display_data()
    assert (shown["run"], shown["tower"], shown["writer"]) == ("run", "user", "columnar")


def test_computed_vectors_enter_the_same_step(sink, tmp_path):
    batches = [
        Batch("run", pa.array(["a", "b"]), np.ones((2, 8), "<f4")),
        Batch("run", pa.array(["c"]), np.full((1, 8), np.nan, "<f4")),
        Batch("run", pa.array(["d"]), np.ones((1, 8), "<f2")),
    ]
    reports, ids = bundle(sink(described("user", rows=4, checksum=False)), batches, str(tmp_path))
    assert ids == ["a", "b", "d"]
    assert [(report.rows, report.ids) for report in reports] == [(2, 2), (0, 0), (1, 1)]
    assert "holds NaN" in str(reports[1].problem)


@pytest.mark.parametrize(
    ("dtypes", "written"),
    [(["float32", "float16"], "<f4"), (["bfloat16"], "<f4"), (["float32", "float64"], "<f8")],
)
def test_files_have_floats_wide_enough_for_every_run(dtypes, written):
    """One width for a load job, whose files must not differ in their schema."""
    trainings = []
    for number, dtype in enumerate(dtypes):
        tower = described("user")
        tower = dataclasses.replace(tower, matrix=dataclasses.replace(tower.matrix, dtype=dtype))
        run = Run(f"run{number}", "", "", "", date(2026, 3, 1), "")
        trainings.append(Training(run, "", {"user": tower}))
    what = Publication(Destination("p", "d", "EU", "t"), tuple(trainings), "gs://b/tmp", "fail", "token")
    pipeline = beam.Pipeline(options=PipelineOptions(["--project=p"]))
    prepared = beam.pvalue.AsSingleton(pipeline | beam.Create(["launch"]))
    outputs = pipeline | "Pieces" >> beam.Create([]) | WriteStaging("user", what, prepared, "columnar")
    writing = outputs[REPORTS].producer
    assert writing.full_label == "WriteStaging/Load/WritePiecesToFiles/ParDo(_WriteFn)"
    step = writing.transform.fn
    assert step._writing.dtype == written
    assert step._max_bytes == MAX_FILE_BYTES
    assert step._schema == avro.avro_schema({"fields": tables.staging_schema("user")}, written)
    loads = next(part for part in parents(writing) if isinstance(part.transform, avro.WritePieces))
    assert loads.transform.dynamic_destinations is False  # Beam would load temporary tables and copy them.


def parents(part):
    while part := part.parent:
        yield part
