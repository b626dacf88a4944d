"""A real MLflow store, to which models are logged as the trainer does."""

import json
import shutil
import sqlite3
from pathlib import Path

from models import made_by


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
        """Logs a model as the trainer does, to a run that started then; returns the run's id.

        Instead of a model, several by their artifact paths; with the path "" the folder's files lie in the run itself.
        """
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
        for path, each in (model if isinstance(model, dict) else {"model": model}).items():
            self._client.log_artifacts(run.info.run_id, str(each.folder), path or None)
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


def example_runs(name, folder):
    """Copies a store of make_examples.py into a folder; returns its URI and its runs' ids, the earliest first."""
    kept = made_by("make_examples.py")(name).folder
    shutil.copytree(kept, folder)
    with sqlite3.connect(folder / "mlflow.db") as database:
        for table, column in (("runs", "artifact_uri"), ("experiments", "artifact_location")):
            database.execute(
                f"UPDATE {table} SET {column} = replace({column}, ?, ?)", (str(kept.resolve()), str(folder))
            )
    return f"sqlite:///{folder}/mlflow.db", json.loads((folder / "runs.json").read_text(encoding="utf-8"))
