"""What a worker holds does not grow with the vocabulary; nor does what the launcher reads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import storage_server
from wire_format import blown_up

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")

# Reads a matrix of 400 MB with a million ids and writes it to files, as a worker's thread does.
WORKER = """
import os, re, sys
from datetime import date
import apache_beam as beam
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from beam_pipeline.bigquery import avro, tables
from beam_pipeline.formats.model import Checksum, Encoding, Matrix, Tower, Vocabulary
from beam_pipeline.formats.protobuf import Span
from beam_pipeline.reading.transforms import PIECES, CutTower

folder, model, rows = sys.argv[1], sys.argv[2], int(sys.argv[3])
tower = Tower(
    "user",
    "user_layer",
    Matrix(f"{model}/weights", 0, rows, 100, "float32", Checksum("crc32c", 0, Span(0, rows * 400))),
    Vocabulary(f"{model}/ids", Span(0, rows * 14), Encoding.LINES, 0),
)
writing = avro.Writing("user", {"r": tower}, {"r": [date(2026, 3, 1), 0]}, "<f4")
with beam.Pipeline(runner=FnApiRunner()) as pipeline:
    pieces = (pipeline | CutTower({"r": tower}))[PIECES]
    keyed = pieces | beam.Map(lambda piece: ("p:d.t", piece))
    write = avro._WriteFn({"fields": tables.staging_schema("user")}, writing, 1 << 30)
    _ = keyed | beam.ParDo(write, f"{folder}/out").with_outputs("reports", main="files")
written = sum(os.path.getsize(os.path.join(f, name)) for f, _, names in os.walk(f"{folder}/out") for name in names)
assert written > rows * 400, written
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) // 1024)
"""


def peak(folder, model, rows, **environment):
    command = [sys.executable, "-c", WORKER, str(folder), model, str(rows)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **environment})
    return int(done.stdout)


@pytest.fixture
def matrix(tmp_path):
    """A function that writes ids and a matrix of so many rows into a folder of their own; returns the folder."""

    def write(rows):
        folder = tmp_path / str(rows)
        folder.mkdir()
        (folder / "ids").write_text("".join(f"user-{i:08}\n" for i in range(rows)))
        with (folder / "weights").open("wb") as file:
            file.truncate(rows * 100 * 4)
        return folder

    return write


def test_a_worker_holds_a_few_pieces(matrix):
    """The bound in docs/scale.md: 100 MB per thread above the imports, whatever the rows."""
    small, large = (peak(folder, str(folder), int(folder.name)) for folder in (matrix(1_000), matrix(1_000_000)))
    assert large - small < 100


def test_a_worker_holds_a_few_pieces_of_what_it_fetches(tmp_path, matrix):
    """The same over HTTP, and what it fetches is what it needs."""
    rows, peaks = (1_000, 1_000_000), []
    for count in rows:
        folder = matrix(count)
        with storage_server.serve(tmp_path) as storage:
            peaks.append(peak(folder, f"gs://{folder.name}", count, STORAGE_EMULATOR_HOST=storage.url))
            assert storage.fetched["weights"] == 400 * count
            assert storage.fetched["ids"] <= 2.05 * 14 * count  # They are cut first, and read then.
    assert peaks[1] - peaks[0] < 100
    assert storage.requests < 250


def test_workers_import_neither_mlflow_nor_tensorflow():
    code = "import sys, beam_pipeline.pipeline; print({'mlflow', 'tensorflow', 'keras', 'bqemulator'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


# Finds a tower among ten million ids that lie inside the graph.
LAUNCHER = """
import re, sys
from beam_pipeline.files import open_file
from beam_pipeline.formats.saved_model.reader import SavedModel
tower = SavedModel(sys.argv[1], open_file).tower("user", "user_layer")
assert tower.vocabulary.count == int(sys.argv[2]), tower.vocabulary
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) // 1024)
"""


def test_the_launcher_scans_ten_million_ids(damaged):
    """A real SavedModel whose user vocabulary is blown up in place: the same graph, ten million ids, 0.25 GB."""
    model, count = damaged("plain"), 10_000_000

    path = model.folder / "saved_model.pb"
    path.write_bytes(blown_up(path.read_bytes(), len(model.ids("user")), count))
    assert path.stat().st_size > 230_000_000
    command = [sys.executable, "-c", LAUNCHER, str(model.folder), str(count)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 400
