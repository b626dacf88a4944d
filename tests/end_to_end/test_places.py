"""Models wherever MLflow puts them: every kind of URI, a real tracking server, and a gate that wants credentials."""

import base64
import bz2
import contextlib
import gzip
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
from job import MARCH_1, refused
from mlflow.entities import LoggedModelStatus
from mlflow.tracking import MlflowClient
from models import made_by
from tracking import gate, service_account_key, tokens, tracking_server

from beam_pipeline import tag
from beam_pipeline.bigquery import publication
from beam_pipeline.errors import ArtifactMissingError, ConfigError, RunNotFoundError
from beam_pipeline.tracking import auth, runs
from beam_pipeline.tracking.models import find_model

AUDIENCE = "1234-abc.apps.googleusercontent.com"


class Server:
    """A tracking server with its own clients to log with.

    Attributes:
        url: where it answers, without asking for anything.
    """

    def __init__(self, url):
        self.url = url
        self.client = MlflowClient(url)
        self.experiment_id = self.client.create_experiment("served")

    def run(self, start=MARCH_1, name="weekly"):
        run = self.client.create_run(self.experiment_id, start_time=int(start.timestamp() * 1000), run_name=name)
        return run.info.run_id

    def folder(self, run_id, model, path="model"):
        self.client.log_artifacts(run_id, str(model.folder), path)

    def model(self, run_id, model, name="two_tower", status="READY"):
        """Logs a model as MLflow 3 does, beside the run; returns its id."""
        logged = self.client.create_logged_model(self.experiment_id, name, run_id)
        self.client.log_model_artifacts(logged.model_id, str(model.folder))
        if status != "PENDING":
            self.client.finalize_logged_model(logged.model_id, LoggedModelStatus(status))
        return logged.model_id

    def find(self, run_id, path=None):
        run = runs.find_run(run_id=run_id, tracking_uri=self.url)
        return find_model(run, artifact_path=path, tracking_uri=self.url)

    def find_uri(self, uri):
        run = runs.find_run(model_uri=uri, tracking_uri=self.url)
        return run, find_model(run, model_uri=uri, tracking_uri=self.url)


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    with tracking_server(tmp_path_factory.mktemp("tracking")) as url:
        yield Server(url)


@pytest.fixture(scope="session")
def served(server, models):
    """A run with one model of each layout, registered too."""
    run = server.run()
    server.folder(run, models("longer"), "model")
    model_id = server.model(run, models("plain"))
    client = server.client
    client.create_registered_model("two towers")
    client.create_model_version("two towers", f"{client.get_run(run).info.artifact_uri}/model", run)
    client.create_model_version("two towers", f"models:/{model_id}", model_id=model_id)
    client.set_registered_model_alias("two towers", "champion", "2")
    return SimpleNamespace(run=run, model_id=model_id, experiment=f"mlflow-artifacts:/{server.experiment_id}")


@pytest.fixture(autouse=True)
def _no_credentials(monkeypatch):
    yield
    auth.authorize(None, None)


def is_file(path, name):
    """Whether a request is for an artifact of that name; listings name it too, in their query."""
    return "/mlflow-artifacts/artifacts/" in path and name in path


def password(headers):
    return headers.get("Authorization") == "Basic " + base64.b64encode(b"me:open sesame").decode()


# Which model.


def test_every_uri(server, served):
    in_run = f"{served.experiment}/{served.run}/artifacts"
    beside = f"{served.experiment}/models/{served.model_id}/artifacts"
    for uri, root, path in [
        (f"runs:/{served.run}/model", in_run, "model"),
        (f"runs:/{served.run}/model/variables/", in_run, "model/variables"),
        (f"runs:/{served.run}/two_tower", beside, ""),
        (f"runs:/{served.run}/two_tower/variables", beside, "variables"),
        (f"models:/{served.model_id}", beside, ""),
        ("models:/two towers/1", f"{in_run}/model", ""),
        ("models:/two towers/2", beside, ""),
        ("models:/two towers@champion", beside, ""),
    ]:
        run, model = server.find_uri(uri)
        assert (run.run_id, run.run_name, run.experiment_name) == (served.run, "weekly", "served"), uri
        assert str(run.train_date) == "2026-03-01"
        assert (model.root, model.path) == (root, path), uri
    assert model.name == "models:/two towers/2"


def test_the_model_of_a_run(server, served, models):
    beside = f"{served.experiment}/models/{served.model_id}/artifacts"
    assert server.find(served.run).path == "model"
    assert server.find(served.run, "two_tower").root == beside
    lonely = server.run()
    server.folder(lonely, models("longer"), "export/tf")
    assert server.find(lonely, "export/tf").path == "export/tf"
    only = server.run()
    server.client.log_text(only, "loss", "plots/loss.txt")
    server.folder(only, models("longer"), "towers")
    assert (server.find(only).path, server.find(only).notable) == ("towers", True)
    logged = server.run()
    model_id = server.model(logged, models("longer"))
    server.model(logged, models("longer"), "broken", "FAILED")
    assert server.find(logged).root.endswith(f"/models/{model_id}/artifacts")
    at_root = server.run()
    server.folder(at_root, models("longer"), None)
    assert (server.find(at_root).path, server.find(at_root, ".").root) == ("", server.find(at_root).root)


def test_several_models_need_a_choice(server, models):
    run = server.run()
    server.folder(run, models("longer"), "first")
    second, third = (server.model(run, models("longer"), name) for name in ("second", "third"))
    there = f"first, (second|third) .models:/({second}|{third})., (second|third) .models:/({second}|{third})."
    with pytest.raises(ConfigError, match=f"run {run} has 3 models: {there}; choose with --artifact_path=NAME or"):
        server.find(run)
    assert server.find(run, "third").root.endswith(f"{third}/artifacts")
    with pytest.raises(ArtifactMissingError, match=f"/nope does not hold a model: .*; models of run {run}: first, "):
        server.find(run, "nope")
    again = server.model(run, models("longer"), "third")
    with pytest.raises(ConfigError, match=r"has 2 models named 'third': .*; choose with .*--model_uri=models:/m-ID"):
        server.find(run, "third")
    assert server.find_uri(f"models:/{again}")[1].root.endswith(f"{again}/artifacts")


def test_uris_that_name_nothing(server, served, models):
    for uri, error, words in [
        ("models:/two towers@best", RunNotFoundError, r"no alias 'best'; there are: champion \(version 2\)"),
        ("models:/two towers/9", RunNotFoundError, "no models:/two towers/9, or its run, in .*; check --model_uri"),
        ("models:/nobody/1", RunNotFoundError, "no models:/nobody/1, or its run, in .*; check --model_uri"),
        ("models:/nobody@best", RunNotFoundError, "no models:/nobody@best, or its run, in .*; check --model_uri"),
        (f"models:/m-{'0' * 32}", RunNotFoundError, "no models:/m-0+, or its run, in .*; check --model_uri"),
        (f"runs:/{'0' * 32}/model", RunNotFoundError, "no runs:/0+/model, or its run, in .*; check --model_uri"),
        (f"runs:/{served.run}/nope", ArtifactMissingError, "does not hold a model: .*: model, two_tower .models:/m-"),
        ("models:/two towers/latest", ConfigError, "runs:/RUN_ID/PATH, models:/NAME/VERSION, models:/NAME@ALIAS"),
        ("gs://bucket/model", ConfigError, "runs:/RUN_ID/PATH"),
    ]:
        with pytest.raises(error, match=words):
            server.find_uri(uri)
    outside = server.model(None, models("longer"))
    with pytest.raises(ConfigError, match=rf"models:/{outside} was logged outside of any run, .*; log the model in a"):
        server.find_uri(f"models:/{outside}")
    pending = server.model(served.run, models("longer"), "later", "PENDING")
    with pytest.raises(ArtifactMissingError, match=r"\(later\) is PENDING: its upload was not finished"):
        server.find_uri(f"models:/{pending}")


def test_a_server_of_mlflow_2_has_no_logged_models(server, models):
    run = server.run()
    server.folder(run, models("longer"), "towers")
    with gate(server.url, lambda headers: True) as old:
        old.before = lambda path: (
            (404, {"Content-Type": "text/html"}, b"Not Found") if "logged-models" in path else None
        )
        found = runs.find_run(run_id=run, tracking_uri=old.url)
        assert find_model(found, tracking_uri=old.url).path == "towers"


LOG_MODEL = """
import os, sys
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import keras, mlflow, numpy as np
mlflow.set_tracking_uri(sys.argv[1])
mlflow.set_experiment("log_model")
model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
with mlflow.start_run() as run:
    mlflow.tensorflow.log_model(model, name="two_tower", registered_model_name="by log_model",
        signature=mlflow.models.infer_signature(np.zeros((1, 2), "f"), np.zeros((1, 1), "f")), pip_requirements=[])
print(run.info.run_id)
"""


def test_what_log_model_logs_is_found(server):
    done = subprocess.run([sys.executable, "-c", LOG_MODEL, server.url], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    run_id = done.stdout.split()[-1]
    found = server.find(run_id)
    assert (found.name, found.notable) == ("two_tower", True)
    for uri in (f"runs:/{run_id}/two_tower", "models:/by log_model/1"):
        run, model = server.find_uri(uri)
        assert (run.run_id, model.root) == (run_id, found.root)
    logged = server.client.list_logged_model_artifacts(re.search("m-[0-9a-f]+", found.root)[0])
    assert {"MLmodel", "data"} <= {file.path for file in logged}


def test_the_latest_run_that_has_the_model_takes_few_requests(job, server, models, capsys):
    """Runs that evaluate or try something are named on stdout; each takes two requests, and one more for a folder."""
    experiment = server.client.create_experiment("searched")

    def run(minute):
        start = int((MARCH_1 + timedelta(minutes=minute)).timestamp() * 1000)
        run_id = server.client.create_run(experiment, start_time=start, run_name=f"run {minute}").info.run_id
        server.client.update_run(run_id, "FINISHED")
        return run_id

    trained = run(0)
    server.folder(trained, models("longer"))
    without = [run(minute) for minute in range(1, 5)]
    server.client.log_text(without[3], "1", "plots/recall.txt")
    asked = []
    with gate(server.url, lambda headers: True) as guarded:
        guarded.before = asked.append
        assert runs.find_run(experiment_name="searched", tracking_uri=guarded.url).run_id == trained
    # The experiment and its runs, each run without a model, the folder, and the artifacts and the model of the last.
    assert len(asked) == 2 + 2 * len(without) + 1 + 2
    assert job.run(None, "--experiment_name=searched", f"--tracking_uri={server.url}", "--inspect") == 0
    out = capsys.readouterr().out.splitlines()
    left_out = [
        f"left out    2026-03-01 run {4 - number} ({run_id}): no model" for number, run_id in enumerate(without[::-1])
    ]
    assert [line for line in out if line.startswith("left out")] == left_out
    assert f"run         run 0 ({trained}), trained 2026-03-01 UTC" in out


def test_models_of_a_local_store(job, store, models, monkeypatch):
    """No server: the job reads the folder that MLflow 3 has put beside the run, of the version that an alias names."""
    client = MlflowClient(store.uri)
    run = client.create_run(store.experiment_id, start_time=int(MARCH_1.timestamp() * 1000), run_name="local")
    logged = client.create_logged_model(store.experiment_id, "anything", run.info.run_id)
    client.log_model_artifacts(logged.model_id, str(models("plain").folder))
    client.finalize_logged_model(logged.model_id, "READY")
    client.create_registered_model("local")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)  # The registry asks there, whatever the client was given.
    client.create_model_version("local", logged.artifact_location, model_id=logged.model_id)
    client.set_registered_model_alias("local", "champion", "1")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert job.run(None, "--model_uri=models:/local@champion") == 0
    assert job.rows("user") == {("2026-03-01", run.info.run_id): models("plain").rows("user")}


# Models that workers cannot read.


def test_a_model_behind_a_server_and_a_token(job, server, served, store, models):
    secret = "a-secret-token"
    with gate(server.url, lambda headers: headers.get("Authorization") == f"Bearer {secret}") as guarded:
        done = job.subprocess(
            served.run,
            "--artifact_path=two_tower",
            f"--tracking_uri={guarded.url}",
            env={**os.environ, "MLFLOW_TRACKING_TOKEN": secret},
        )
    assert done.returncode == 0, done.stderr
    assert job.rows("user") == {("2026-03-01", served.run): models("plain").rows("user")}
    assert job.rows("item") == {("2026-03-01", served.run): models("plain").rows("item")}
    out = done.stdout.splitlines()
    assert re.fullmatch(
        rf"copying     6 files, 0\.\d MB, to gs://warehouse/tmp/{job.dataset}/embedding_artifacts/\w+/{served.run}",
        out[0],
    )
    assert any(re.fullmatch(r"copied      (0\.\d MB) of \1 \(100%\), .* MB/s", line) for line in out)
    assert secret not in done.stdout + done.stderr
    assert store.load_files(job.dataset) == []


def test_two_models_behind_a_server_are_copied_apart(job, server, store):
    indexes = made_by("make_indexes.py")
    run = server.run(name="apart")
    server.folder(run, indexes("alone_users"), "user_model")
    server.folder(run, indexes("alone"), "item_model")
    assert job.run(run, f"--tracking_uri={server.url}") == 0
    assert job.rows("user") == {("2026-03-01", run): indexes("alone_users").rows("item")}
    assert job.rows("item") == {("2026-03-01", run): indexes("alone").rows("item")}
    assert [uri.rpartition("/")[2] for (uri,) in job.query("SELECT model_uri FROM {log} ORDER BY tower DESC")] == [
        "user_model",
        "item_model",
    ]
    assert store.load_files(job.dataset) == []


def test_a_model_behind_a_user_and_a_password(job, server, served, store, models, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "open sesame")
    # The server may take longer over a file than over an answer.
    monkeypatch.setattr("beam_pipeline.tracking.client._PATIENCE", 3)
    with gate(server.url, password) as guarded:
        guarded.before = lambda path: time.sleep(4) if is_file(path, "variables.data") else None
        uri = f"--tracking_uri={guarded.url}"
        assert job.run(None, "--model_uri=models:/two towers@champion", uri) == 0
        assert job.rows("item") == {("2026-03-01", served.run): models("plain").rows("item")}
        assert "found       models:/two towers/2\n" in capsys.readouterr().out
        guarded.before = lambda path: None
        # What refuses the launch after the files were copied leaves none either.
        line = refused(job, capsys, served.run, uri, "--artifact_path=two_tower", "--tower=user=nobody")
        assert "layer 'nobody' does not exist in gs://" in line
        assert store.load_files(job.dataset) == []


def test_credentials_that_are_missing_or_wrong(job, server, served, monkeypatch, capsys):
    words = "set MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD; behind IAP"
    with gate(server.url, password) as guarded:
        uri = f"--tracking_uri={guarded.url}"
        assert words in refused(job, capsys, served.run, uri)
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "wrong")
        line = refused(job, capsys, served.run, uri)
        assert words in line
        assert "401" in line
        assert "wrong" not in line
        # The password of a URI is in every message of the HTTP library.
        monkeypatch.delenv("MLFLOW_TRACKING_TOKEN")
        line = refused(job, capsys, served.run, uri.replace("//", "//me:guess@"))
        assert "guess" not in line
    assert "guess" not in refused(job, capsys, served.run, "--tracking_uri=http://me:guess@127.0.0.1:9")
    with gate(server.url, lambda headers: True) as sign_in:
        sign_in.before = lambda path: (200, {"Content-Type": "text/html"}, b"<html>Sign in with Google</html>")
        assert "use --tracking_audience" in refused(job, capsys, served.run, f"--tracking_uri={sign_in.url}")


def test_artifacts_that_may_not_be_read(job, server, served, store, capsys):
    with gate(server.url, lambda headers: True) as guarded:
        guarded.before = lambda path: (
            (403, {"Content-Type": "text/plain"}, b"No") if "mlflow-artifacts" in path else None
        )
        line = refused(job, capsys, served.run, f"--tracking_uri={guarded.url}")
        assert "403" in line
        assert "MLFLOW_TRACKING_TOKEN" in line
        guarded.before = lambda path: (
            (200, {"Content-Type": "text/plain"}, b"cut") if is_file(path, "variables.data") else None
        )
        line = refused(job, capsys, served.run, f"--tracking_uri={guarded.url}")
        assert re.search(
            r"3 of the [\d,]+ bytes of model/variables/variables.data-\S+ came from mlflow-artifacts:/", line
        )
    assert store.load_files(job.dataset) == []


def test_a_folder_whose_name_holds_an_escape(job, server, models):
    run = server.run()
    server.folder(run, models("longer"), "a%20b/c d")
    assert job.run(run, f"--tracking_uri={server.url}", "--artifact_path=a%20b/c d") == 0
    assert job.rows("item") == {("2026-03-01", run): models("longer").rows("item")}


def test_a_failing_job_leaves_no_copy(job, server, store, damaged, capsys):
    model = damaged("plain")
    data = next((model.folder / "variables").glob("*.data-*"))
    data.write_bytes(b"\1" + data.read_bytes()[1:])
    run = server.run()
    server.folder(run, model)
    assert "do not match the checkpoint's crc32c" in refused(job, capsys, run, f"--tracking_uri={server.url}")
    assert store.load_files(job.dataset) == []


@pytest.mark.parametrize("when", ["copying", "running"])
def test_an_interrupted_job_leaves_no_copy(job, server, served, store, tmp_path, when):
    hook = """
import time
from beam_pipeline.bigquery import publication
publication.audit = lambda *args: (print("HERE", flush=True), time.sleep(60))
"""
    with gate(server.url, lambda headers: True) as slow:
        arrived = []

        def before(path):
            # All files are small; the last in the listing comes when others have been copied.
            if when == "copying" and is_file(path, "variables.index"):
                arrived.append(path)
                time.sleep(60)

        slow.before = before
        process = job.hooked(tmp_path, hook, served.run, f"--tracking_uri={slow.url}")
        if when == "copying":
            while not arrived:
                time.sleep(0.1)
                assert process.poll() is None
        else:
            assert any(line == "HERE\n" for line in process.stdout)
        assert any("/embedding_artifacts/" in name for name in store.load_files(job.dataset))
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert store.load_files(job.dataset) == []
    assert job.tables() == set()


def test_copies_of_dead_launches_are_swept(job, server, served, store, monkeypatch):
    from google.cloud import storage

    left = f"tmp/{job.dataset}/embedding_artifacts/dead/variables/x"
    storage.Client().bucket("warehouse").blob(left).upload_from_string(b"x")
    assert job.run(served.run, f"--tracking_uri={server.url}") == 0
    assert store.load_files(job.dataset) == [left]
    monkeypatch.setattr(publication, "STAGING_LIFE", timedelta(0))
    assert job.run(served.run, f"--tracking_uri={server.url}") == 0
    assert store.load_files(job.dataset) == []


def test_on_a_laptop(commands, server, served, tmp_path):
    """With a warehouse of its own, which forgets what launches before it have left."""
    environment = {k: v for k, v in os.environ.items() if not k.endswith("_EMULATOR_HOST")}
    command = [sys.executable, "-m", "beam_pipeline", f"--run_id={served.run}", f"--tracking_uri={server.url}"]
    done = commands.run([*command, f"--warehouse={tmp_path}"], env=environment)
    assert done.returncode == 0, done.stderr
    assert "published   local.raw_dev.two_tower_user_embedding, partition 2026-03-01: 50 rows" in done.stdout
    assert not [*(tmp_path / "storage" / ".cloudstorage").glob("**/embedding_artifacts/**/*.*")]


def test_the_graph_for_dataflow_reads_the_copy_and_holds_no_token(job, server, served, warehouse):
    """The copies stay until the job, which nobody runs here, has read them; none of the credentials is staged."""
    from google.cloud import storage

    secret = "a-secret-token"
    with gate(server.url, lambda headers: headers.get("Authorization") == f"Bearer {secret}") as guarded:
        done = job.subprocess(
            served.run,
            f"--tracking_uri={guarded.url}",
            "--runner=DataflowRunner",
            "--region=europe-west1",
            f"--project={job.client.project}",
            f"--template_location=gs://warehouse/tmp/{job.dataset}/job",
            f"--staging_location=gs://warehouse/tmp/{job.dataset}",
            "--no_auth",
            env={**os.environ, "MLFLOW_TRACKING_TOKEN": secret},
        )
    assert done.returncode == 0, done.stderr
    staged = {
        blob.name: blob.download_as_bytes()
        for blob in storage.Client().list_blobs(warehouse.bucket, prefix=f"tmp/{job.dataset}/")
    }
    assert len([name for name in staged if "/embedding_artifacts/" in name]) == 5
    contents = [gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data for data in staged.values()]
    # What Beam has pickled lies in the graph as base64 of compressed bytes.
    for packed in {match for data in contents for match in re.findall(rb"[A-Za-z0-9+/]{40,}={0,2}", data)}:
        with contextlib.suppress(ValueError, OSError):
            contents.append(bz2.decompress(base64.b64decode(packed)))
    assert any(b"/embedding_artifacts/" in data for data in contents)
    for data in [*contents, (done.stdout + done.stderr).encode()]:
        assert secret.encode() not in data
        assert base64.b64encode(secret.encode()) not in data


# Identity tokens.


def holder(issued, ahead=0, header="Authorization"):
    """Admits who has a token for the audience, by a clock that is so many seconds ahead."""

    def admits(headers):
        audience, expiry = issued.get((headers.get(header) or "").removeprefix("Bearer "), (None, 0))
        return audience == AUDIENCE and expiry > time.time() + ahead

    return admits


@pytest.mark.parametrize("source", ["key", "metadata server"])
def test_an_identity_token_is_renewed_before_it_expires_and_never_shown(
    job, server, served, models, store, tmp_path, source
):
    """Tokens have a second until five minutes before they expire, and the gate refuses them a little later."""
    with tokens(life=301) as google, gate(server.url, holder(google.issued, ahead=298.5)) as guarded:
        guarded.before = lambda path: time.sleep(0.3)
        environment = {k: v for k, v in os.environ.items() if k != "GOOGLE_APPLICATION_CREDENTIALS"}
        if source == "key":
            environment["GOOGLE_APPLICATION_CREDENTIALS"] = service_account_key(tmp_path / "key.json", google.url)
        else:
            address = google.url.removeprefix("http://")
            environment |= {"GCE_METADATA_HOST": address, "GCE_METADATA_IP": address}
        done = job.subprocess(
            served.run, f"--tracking_uri={guarded.url}", f"--tracking_audience={AUDIENCE}", env=environment
        )
        assert done.returncode == 0, done.stderr
        used = {headers["Authorization"].removeprefix("Bearer ") for headers in guarded.seen}
    assert len(used) > 1
    assert used <= {*google.issued}
    assert job.rows("user") == {("2026-03-01", served.run): models("longer").rows("user")}
    for token in used:
        assert token.rsplit(".", 1)[1] not in done.stdout + done.stderr
    assert store.load_files(job.dataset) == []


def test_a_token_is_not_in_a_debug_log(server, served, tmp_path, monkeypatch, caplog):
    for name in ("", "urllib3", "google", "google.auth", "mlflow"):
        caplog.set_level("DEBUG", name)
    monkeypatch.setattr(logging.getLogger("google"), "propagate", True)
    with tokens() as google, gate(server.url, holder(google.issued)) as guarded:
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", service_account_key(tmp_path / "key.json", google.url))
        auth.authorize(guarded.url, AUDIENCE)
        assert runs.find_run(run_id=served.run, tracking_uri=guarded.url).run_id == served.run
        (token,) = google.issued
    assert {"urllib3", "google"} <= {record.name.split(".")[0] for record in caplog.records}
    assert token.rsplit(".", 1)[1] not in caplog.text
    assert token not in os.environ.values()


def test_beside_the_servers_own_password_the_token_takes_another_header(server, served, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "open sesame")
    with tokens() as google:
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", service_account_key(tmp_path / "key.json", google.url))
        for header in ("Proxy-Authorization", "X-Serverless-Authorization"):
            both = holder(google.issued, header=header)
            with gate(server.url, lambda headers, both=both: both(headers) and password(headers)) as guarded:
                auth.authorize(guarded.url, AUDIENCE)
                assert runs.find_run(run_id=served.run, tracking_uri=guarded.url).run_id == served.run


@pytest.mark.parametrize("own_password", [True, False])
def test_a_token_goes_nowhere_else(server, served, tmp_path, monkeypatch, own_password):
    """Not after a redirect, nor to an artifact store of another host."""
    if own_password:
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "open sesame")
    with (
        tokens() as google,
        gate(server.url, lambda headers: True) as guarded,
        gate(server.url, lambda headers: True) as elsewhere,
    ):
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", service_account_key(tmp_path / "key.json", google.url))
        auth.authorize(guarded.url, AUDIENCE)
        # Another host by name, the same machine.
        other = elsewhere.url.replace("127.0.0.1", "localhost")
        guarded.before = lambda path: (307, {"Location": other + path}, b"") if "runs/get" in path else None
        run = runs.find_run(run_id=served.run, tracking_uri=guarded.url)
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        there = run.artifact_uri.replace("mlflow-artifacts:/", f"mlflow-artifacts://{other.removeprefix('http://')}/")
        assert get_artifact_repository(there, tracking_uri=guarded.url).list_artifacts("model")
        (token,) = google.issued
    assert len(elsewhere.seen) == 2
    assert token in str(guarded.seen)
    assert token not in str(elsewhere.seen)


def test_the_command_that_tags_has_a_token_too(job, server, served, tmp_path, monkeypatch, capsys):
    assert job.run(served.run, f"--tracking_uri={server.url}") == 0
    with tokens() as google, gate(server.url, holder(google.issued)) as guarded:
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", service_account_key(tmp_path / "key.json", google.url))
        places = f"--tracking_uri={guarded.url}", f"--dataset={job.dataset}", f"--project={job.client.project}"
        assert tag.main([f"--run_id={served.run}", f"--tracking_audience={AUDIENCE}", *places]) == 0
    assert "embedding.user.partition 2026-03-01" in capsys.readouterr().out


def test_no_identity_token(job, server, served, tmp_path, monkeypatch, capsys):
    audience, uri = f"--tracking_audience={AUDIENCE}", f"--tracking_uri={server.url}"
    person = tmp_path / "person.json"
    person.write_text(
        json.dumps({"type": "authorized_user", "client_id": "i", "client_secret": "s", "refresh_token": "r"})
    )
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(person))
    monkeypatch.setattr("google.auth.compute_engine._metadata.ping", lambda *_: False)  # would look for ten seconds
    line = refused(job, capsys, served.run, audience, uri)
    assert f"no identity token for --tracking_audience={AUDIENCE}: Neither metadata server or valid service" in line
    assert "--impersonate-service-account=ACCOUNT" in line
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "nowhere.json"))
    assert "path is either not found or invalid" in refused(job, capsys, served.run, audience, uri)
    assert "is for a tracking server at https://, not at sqlite" in refused(job, capsys, served.run, audience)
    plain = "--tracking_uri=http://mlflow.example.com"
    assert "is for a tracking server at https://, not at http" in refused(job, capsys, served.run, audience, plain)
    both = uri.replace("//", "//me:guess@")
    assert "a password in --tracking_uri cannot be combined" in refused(job, capsys, served.run, audience, both)
    monkeypatch.setenv("MLFLOW_TRACKING_AUTH", "kubernetes")
    assert "and MLFLOW_TRACKING_AUTH cannot be combined" in refused(job, capsys, served.run, audience, uri)
