"""Which run is meant, against real MLflow stores; what is in a model does not matter here."""

from datetime import timedelta

import pytest
from job import MARCH_1
from mlflow.tracking import MlflowClient

from beam_pipeline.errors import ArtifactMissingError, ConfigError, RunNotFoundError, UnsupportedModelError
from beam_pipeline.tracking import runs
from beam_pipeline.tracking.models import find_model
from beam_pipeline.tracking.runs import find_latest_run, find_run


class Experiment:
    """An experiment of its own in a store.

    Attributes:
        name, experiment_id: as MLflow has them.
        uri: of the store.
        client: of MLflow.
    """

    def __init__(self, uri, name, folder):
        self.uri, self.name, self._folder = uri, name, folder
        self.client = MlflowClient(uri)
        self.experiment_id = self.client.create_experiment(name, f"file://{folder}/{name}")
        self._day = 0

    def run(self, *files, status="FINISHED", name="r"):
        """Logs empty files to a run that starts a day after the one before; returns its id."""
        self._day += 1
        start = int((MARCH_1 + timedelta(days=self._day)).timestamp() * 1000)
        run_id = self.client.create_run(self.experiment_id, start_time=start, run_name=name).info.run_id
        for file in files:
            self.client.log_text(run_id, "", file)
        if status != "RUNNING":
            self.client.set_terminated(run_id, status)
        return run_id

    def logged(self, run_id, *files, name="two_tower", status="READY"):
        """Logs empty files as MLflow 3 does, beside the run; returns the model's id."""
        model = self.client.create_logged_model(self.experiment_id, name, run_id)
        folder = self._folder / f"source {model.model_id}"
        for file in files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text("")
        self.client.log_model_artifacts(model.model_id, str(folder))
        if status != "PENDING":
            self.client.finalize_logged_model(model.model_id, status)
        return model.model_id

    def latest(self, **options):
        """Returns the id of the latest run with a model, and why others were passed over."""
        run, passed = find_latest_run(self.name, tracking_uri=self.uri, **options)
        assert find_run(experiment_name=self.name, tracking_uri=self.uri, **options) == run
        return run.run_id, [(other.run_id, why) for other, why in passed]

    def find(self, run_id, path=None):
        run = find_run(run_id=run_id, tracking_uri=self.uri)
        return find_model(run, artifact_path=path, tracking_uri=self.uri)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def experiment(folder, request):
    return Experiment(f"sqlite:///{folder}/mlflow.db", request.node.name.replace("[", " ").rstrip("]"), folder)


# The latest run that has the model.


def test_runs_without_a_model_are_passed_over(experiment):
    older = experiment.run("model/saved_model.pb")
    trained = experiment.run("model/saved_model.pb", "plots/loss.png")
    evaluation = experiment.run("plots/recall.png", "report.html")
    experiment.run("model/saved_model.pb", status="FAILED")
    trial = experiment.run(name="trial")
    assert experiment.latest() == (trained, [(trial, "no model"), (evaluation, "no model")])
    assert experiment.latest(run_name="r") == (trained, [(evaluation, "no model")])
    experiment.client.delete_run(trained)
    assert experiment.latest()[0] == older
    later = experiment.run("model/saved_model.pb")
    assert experiment.latest() == (later, [])


def test_the_model_by_another_name(experiment):
    """A model under any name counts where it is the run's only one and could be read."""
    trained = experiment.run("towers/data/model.keras", "towers/MLmodel")
    explainer = experiment.run("explainer/MLmodel", "explainer/model.pkl", "explainer/data/masker")
    none_read = (explainer, "explainer holds neither a SavedModel nor a .keras file")
    assert experiment.latest() == (trained, [none_read])
    assert experiment.latest(artifact_path="towers") == (trained, [(explainer, "no model 'towers'")])
    beside = experiment.run()
    experiment.logged(beside, "data/model/saved_model.pb", "MLmodel")
    forest = experiment.run()
    experiment.logged(forest, "model.pkl", "MLmodel", name="forest")
    assert experiment.latest() == (beside, [(forest, "forest holds neither a SavedModel nor a .keras file")])
    at_root = experiment.run("saved_model.pb")
    empty = experiment.run()
    assert experiment.latest()[0] == at_root
    assert experiment.latest(artifact_path=".") == (
        at_root,
        [(empty, ". holds neither a SavedModel nor a .keras file")],
    )


def test_what_is_not_passed_over(experiment):
    """A training whose model cannot be published is an error; the older one would be published in silence."""
    experiment.run("model/saved_model.pb")
    unfinished = experiment.run()
    model_id = experiment.logged(unfinished, "saved_model.pb", status="PENDING")
    with pytest.raises(ArtifactMissingError, match=rf"models:/{model_id} \(two_tower\) is PENDING: its upload was not"):
        experiment.latest()
    experiment.run("weights/model.h5")
    with pytest.raises(UnsupportedModelError, match=r"/weights/model.h5 is an HDF5 file"):
        experiment.latest()
    experiment.run("a/saved_model.pb", "b/saved_model.pb")
    with pytest.raises(ConfigError, match="has 2 models: a, b; choose with --artifact_path"):
        experiment.latest()


def test_how_far_back_a_model_is_looked_for(experiment, monkeypatch):
    trained = experiment.run("model/saved_model.pb")
    only = experiment.run("loss.txt", name="alone")
    with pytest.raises(
        ArtifactMissingError, match=f"/{only}/artifacts/model does not hold a model: .* run {only}: none"
    ):
        experiment.latest(run_name="alone")
    last = [experiment.run() for _ in range(19)][-1]
    with pytest.raises(
        ArtifactMissingError,
        match=rf"none of the latest 20 FINISHED runs of experiment '.*' has the model; the latest, r \({last}\): no "
        "model; choose with --run_id, --run_name or --artifact_path",
    ):
        experiment.latest()
    experiment.client.delete_run(last)
    assert experiment.latest()[0] == trained
    monkeypatch.setattr(runs, "_MOST_REQUESTS", 10)
    with pytest.raises(ArtifactMissingError, match="none of the latest 5 FINISHED runs"):
        experiment.latest()


# Deleted ones.


@pytest.mark.parametrize("store", ["database", "folder"])
def test_a_deleted_experiment(folder, store, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = f"sqlite:///{folder}/mlflow.db" if store == "database" else f"{folder}/mlruns"
    if store == "folder":
        (folder / "mlruns").mkdir()
    experiment = Experiment(uri, f"deleted from a {store}", folder)
    run = experiment.run("model/saved_model.pb")
    other = experiment.run("model/saved_model.pb")
    experiment.client.delete_run(other)
    with pytest.raises(
        RunNotFoundError, match=rf"run '{other}' is deleted in .*\(mlflow runs restore --run-id {other}\)"
    ):
        experiment.find(other)
    experiment.client.delete_experiment(experiment.experiment_id)
    restore = (
        rf"is deleted, and its runs with it; .*mlflow experiments restore --experiment-id {experiment.experiment_id}"
    )
    for options in ({"experiment_name": experiment.name}, {"run_id": run}):
        with pytest.raises(RunNotFoundError, match=restore):
            find_run(tracking_uri=uri, **options)
    with pytest.raises(RunNotFoundError, match=restore):
        runs.find_runs(experiment.name, tracking_uri=uri)
    experiment.client.restore_experiment(experiment.experiment_id)
    assert experiment.latest()[0] == other
    assert experiment.find(run).path == "model"


# HDF5 files.


@pytest.mark.parametrize(
    ("file", "path"),
    [
        ("model.h5", None),
        ("two_tower.hdf5", None),
        ("model/anything.h5", None),
        ("export/anything.h5", "export"),
        ("export/anything.h5", "export/anything.h5"),
    ],
)
def test_an_hdf5_file(experiment, file, path):
    run = experiment.run(file, "loss.txt")
    with pytest.raises(
        UnsupportedModelError, match=rf"/{file} is an HDF5 file, .*as \.keras .* or as a SavedModel .*log it again"
    ):
        experiment.find(run, path)


def test_hdf5_files_beside_a_model(experiment):
    run = experiment.run("model/saved_model.pb", "model/best.weights.h5", "best.h5")
    assert experiment.find(run).path == "model"
    other = experiment.run("towers/saved_model.pb", "best.h5")
    assert experiment.find(other).path == "towers"
    with pytest.raises(ArtifactMissingError, match="nope does not hold a model"):
        experiment.find(other, "nope")
