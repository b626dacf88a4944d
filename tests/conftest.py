"""What many tests need: real models, made once for a session, and copies of them to damage."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

# A shell starts what it runs in the background (`make test &`) deaf to Ctrl-C, and so would be all jobs of the tests.
signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass(frozen=True)
class Model:
    """A SavedModel and what Keras says is in it."""

    folder: Path

    def ids(self, tower):
        return json.loads((self.folder.parent / f"{self.folder.name}.{tower}.json").read_text(encoding="utf-8"))

    def vectors(self, tower):
        return np.load(self.folder.parent / f"{self.folder.name}.{tower}.npy")

    def rows(self, tower):
        """Returns id → vector, as a list of float64."""
        return dict(zip(self.ids(tower), self.vectors(tower).tolist(), strict=True))


def made_by(script, tmp_path_factory, *names):
    """Runs a script that makes models; returns a function from a name in it to a Model, not to be written to."""
    folder = tmp_path_factory.mktemp(script.removesuffix(".py"))
    command = [sys.executable, str(Path(__file__).parent / script), str(folder), *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return lambda name: Model(folder / name)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    return made_by("make_models.py", tmp_path_factory)


@pytest.fixture(scope="session")
def keras_files(tmp_path_factory):
    """Here the folder of a Model holds model.keras."""
    return made_by("make_keras_files.py", tmp_path_factory)


@pytest.fixture(scope="session")
def tables(tmp_path_factory):
    return made_by("make_tables.py", tmp_path_factory)


@pytest.fixture
def damaged(models, tmp_path):
    """A function that copies a model so that a test can damage it."""

    def copy(name):
        shutil.copytree(models(name).folder, tmp_path / name)
        for beside in models(name).folder.parent.glob(f"{name}.*"):
            shutil.copy(beside, tmp_path)
        return Model(tmp_path / name)

    return copy


@pytest.fixture(scope="session", autouse=True)
def _clean_environment():
    """Tests see no emulator and no tracking server but their own."""
    for name in (
        "BIGQUERY_EMULATOR_HOST",
        "STORAGE_EMULATOR_HOST",
        "BIGQUERY_STORAGE_EMULATOR_HOST",
        "MLFLOW_TRACKING_URI",
        "GOOGLE_CLOUD_PROJECT",
    ):
        os.environ.pop(name, None)


@pytest.fixture(scope="session")
def warehouse(tmp_path_factory):
    """Emulators for the session; this process and its children talk to them."""
    from beam_pipeline import emulators

    with emulators.Warehouse(str(tmp_path_factory.mktemp("warehouse"))) as running:
        emulators.connect()
        yield running


class Store:
    """A real MLflow store.

    Attributes:
        uri: for --tracking_uri.
        experiment, experiment_id: the experiment that most runs belong to.
    """

    experiment = "two tower's é"

    def __init__(self, folder, warehouse):
        from mlflow.tracking import MlflowClient

        self.uri = f"sqlite:///{folder}/mlflow.db"
        self._folder = folder
        self._warehouse = warehouse
        self._client = MlflowClient(self.uri)
        self.experiment_id = self._client.create_experiment(self.experiment, f"file://{folder}/artifacts")

    def log(self, model, name, start, *, experiment=None, status="FINISHED", bucket=False):
        """Logs a model as the trainer does, to a run that started then; returns the run's id."""
        experiment_id = self.experiment_id
        if experiment or bucket:
            root = f"{self._warehouse.temp_location}/mlflow" if bucket else f"file://{self._folder}/{experiment}"
            there = self._client.get_experiment_by_name(experiment or f"on a bucket {name}")
            experiment_id = (
                there.experiment_id
                if there
                else self._client.create_experiment(experiment or f"on a bucket {name}", root)
            )
        run = self._client.create_run(experiment_id, start_time=int(start.timestamp() * 1000), run_name=name)
        self._client.log_artifacts(run.info.run_id, str(model.folder), "model")
        if status != "RUNNING":
            self._client.set_terminated(run.info.run_id, status)
        return run.info.run_id

    def artifacts(self, run_id):
        """Returns the model's folder of a run whose artifacts are local."""
        return Path(self._client.get_run(run_id).info.artifact_uri.removeprefix("file://")) / "model"

    def load_files(self, folder):
        """Returns the load files that are left below a folder of the temp location."""
        from google.cloud import storage

        bucket = storage.Client().bucket(self._warehouse.bucket)
        return [blob.name for blob in bucket.list_blobs(prefix=f"tmp/{folder}/")]


@pytest.fixture(scope="session")
def store(tmp_path_factory, warehouse):
    """An MLflow store for the session."""
    return Store(tmp_path_factory.mktemp("mlflow"), warehouse)


@pytest.fixture
def job(warehouse, store, request):
    """Runs the job, into a dataset that is made for this test."""
    from google.cloud import bigquery
    from job import Job

    client = bigquery.Client(project=warehouse.project)
    dataset = re.sub(r"\W", "_", request.node.name)[:80] + f"_{os.getpid()}"
    client.create_dataset(dataset)
    yield Job(client, dataset, store, f"{warehouse.temp_location}/{dataset}")
    client.delete_dataset(dataset, delete_contents=True)
