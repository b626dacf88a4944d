"""Engines that run the job in other processes: `make test-engines` builds them into .engines/."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import traffic as proxy
from models import made_by
from servers import free_port, running

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / ".engines"

ENGINES = ["prism", "job_service", "retrying", "twice", "multi_processing"]
if os.environ.get("BEAM_PIPELINE_JOB_ENDPOINT"):
    ENGINES.append("elsewhere")


def pytest_generate_tests(metafunc):
    """A test that takes an engine runs on each."""
    if "engine" in metafunc.fixturenames:
        metafunc.parametrize("engine", ENGINES, indirect=True)


@pytest.fixture(scope="session")
def traffic(warehouse):
    """What the workers see of the emulators; the launcher and the tests ask them directly."""
    with proxy.watched(warehouse.bigquery_url, warehouse.storage_url) as watched:
        yield watched


@contextmanager
def worker_pool(traffic, folder):
    """Runs a pool of SDK workers, each a process that Beam's own boot program starts; gives (process, flags)."""
    if not (TOOLS / "boot").exists():
        pytest.fail(f"{TOOLS}/boot is missing: run make test-engines")
    port = free_port()
    command = [sys.executable, "-m", "apache_beam.runners.worker.worker_pool_main", f"--service_port={port}"]
    command += [f"--container_executable={TOOLS / 'boot'}"]
    env = {
        **os.environ,
        # All that a worker knows of the emulators.
        "BIGQUERY_EMULATOR_HOST": traffic.bigquery_url,
        "STORAGE_EMULATOR_HOST": traffic.storage_url,
        "RUN_PYTHON_SDK_IN_DEFAULT_ENVIRONMENT": "1",  # boot would make a virtual environment for each worker
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(ROOT),
    }
    with running(command, folder / "log", port, cwd=folder, env=env) as process:
        yield process, ["--environment_type=EXTERNAL", f"--environment_config=localhost:{port}"]


@contextmanager
def retrying_service(folder):
    """Runs a job service of two SDK workers that repeats what failed, see retrying.py; gives (process, flags)."""
    port = free_port()
    command = [sys.executable, str(ROOT / "tests/support/retrying.py"), f"--port={port}"]
    with running(command, folder / "log", port, cwd=folder) as process:
        yield process, ["--runner=PortableRunner", f"--job_endpoint=localhost:{port}", "--direct_num_workers=2"]


def prism_on(workers):
    """Returns the flags that run a job on Prism, with these flags for its workers."""
    if not (TOOLS / "prism").exists():
        pytest.fail(f"{TOOLS}/prism is missing: run make test-engines")
    return ["--runner=PrismRunner", f"--prism_location={TOOLS / 'prism'}", *workers]


@pytest.fixture(scope="session")
def pool(traffic, tmp_path_factory):
    """The flags of a pool of SDK workers."""
    with worker_pool(traffic, tmp_path_factory.mktemp("pool")) as (_, flags):
        yield flags


@pytest.fixture(scope="session")
def prism(pool):
    """Apache Beam's Prism: one SDK worker for a job, which has up to eight bundles at a time."""
    return prism_on(pool)


@pytest.fixture(scope="session")
def job_service(pool, tmp_path_factory):
    """Beam's own job service: one SDK worker."""
    port = free_port()
    command = [sys.executable, "-m", "apache_beam.runners.portability.local_job_service_main", f"--port={port}"]
    folder = tmp_path_factory.mktemp("job_service")
    with running(command, folder / "log", port, cwd=folder):
        yield ["--runner=PortableRunner", f"--job_endpoint=localhost:{port}", *pool]


@pytest.fixture(scope="session")
def retrying(pool, tmp_path_factory):
    """A job service that repeats what failed, as Dataflow and Flink do."""
    with retrying_service(tmp_path_factory.mktemp("retrying")) as (_, flags):
        yield [*flags, *pool]


@dataclass(frozen=True)
class Mortal:
    """An engine of a test's own.

    Attributes:
        flags: of a job on it.
        kill: ends, at once, what the engine is named after.
    """

    flags: list[str]
    kill: Callable[[], None]


@pytest.fixture
def mortal(traffic, tmp_path):
    """Starts an engine that a test kills: Prism, a job service, or the pool that all workers of a job service are of."""
    with ExitStack() as engines:

        def mortal(name):
            pool = tmp_path / "pool"
            pool.mkdir()
            workers, flags = engines.enter_context(worker_pool(traffic, pool))
            if name == "prism":
                return Mortal(prism_on(flags), kill_prism)
            service, endpoint = engines.enter_context(retrying_service(tmp_path))

            def kill_pool():
                workers.kill()
                for worker in traffic.workers():
                    traffic.kill(worker)

            return Mortal([*endpoint, *flags], service.kill if name == "job service" else kill_pool)

        yield mortal


def kill_prism():
    """Kills the Prism that a launcher of this process's has started."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (entry / "exe").readlink() == TOOLS / "prism" and parent(parent(entry.name)) == os.getpid():
                os.kill(int(entry.name), signal.SIGKILL)
        except OSError:  # It has ended.
            continue


def parent(pid):
    """Returns the id of the process that a process was started by."""
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


@pytest.fixture(scope="session")
def twice(retrying):
    """The same; each bundle runs on both workers, and what the first one answers is lost."""
    return [*retrying, "--direct_runner_bundle_repeat=1"]


@pytest.fixture(scope="session")
def elsewhere(pool):
    """Whatever job service is running at BEAM_PIPELINE_JOB_ENDPOINT, such as that of a Flink cluster."""
    return ["--runner=PortableRunner", f"--job_endpoint={os.environ['BEAM_PIPELINE_JOB_ENDPOINT']}", *pool]


@pytest.fixture(scope="session")
def multi_processing():
    """DirectRunner with two worker processes."""
    return ["--direct_running_mode=multi_processing", "--direct_num_workers=2"]


@pytest.fixture(scope="session")
def deep():
    """Models whose towers have to be computed."""
    return made_by("make_deep_towers.py")


@pytest.fixture(scope="session")
def indexes():
    """Models that hold a search index."""
    return made_by("make_indexes.py")


@pytest.fixture(scope="session")
def label_encoded():
    """Models whose ids are not in them."""
    return made_by("make_label_encoded.py")


@pytest.fixture
def engine(request):
    """The flags of the engine that a test is parametrized with."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def run(job, tmp_path):
    """Runs the command line to its end; a hook is code that the launcher runs first, nothing else can set it up."""

    def run(run_id, *flags, hook=None, timeout=150):
        program = ["-m", "beam_pipeline"]
        if hook:
            script = tmp_path / "hooked.py"
            script.write_text(
                f"{hook}\nimport runpy\nrunpy.run_module('beam_pipeline', run_name='__main__', alter_sys=True)\n"
            )
            program = [str(script)]
        command = [sys.executable, *program, *job.command(run_id, *flags)[3:]]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout, env=env)
        Path(tmp_path, "stderr").write_text(done.stderr)
        return done

    return run
