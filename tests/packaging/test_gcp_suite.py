"""What can be shown of tests/gcp without Google Cloud: that its tests have the time and the places they need."""

import importlib.util
import subprocess
import sys
from pathlib import Path

from job import MARCH_1
from mlflow.tracking import MlflowClient
from store import Store

ROOT = Path(__file__).parents[2]
GCP = ROOT / "tests" / "gcp"
TIMEOUTS = """
import sys
import pytest

class Timeouts:
    def pytest_collection_finish(self, session):
        for item in session.items:
            print("SECONDS", item.originalname, item.get_closest_marker("timeout").args[0])

sys.exit(pytest.main([sys.argv[1], "--collect-only", "-q"], plugins=[Timeouts()]))
"""


def loaded(name):
    """Returns a module of tests/gcp, under a name of its own."""
    spec = importlib.util.spec_from_file_location(f"gcp_{name}", GCP / f"{name}.py")
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_test_may_take_as_long_as_what_it_waits_for():
    command = [sys.executable, "-c", TIMEOUTS, str(GCP)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("SECONDS ")]
    seconds = {name: float(number) for _, name, number in lines}
    assert seconds.pop("test_the_job_on_dataflow") > loaded("test_gcp").DATAFLOW_SECONDS
    # A job with real load jobs takes two minutes, and a test runs up to two.
    assert len(seconds) > 10
    assert min(seconds.values()) >= 600


def test_artifacts_are_in_the_bucket_of_whoever_runs_it(tmp_path, monkeypatch):
    cloud = loaded("conftest").Cloud("my-project", "my_dataset", "my-bucket", prefix="test_1")
    logged = []
    monkeypatch.setattr(
        MlflowClient, "log_artifacts", lambda self, run, *_: logged.append(self.get_run(run).info.artifact_uri)
    )
    model = type("Model", (), {"folder": tmp_path})
    run = Store(tmp_path, cloud).log(model, "on dataflow", MARCH_1, bucket=True)
    # Below what is deleted in the end.
    assert logged == [f"gs://my-bucket/{cloud.folder}/mlflow/{run}/artifacts"]
