"""The embedded warehouse as a person uses it: one job after the other, and a command that serves the folder."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import edges
import numpy as np
import pytest
from google.auth.credentials import AnonymousCredentials
from google.cloud import bigquery
from job import DESTINATION_TABLES, MARCH_1

from beam_pipeline import emulators
from beam_pipeline.errors import WarehouseError


def client_of(url):
    return bigquery.Client("local", AnonymousCredentials(), client_options={"api_endpoint": url})


def children_of(directory):
    """Returns the processes that run emulators of a folder; by /proc, since not every machine has pgrep."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            arguments = path.read_bytes().split(b"\0")
            if b"--child" in arguments and str(directory).encode() in arguments:
                found.append(path.parent.name)
    return found


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A warehouse folder with a table of one row, made by a process that was killed right after."""
    folder = tmp_path_factory.mktemp("filled") / "warehouse"
    code = (
        "import sys, time\n"
        "from google.cloud import bigquery\n"
        "from beam_pipeline import emulators\n"
        f"with emulators.Warehouse({str(folder)!r}) as warehouse:\n"
        "    emulators.connect()\n"
        "    client = bigquery.Client()\n"
        "    client.create_dataset('kept')\n"
        "    client.query_and_wait('CREATE TABLE kept.t AS SELECT 7 AS x')\n"
        "    print('READY', flush=True)\n"
        "    time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "READY\n"
    with (
        pytest.raises(WarehouseError, match=rf"{folder} is in use by process {process.pid};"),
        emulators.Warehouse(folder),
    ):
        pass
    process.kill()
    process.wait()
    return folder


def test_emulators_die_with_a_killed_parent_and_the_data_stay(filled):
    before = os.environ.get("BIGQUERY_EMULATOR_HOST")  # of the session's warehouse, if a test has started that
    with emulators.Warehouse(str(filled)) as warehouse:
        assert os.environ["BIGQUERY_EMULATOR_HOST"] == warehouse.bigquery_url
        assert [row.x for row in client_of(warehouse.bigquery_url).query_and_wait("SELECT x FROM kept.t")] == [7]
        assert len(children_of(filled)) == 1  # ours; the killed one's are gone
    assert os.environ.get("BIGQUERY_EMULATOR_HOST") == before
    assert children_of(filled) == []


def test_the_serve_command(filled):
    command = [sys.executable, "-m", "beam_pipeline.emulators", str(filled), "--port=0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "Ctrl-C stops" in line:
            break
    url = re.search(r"export BIGQUERY_EMULATOR_HOST=(\S+)", "".join(lines))[1]
    assert [row.x for row in client_of(url).query_and_wait("SELECT x FROM kept.t")] == [7]
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    assert process.stderr.read() == ""
    assert children_of(filled) == []


def test_serving_a_folder_that_is_not_there(tmp_path):
    command = [sys.executable, "-m", "beam_pipeline.emulators", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.fullmatch(r"error: no warehouse at \S+; a job with --warehouse=\S+ creates one\n", done.stderr)


def test_emulators_that_do_not_start(tmp_path, monkeypatch):
    (tmp_path / "bigquery").write_text("in the way")
    with (
        pytest.raises(WarehouseError, match=r"the emulators did not start: .*File exists"),
        emulators.Warehouse(str(tmp_path)),
    ):
        pass
    assert children_of(tmp_path) == []


def test_variables_that_are_not_for_the_emulators(tmp_path):
    """A proxy, and settings of the emulators that would open them to the network or move the objects away."""
    code = (
        "from google.cloud import bigquery, storage\n"
        "from beam_pipeline import emulators\n"
        f"with emulators.Warehouse({str(tmp_path)!r}):\n"
        "    emulators.connect()\n"
        "    storage.Client().bucket('warehouse').blob('a').upload_from_string('x', retry=None)\n"
        "    assert [row.x for row in bigquery.Client().query_and_wait('SELECT 1 AS x', retry=None)] == [1]\n"
    )
    closed = "http://127.0.0.1:9"
    environment = os.environ | {"BQEMU_REST_HOST": "192.0.2.1", "STORAGE_DIR": "away", "http_proxy": closed}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=60)
    assert (tmp_path / "storage" / ".cloudstorage" / "warehouse" / "a").exists()


def test_a_port_that_is_taken(tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with (
            pytest.raises(WarehouseError, match=f"port {port} cannot be used: .*; name another"),
            emulators.Warehouse(str(tmp_path), port),
        ):
            pass


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WarehouseError, match="cannot be used"), emulators.Warehouse(str(tmp_path / "file" / "x")):
        pass


@pytest.mark.parametrize(
    ("environment", "answer"),
    [
        ({}, False),
        ({"STORAGE_EMULATOR_HOST": "http://localhost:1"}, False),
        ({"BIGQUERY_EMULATOR_HOST": "localhost:1", "STORAGE_EMULATOR_HOST": "http://localhost:2"}, True),
    ],
)
def test_when_emulators_are_used(environment, answer):
    assert emulators.emulated(environment) is answer


def test_one_emulator_without_the_other():
    with pytest.raises(WarehouseError, match="STORAGE_EMULATOR_HOST is not"):
        emulators.emulated({"BIGQUERY_EMULATOR_HOST": "localhost:1"})


def test_nothing_is_active_without_it():
    code = (
        "import google.auth; before = google.auth.default\n"
        "import beam_pipeline.launch.launcher\n"
        "from apache_beam.io.gcp.internal.clients.bigquery import BigqueryV2\n"
        "assert google.auth.default is before\n"
        "assert 'googleapis.com' in BigqueryV2.BASE_URL\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_beams_client_connects_its_process(warehouse):
    code = (
        "from beam_pipeline import emulators; client = emulators.beam_client()\n"
        "import google.auth; print(client.url, type(google.auth.default()[0]).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [f"{warehouse.bigquery_url}/bigquery/v2/", "AnonymousCredentials"]


def test_floats_are_widened_exactly(job):
    """The warehouse loads Avro floats as BigQuery does (tests/gcp shows that of the service), to the bit."""
    client, folder = job.client, f"gs://warehouse/{job.dataset}"
    loaded = edges.load(client, f"{client.project}.{job.dataset}.edges", folder)
    assert loaded.tobytes() == edges.VECTORS.astype(np.float64).tobytes()


def test_without_emulators_beam_has_its_own_client(monkeypatch):
    monkeypatch.delenv("BIGQUERY_EMULATOR_HOST", raising=False)
    assert emulators.beam_client() is None


@pytest.mark.parametrize("writer", ["columnar", "rows"])
def test_workers_in_other_processes(job, store, models, writer):
    """They find the emulators by the environment alone."""
    run = store.log(models("plain"), "plain", MARCH_1)
    flags = ["--direct_running_mode=multi_processing", "--direct_num_workers=2", f"--writer={writer}"]
    done = job.subprocess(run, *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    assert job.rows("user") == {("2026-03-01", run): models("plain").rows("user")}
    assert "rows        " not in done.stdout  # This process sees nothing of them
    assert "done        in " in done.stdout.splitlines()[-1]
    assert "first vectors" not in done.stdout


def below(pid):
    """Yields the ids of the processes that a process has started, and theirs."""
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in path.read_text().split():
            yield int(child)
            yield from below(child)


def test_a_worker_process_dies(job, store, models):
    """Beam itself waits for its answer for ever."""
    run = store.log(models("plain"), "plain", MARCH_1)
    process = job.start(run, "--direct_running_mode=multi_processing", "--direct_num_workers=2")
    while process.poll() is None and not any("_staging_" in table for table in job.tables()):
        time.sleep(0.1)
    workers = [
        pid
        for pid in below(process.pid)
        if b"runners.worker.sdk_worker_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    os.kill(workers[-1], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "error: the job failed: Worker subprocess exited with return code" in errors
    assert job.tables() == set()


_DIES_AT_START = """
import os, signal, sys
if any("sdk_worker_main" in word for word in sys.orig_argv):
    try:
        os.close(os.open({marker!r}, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        pass
    else:
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_worker_process_dies_before_it_has_connected(job, store, models, tmp_path):
    """The other one is still importing, and would wait for ever for a launcher that has given up."""
    (tmp_path / "sitecustomize.py").write_text(_DIES_AT_START.format(marker=str(tmp_path / "first")))
    run = store.log(models("plain"), "plain", MARCH_1)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    flags = ["--direct_running_mode=multi_processing", "--direct_num_workers=2"]
    done = job.subprocess(run, *flags, env=environment, timeout=60)
    assert done.returncode == 1
    assert "error: the job failed: Worker subprocess exited with return code" in done.stderr
    assert job.tables() == set()


def test_the_job_in_a_folder_of_its_own(tmp_path, store, models, commands):
    """The main command as the README has it: no cloud, no credentials, a dataset that is made."""
    from datetime import UTC, datetime

    run = store.log(models("longer"), "laptop", datetime(2026, 3, 1, tzinfo=UTC))
    command = [sys.executable, "-m", "beam_pipeline", f"--run_id={run}", f"--tracking_uri={store.uri}"]
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("BIGQUERY_EMULATOR_HOST", "STORAGE_EMULATOR_HOST", "GOOGLE_CLOUD_PROJECT")
    } | {"HOME": "/nonexistent"}
    folder = tmp_path / "warehouse"
    started = time.monotonic()
    done = subprocess.run([*command, f"--warehouse={folder}"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started < 60
    assert "published   local.raw_dev.two_tower_item_embedding, partition 2026-03-01: 50 rows" in done.stdout
    assert children_of(folder) == []
    with emulators.Warehouse(str(folder)) as warehouse:
        client = client_of(warehouse.bigquery_url)
        # What a killed job left: the emulator knows no expiration, the next job clears it.
        client.query_and_wait("CREATE TABLE raw_dev.two_tower_user_embedding_staging_dead AS SELECT 1 AS x")
        client.query_and_wait("CREATE TABLE raw_dev.beam_bq_job_LOAD_historizedead AS SELECT 1 AS x")
    done = commands.run([*command, f"--warehouse={folder}"], env=environment)
    assert done.returncode == 0, done.stderr
    with emulators.Warehouse(str(folder)) as warehouse:
        tables = {table.table_id for table in client_of(warehouse.bigquery_url).list_tables("raw_dev")}
    assert tables == DESTINATION_TABLES
