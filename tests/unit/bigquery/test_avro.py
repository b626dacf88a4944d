"""The columnar writer against the built-in sink: the same records, for any ids and vectors.

The Avro schema is the same too, where the vectors are of doubles.
"""

import dataclasses
import inspect
import io
import pickle
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
from beam_pipeline.bigquery.staging import WriteStaging
from beam_pipeline.bigquery.tables import Destination
from beam_pipeline.files import open_file
from beam_pipeline.formats.saved_model.reader import SavedModel
from beam_pipeline.reading import pieces
from beam_pipeline.reading.rows import Batch, to_rows
from beam_pipeline.reading.tally import Report
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
    for path, size in files:
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
    made = []
    with pytest.MonkeyPatch.context() as patch:
        init = avro.WritePieces.__init__
        patch.setattr(
            avro.WritePieces,
            "__init__",
            lambda self, **options: made.append(options["writing"]) or init(self, **options),
        )
        _ = pipeline | "Pieces" >> beam.Create([]) | WriteStaging("user", what, prepared, "columnar")
    assert [writing.dtype for writing in made] == [written]
