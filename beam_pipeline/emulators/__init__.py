"""Everything that sends the job to emulators instead of Google Cloud.

None of it is active unless `--warehouse` is used or BIGQUERY_EMULATOR_HOST and STORAGE_EMULATOR_HOST are set, the
variables that Google's own clients honour.

`Warehouse` runs bqemulator and gcp-storage-emulator in one child process on free ports, with their data in a folder.
The child holds a pipe from its parent and ends when that breaks, so it never outlives a job, not even a killed one.

    python -m beam_pipeline.emulators DIR      serves a folder, so that bq, a notebook or a client can query it
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from beam_pipeline import command
from beam_pipeline.errors import WarehouseError

PROJECT = "local"
BUCKET = "warehouse"

_START_SECONDS = 90
_STOP_SECONDS = 10
_READ_HOST = "BIGQUERY_STORAGE_EMULATOR_HOST"
_VARIABLES = ("BIGQUERY_EMULATOR_HOST", "STORAGE_EMULATOR_HOST", _READ_HOST, "GOOGLE_CLOUD_PROJECT", "no_proxy")
_FOREIGN = ("BQEMU_", "STORAGE_BASE", "STORAGE_DIR")


def emulated(environ: Mapping[str, str] = os.environ) -> bool:
    """Returns whether the environment points to emulators.

    Raises:
        WarehouseError: to one of BigQuery alone; load files would go to the real Cloud Storage.
    """
    if not environ.get("BIGQUERY_EMULATOR_HOST"):
        return False
    if not environ.get("STORAGE_EMULATOR_HOST"):
        raise WarehouseError("BIGQUERY_EMULATOR_HOST is set and STORAGE_EMULATOR_HOST is not; set both or none")
    return True


def connect_if_emulated() -> None:
    """Connects this process if the environment points to emulators; a DoFn's `setup` calls it wherever it runs."""
    if emulated():
        connect()


def read_host(environ: Mapping[str, str] = os.environ) -> str:
    """Returns host:port of the emulator's Storage Read API, which is gRPC; Google's client has no variable for it.

    Raises:
        WarehouseError: the variable is not set.
    """
    if not environ.get(_READ_HOST):
        raise WarehouseError(
            f"BIGQUERY_EMULATOR_HOST is set and {_READ_HOST} is not; set it to host:port of the emulator's gRPC"
        )
    return environ[_READ_HOST].rpartition("://")[2]


def storage_url(environ: Mapping[str, str] = os.environ) -> str | None:
    """Returns where the emulator of Cloud Storage answers, if the environment points to one."""
    return _url(environ["STORAGE_EMULATOR_HOST"]) if environ.get("STORAGE_EMULATOR_HOST") else None


def connect() -> None:
    """Connects the Google clients of this process, Beam's among them, to the emulators, without credentials."""
    import google.auth
    from apache_beam.io.gcp.internal.clients.bigquery import BigqueryV2
    from google.auth.credentials import AnonymousCredentials

    for name in ("BIGQUERY_EMULATOR_HOST", "STORAGE_EMULATOR_HOST"):
        os.environ[name] = _url(os.environ[name])
    project = os.environ.get("GOOGLE_CLOUD_PROJECT", PROJECT)

    def default(*_args: Any, **_options: Any) -> tuple[AnonymousCredentials, str]:
        return AnonymousCredentials(), project

    # All of Google's libraries ask here; the real answer waits for a metadata server that is not there.
    google.auth.default = default
    # Beam's own BigQuery client knows no variable.
    BigqueryV2.BASE_URL = f"{os.environ['BIGQUERY_EMULATOR_HOST'].rstrip('/')}/bigquery/v2/"


def _url(host: str) -> str:
    """Returns a URL, as the clients want it; emulators often report host:port."""
    return host if "://" in host else f"http://{host}"


def beam_client() -> Any:
    """Returns Beam's own BigQuery client, connected to the emulator as its process then is; None without one."""
    if not emulated():
        return None
    connect()
    from apache_beam.io.gcp.internal.clients.bigquery import BigqueryV2

    # Otherwise the client would look for credentials, and start a browser's login without any.
    return BigqueryV2(get_credentials=False)


class Warehouse:
    """A BigQuery and a Cloud Storage on this machine, whose data stay in a folder; a context manager.

    Inside, this process and its children find them by the environment.

    Attributes:
        project: of BigQuery.
        bucket: on Cloud Storage, created at the start.
        temp_location: `gs://` folder in it.
        bigquery_url, storage_url: where they answer.
        read_host: host:port of BigQuery's Storage Read API, which is gRPC.
    """

    project = PROJECT
    bucket = BUCKET
    temp_location = f"gs://{BUCKET}/tmp"

    def __init__(self, directory: str, port: int = 0) -> None:
        """Takes the folder, created if missing, and a port for BigQuery; 0 takes a free one."""
        self._directory = Path(directory).absolute()
        self._port = port
        self.bigquery_url = self.storage_url = self.read_host = ""

    def __enter__(self) -> Warehouse:
        """Starts the emulators.

        Raises:
            WarehouseError: the folder is in use, or they do not start.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._locked())
            self._start(stack)
            before = {name: os.environ.get(name) for name in _VARIABLES}
            stack.callback(_set_environment, before)
            # Behind a proxy, the clients would ask it for this machine's own address.
            direct = ",".join(filter(None, (before["no_proxy"] or os.environ.get("NO_PROXY"), "127.0.0.1")))
            values = (self.bigquery_url, self.storage_url, self.read_host, PROJECT, direct)
            _set_environment(dict(zip(_VARIABLES, values, strict=True)))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Stops the emulators and releases the folder."""
        self._stack.close()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            lock = (self._directory / "in_use").open("a+")
        except OSError as error:
            raise WarehouseError(f"warehouse folder {self._directory} cannot be used: {error.strerror}") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                lock.seek(0)
                raise WarehouseError(
                    f"warehouse {self._directory} is in use by process {lock.read().strip() or '?'}; one job at a time "
                    "can use a folder: wait for it, or name another"
                ) from error
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            yield

    def _start(self, stack: contextlib.ExitStack) -> None:
        if importlib.util.find_spec("bqemulator") is None or importlib.util.find_spec("gcp_storage_emulator") is None:
            raise WarehouseError("the emulators are not installed; pip install 'beam-pipeline[warehouse]'")
        if self._port:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind(("127.0.0.1", self._port))
                except OSError as error:
                    raise WarehouseError(
                        f"port {self._port} cannot be used: {error.strerror}; name another with --port, or --port=0"
                    ) from error
        log_path = self._directory / "emulators.log"
        log = stack.enter_context(log_path.open("w"))
        child = subprocess.Popen(
            [sys.executable, "-m", "beam_pipeline.emulators", "--child", f"--port={self._port}", str(self._directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            # A stray settings file of bqemulator's in the current folder must not matter, nor Ctrl-C reach the child:
            # the job has to clean up first.
            cwd=self._directory,
            # Nor must their variables: they could open the emulators to the network, or move the objects away.
            env={
                **{name: value for name, value in os.environ.items() if not name.upper().startswith(_FOREIGN)},
                "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
            },
            start_new_session=True,
        )
        stack.callback(_stop, child)
        assert child.stdout is not None
        ports: dict[str, int] = _read_line(child.stdout, _START_SECONDS)
        if not ports:
            log.flush()
            lines = [line.strip() for line in log_path.read_text().splitlines() if line.strip()]
            last = lines[-1][-300:] if lines else "no output"
            raise WarehouseError(f"the emulators did not start: {last}; see {log_path}")
        self.bigquery_url = f"http://127.0.0.1:{ports['bigquery']}"
        self.storage_url = f"http://127.0.0.1:{ports['storage']}"
        self.read_host = f"127.0.0.1:{ports['read']}"


def main(argv: Sequence[str] | None = None) -> int:
    """Serves a warehouse folder until it is interrupted; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog=command.program("emulators"),
        description="Serves a folder that --warehouse has filled, so that bq, a notebook or a client can query it.",
        allow_abbrev=False,
    )
    parser.add_argument("directory", metavar="DIR", help="the folder")
    parser.add_argument("--port", type=int, default=9050, help="of BigQuery; 0 takes a free one (default: %(default)s)")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        return asyncio.run(_run_emulators(Path(args.directory), args.port))
    return command.exit_code(lambda: _serve(args.directory, args.port))


def _serve(directory: str, port: int) -> None:
    if not Path(directory).is_dir():
        raise WarehouseError(f"no warehouse at {directory}; a job with --warehouse={directory} creates one")
    with Warehouse(directory, port) as warehouse, contextlib.suppress(KeyboardInterrupt):
        print(_HOW_TO_QUERY.format(warehouse=warehouse), flush=True)
        while True:
            time.sleep(3600)


_HOW_TO_QUERY = """\
BigQuery       {warehouse.bigquery_url}   project {warehouse.project}
Cloud Storage  {warehouse.storage_url}

For programs that use Google's clients:
  export BIGQUERY_EMULATOR_HOST={warehouse.bigquery_url}
  export STORAGE_EMULATOR_HOST={warehouse.storage_url}
  export BIGQUERY_STORAGE_EMULATOR_HOST={warehouse.read_host}

With bq:
  bq --api={warehouse.bigquery_url} --project_id={warehouse.project} query --use_legacy_sql=false \\
    'SELECT train_date, COUNT(*) FROM raw_dev.two_tower_item_embedding GROUP BY 1'

In a notebook:
  from google.auth.credentials import AnonymousCredentials
  from google.cloud import bigquery
  client = bigquery.Client("{warehouse.project}", AnonymousCredentials(),
                           client_options={{"api_endpoint": "{warehouse.bigquery_url}"}})

Ctrl-C stops."""


# The child process.


async def _run_emulators(directory: Path, port: int) -> int:
    """Runs both emulators until the parent is gone; prints their ports as one line of JSON."""
    announce, sys.stdout = sys.stdout, sys.stderr
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stopped.set)
    threading.Thread(target=_watch_parent, args=(loop, stopped), daemon=True).start()
    # The emulators of a parent that was killed may still be about to stop, and DuckDB opens its file once.
    lock = await asyncio.to_thread(_wait_for_lock, directory / "emulators_running")
    # DuckDB looks for extensions below its home, and would download what it does not find there.
    os.environ["HOME"] = str(directory / "home")
    _install_extensions(directory / "home")

    from bqemulator.config import LogLevel, PersistenceMode, Settings
    from bqemulator.server import EmulatorServer
    from gcp_storage_emulator.server import create_server

    bigquery = EmulatorServer(
        Settings(
            rest_host="127.0.0.1",
            rest_port=port,
            grpc_host="127.0.0.1",
            grpc_port=0,
            # A page of the Storage Read API has 65,536 rows, and this limit is on it too.
            write_api_max_request_bytes=1 << 30,
            persistence_mode=PersistenceMode.PERSISTENT,
            data_dir=directory / "bigquery",
            default_project_id=PROJECT,
            # The storage emulator keeps objects as plain files, so load jobs read them where they are.
            gcs_local_root=directory / "storage" / ".cloudstorage",
            log_level=LogLevel.WARNING,
        )
    )
    await bigquery.start()
    # Last: its thread would keep a process alive in which the other did not start.
    storage = create_server("127.0.0.1", 0, data_dir=str(directory / "storage"), default_bucket=BUCKET)
    storage.start()
    storage_port = storage._api._httpd.server_port
    try:
        # As a new bucket of a real project would, the emulator keeps deleted objects for a week.
        no_soft_delete = urllib.request.Request(
            f"http://127.0.0.1:{storage_port}/storage/v1/b/{BUCKET}",
            json.dumps({"softDeletePolicy": {"retentionDurationSeconds": "0"}}).encode(),
            {"Content-Type": "application/json"},
            method="PATCH",
        )
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(no_soft_delete).close()
        ports = {"bigquery": bigquery.rest_port, "storage": storage_port, "read": bigquery.grpc_port}
        print(json.dumps(ports), file=announce, flush=True)
        await stopped.wait()
    finally:
        await bigquery.stop()
        storage.stop()
    lock.close()
    return 0


def _watch_parent(loop: asyncio.AbstractEventLoop, stopped: asyncio.Event) -> None:
    """Stops the emulators when the pipe from the parent breaks; kills them if they do not stop by themselves."""
    sys.stdin.read()
    loop.call_soon_threadsafe(stopped.set)
    time.sleep(_STOP_SECONDS / 2)
    os._exit(1)


def _wait_for_lock(path: Path) -> IO[str]:
    lock = path.open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def _install_extensions(home: Path) -> None:
    """Links the extensions that came with packages into DuckDB's home."""
    import duckdb

    with duckdb.connect() as connection:
        ((version,),) = connection.sql("SELECT library_version FROM pragma_version()").fetchall()
        ((platform,),) = connection.sql("PRAGMA platform").fetchall()
    folder = home / ".duckdb" / "extensions" / version / platform
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("spatial", "avro"):
        package = importlib.util.find_spec(f"duckdb_extension_{name}")
        if package is None or not package.submodule_search_locations:
            raise WarehouseError(f"duckdb-extension-{name} is not installed; pip install 'beam-pipeline[warehouse]'")
        source = Path(package.submodule_search_locations[0]) / "extensions" / version / f"{name}.duckdb_extension"
        link = folder / source.name
        link.unlink(missing_ok=True)
        link.symlink_to(source)


# The parent.


def _read_line(stream: IO[str], seconds: float) -> Any:
    """Returns a line of JSON, or None if the stream ends or time runs out before."""
    found: list[str] = []
    reader = threading.Thread(target=lambda: found.append(stream.readline()), daemon=True)
    reader.start()
    reader.join(seconds)
    return json.loads(found[0]) if found and found[0] else None


def _stop(child: subprocess.Popen[str]) -> None:
    child.terminate()
    try:
        child.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    for pipe in (child.stdin, child.stdout):
        if pipe:
            pipe.close()


def _set_environment(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
