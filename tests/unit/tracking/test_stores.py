"""Places of artifacts: folders with odd names, and stores that cannot be read from here, as MLflow's own client fails."""

import sys
from pathlib import Path
from urllib.parse import quote

import pytest
from mlflow.tracking import MlflowClient

from beam_pipeline.errors import ArtifactMissingError, ConfigError
from beam_pipeline.tracking import client as tracking_client
from beam_pipeline.tracking import runs, stores
from beam_pipeline.tracking.models import find_model, readable_folder
from beam_pipeline.tracking.runs import find_run


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    return f"sqlite:///{tmp_path_factory.mktemp('stores')}/mlflow.db"


@pytest.fixture
def client(uri):
    return MlflowClient(uri)


def run_in(client, root):
    """Returns the id of a run whose artifacts are below `root`."""
    return client.create_run(client.create_experiment(f"in {root}", root)).info.run_id


def find(run_id, uri, path=None):
    return find_model(find_run(run_id=run_id, tracking_uri=uri), artifact_path=path, tracking_uri=uri)


# Folders of this machine.


NAMES = ("a%20b", "a b", "100%", "a#b", "a?b", "é")


@pytest.mark.parametrize(
    ("form", "name"),
    [
        *(("path", name) for name in NAMES),
        *(("URI", name) for name in NAMES),
        *(("URI not quoted", name) for name in NAMES if not {"#", "?"}.intersection(name)),
    ],
)
def test_a_model_is_read_where_mlflow_has_written_it(client, uri, tmp_path, name, form):
    folder = str(tmp_path / name)
    root = {"path": folder, "URI": f"file://{quote(folder)}", "URI not quoted": f"file://{folder}"}[form]
    run = run_in(client, root)
    client.log_text(run, "here", f"{name}/saved_model.pb")
    found = readable_folder(find(run, uri, name))
    assert Path(found, "saved_model.pb").read_text() == "here"
    model = client.create_logged_model(client.get_run(run).info.experiment_id, "beside", run)
    client.log_model_artifacts(model.model_id, found)
    client.finalize_logged_model(model.model_id, "READY")
    assert Path(readable_folder(find(run, uri, "beside")), "saved_model.pb").read_text() == "here"


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_a_folder_whose_name_holds_an_escape(client, uri, tmp_path, prefix):
    """It was copied or mounted there: MLflow itself would have written to the folder `a b`."""
    run = run_in(client, f"{prefix}{tmp_path}/a%20b")
    model = tmp_path / "a%20b" / run / "artifacts" / "model"
    model.mkdir(parents=True)
    (model / "saved_model.pb").write_text("here")
    assert readable_folder(find(run, uri)) == str(model)
    client.log_text(run, "there", "model/saved_model.pb")
    assert Path(readable_folder(find(run, uri)), "saved_model.pb").read_text() == "there"


def test_a_store_whose_folder_holds_an_escape(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    run = run_in(MlflowClient(f"{tmp_path}/a%20b"), str(tmp_path / "artifacts"))
    assert (tmp_path / "a b").is_dir()
    assert find_run(run_id=run, tracking_uri=f"{tmp_path}/a%20b").run_id == run
    (tmp_path / "a b").rename(tmp_path / "a%20b")
    assert find_run(run_id=run, tracking_uri=f"{tmp_path}/a%20b").run_id == run
    assert not (tmp_path / "a b").exists()


def test_a_folder_that_only_another_machine_has(client, uri, tmp_path):
    for prefix in ("", "file://"):
        run = run_in(client, f"{prefix}{tmp_path}/mount/mlruns")
        with pytest.raises(
            ConfigError, match=rf"run {run} cannot be read: .*{tmp_path}/mount/mlruns/.* mount that folder"
        ):
            find(run, uri)
        with pytest.raises(ConfigError, match="does not exist on this machine"):
            find(run, uri, ".")
    # One of a mounted folder has just logged nothing.
    client.log_text(run, "", "model/saved_model.pb")
    empty = client.create_run(client.get_run(run).info.experiment_id).info.run_id
    with pytest.raises(ArtifactMissingError, match=f"models of run {empty}: none"):
        find(empty, uri)


def test_a_logged_model_that_only_another_machine_has(client, uri, tmp_path):
    run = run_in(client, f"{tmp_path}/mlruns")
    model = client.create_logged_model(client.get_run(run).info.experiment_id, "two_tower", run)
    (tmp_path / "saved_model.pb").write_text("")
    client.log_model_artifacts(model.model_id, str(tmp_path / "saved_model.pb"))
    client.finalize_logged_model(model.model_id, "READY")
    (tmp_path / "mlruns").rename(tmp_path / "unmounted")
    with pytest.raises(ConfigError, match="mount that folder"):
        find(run, uri)
    with pytest.raises(ConfigError, match="mount that folder"):
        find_model(find_run(run_id=run, tracking_uri=uri), model_uri=f"models:/{model.model_id}", tracking_uri=uri)


@pytest.mark.parametrize("root", ["C:/mlruns/1", "c:\\mlruns\\1", "file:///C:/mlruns/1"])
def test_a_folder_of_a_windows_machine(client, uri, root):
    with pytest.raises(ConfigError, match=r"is a folder of a Windows machine; let the tracking server serve artifacts"):
        find(run_in(client, root), uri)


# Other stores.


@pytest.mark.parametrize(
    ("root", "words"),
    [
        ("s3://bucket/mlruns", r"library that cannot be imported: .*boto.*; pip install boto3$"),
        ("r2://bucket@account.r2.cloudflarestorage.com/x", r"; pip install boto3$"),
        ("b2://bucket@s3.us-west-004.backblazeb2.com/x", r"; pip install boto3$"),
        ("abfss://c@a.dfs.core.windows.net/x", r"; pip install azure-storage-file-datalake azure-identity$"),
        ("wasbs://c@a.blob.core.windows.net/x", r"; pip install azure-storage-blob azure-identity$"),
        ("sftp://me:guess@127.0.0.1/x", r"sftp://me:…@127.0.0.1/\S* is read with .*; pip install pysftp$"),
        ("hdfs://name:9000/x", r"Hadoop client, and libhdfs or a JVM was not found; .* JAVA_HOME, HADOOP_HOME and"),
        ("viewfs://name/x", r"Hadoop client, and libhdfs or a JVM was not found"),
        ("dbfs:/x", r"set MLFLOW_TRACKING_URI=databricks, DATABRICKS_HOST and DATABRICKS_TOKEN$"),
        ("dbfs:/databricks/mlflow-tracking/1/0123/artifacts", r"DATABRICKS_HOST and DATABRICKS_TOKEN$"),
        ("dbfs:/Volumes/a/b/c", r"DATABRICKS_HOST and DATABRICKS_TOKEN$"),
        ("oss://bucket/x", r"cannot read oss://, where oss://bucket/\S* is; install the MLflow plugin for it$"),
        ("ftp://me:guess@127.0.0.1:9/x", r"me:…@127.0.0.1:9/\S* cannot be read: .*refused; check that this machine"),
        ("mlflow-artifacts:/x", r"through the tracking server, and sqlite:\S* is the store behind it; name the server"),
    ],
)
def test_a_store_that_cannot_be_read(client, uri, root, words, monkeypatch, tmp_path):
    """The message is about the artifacts, not about the tracking server, which has answered."""
    for library in ("boto3", "botocore", "azure", "pysftp", "paramiko"):
        monkeypatch.setitem(sys.modules, library, None)
    for name in ("JAVA_HOME", "HADOOP_HOME", "DATABRICKS_HOST", "DATABRICKS_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no ~/.databrickscfg
    monkeypatch.chdir(tmp_path)
    run = run_in(client, root)
    with pytest.raises(ConfigError, match=words) as refused:
        find(run, uri)
    assert f"/{run}/artifacts" in str(refused.value)
    assert "guess" not in str(refused.value)
    assert "check --tracking_uri" not in str(refused.value)
    experiment = client.get_run(run).info.experiment_id
    client.set_terminated(run)
    with pytest.raises(ConfigError, match=words):
        runs.find_latest_run(client.get_experiment(experiment).name, tracking_uri=uri)
    assert not [*tmp_path.iterdir()]  # MLflow creates a store in the current folder when it is asked without a URI.


def test_the_word_for_a_databricks_workspace():
    """No folder, though it looks like a path."""
    tracking_client.require_store("databricks")


def test_errors_of_the_tracking_server_stay_its_own():
    with pytest.raises(ConnectionError), stores.reading("mlflow-artifacts:/1/run/artifacts"):
        raise ConnectionError
