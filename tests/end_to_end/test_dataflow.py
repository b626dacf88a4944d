"""The job that Dataflow gets: built and staged by the real DataflowRunner, only not submitted.

Everything is read back from the bucket: the graph, the package, the job's request. The staged graph then runs in an
environment that holds what a worker would install and nothing else.
"""

import base64
import bz2
import contextlib
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import tarfile
import threading
import uuid
import zlib
from datetime import date
from pathlib import Path

import environments
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from google.cloud import bigquery, storage
from job import MARCH_1, Job
from wire_format import blown_up

from beam_pipeline import __version__
from beam_pipeline.bigquery.tables import schema_fields
from beam_pipeline.files import open_file
from beam_pipeline.formats.model import Encoding, Matrix, Tower, Vocabulary
from beam_pipeline.formats.protobuf import Span
from beam_pipeline.launch import plan
from beam_pipeline.launch.options import parse
from beam_pipeline.reading import pieces
from beam_pipeline.training import Run

ROOT = Path(__file__).parents[2]
IMAGE = "europe-docker.pkg.dev/my-project/images/beam_pipeline:1"
# Made here: setuptools puts tests into the package that is staged, and what is written in them with it.
SECRETS = [uuid.uuid4().hex for _ in range(3)]
RUN_NAME = f"on dataflow {uuid.uuid4().hex}"


class Staged:
    """What a launch has put into the bucket.

    Attributes:
        run_id: what was launched.
        done: the launcher's process.
        objects: content of each object by its name, without folders.
        request: the job as it would be sent to Dataflow.
        graph: Beam's Pipeline message.
    """

    def __init__(self, job, run_id, *flags, cwd=ROOT, env=None):
        from apache_beam.portability.api import beam_runner_api_pb2

        self.run_id = run_id
        folder = f"{job.dataset}/{len(flags)}_{run_id}"
        flags = [
            "--runner=DataflowRunner",
            "--region=europe-west1",
            f"--project={job.client.project}",
            f"--template_location=gs://warehouse/{folder}/job.json",
            f"--staging_location=gs://warehouse/{folder}",
            "--no_auth",
            *flags,
        ]
        self.done = job.subprocess(run_id, *flags, cwd=cwd, env={**os.environ, **(env or {})})
        assert self.done.returncode == 0, self.done.stderr
        blobs = storage.Client().list_blobs("warehouse", prefix=folder)
        self.objects = {blob.name.rsplit("/", 1)[1]: blob.download_as_bytes() for blob in blobs}
        self.request = json.loads(self.objects["job.json"])
        self.graph = beam_runner_api_pb2.Pipeline.FromString(self.objects["pipeline.pb"])

    def shown(self, step):
        """Returns the display data of a transform."""
        from apache_beam.portability.api import beam_runner_api_pb2

        (transform,) = [t for t in self.graph.components.transforms.values() if t.unique_name == step]
        items = [beam_runner_api_pb2.LabelledPayload.FromString(item.payload) for item in transform.display_data]
        return {item.key: getattr(item, item.WhichOneof("value")) for item in items}

    def images(self):
        """Returns the images that workers run, by the graph and by the request."""
        from apache_beam.portability.api import beam_runner_api_pb2

        environments = self.graph.components.environments.values()
        docker = beam_runner_api_pb2.DockerPayload
        (pool,) = self.request["environment"]["workerPools"]
        return {
            *(docker.FromString(environment.payload).container_image for environment in environments),
            *(image["containerImage"] for image in pool["sdkHarnessContainerImages"]),
        }

    def layers(self):
        """Yields all staged bytes, and whatever is packed inside them, at any depth."""
        for content in self.objects.values():
            yield from _layers(content)


def _layers(data):
    yield data
    if data.startswith(b"\x1f\x8b"):
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            for member in archive:
                yield member.name.encode()
                if member.isfile():
                    yield from _layers(archive.extractfile(member).read())
        return
    for unpack in (bz2.decompress, zlib.decompress):
        with contextlib.suppress(OSError, ValueError, zlib.error):
            if unpacked := unpack(data):
                yield from _layers(unpacked)
    for packed in re.findall(rb"[A-Za-z0-9+/]{40,}={0,2}", data):
        with contextlib.suppress(ValueError):
            yield from _layers(base64.b64decode(packed))


@pytest.fixture(scope="module")
def job(warehouse, store, commands):
    client = bigquery.Client(project=warehouse.project)
    dataset = f"dataflow_{os.getpid()}"
    client.create_dataset(dataset)
    yield Job(client, dataset, store, f"{warehouse.temp_location}/{dataset}", commands)
    client.delete_dataset(dataset, delete_contents=True)


@pytest.fixture(scope="module")
def tracking_server(store):
    """The store behind MLflow's own server, which here rejects requests without a password; its URL holds it."""
    from mlflow.server import app, handlers
    from werkzeug.serving import make_server

    password = base64.b64encode(f"trainer:{SECRETS[2]}".encode()).decode()

    def guarded(environ, start_response):
        if environ.get("HTTP_AUTHORIZATION") == f"Basic {password}":
            return app(environ, start_response)
        start_response("401 Unauthorized", [])
        return []

    handlers.initialize_backend_stores(store.uri)
    server = make_server("127.0.0.1", 0, guarded, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://trainer:{SECRETS[2]}@127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def staged(job, store, models, tracking_server):
    """A launch with --setup_file, from a tracking server that needs secrets."""
    return Staged(
        job,
        store.log(models("plain"), RUN_NAME, MARCH_1, bucket=True),
        "--setup_file=./setup.py",
        f"--tracking_uri={tracking_server}",
        "--labels=team=recommender",
        '--labels={"experiment": "mine"}',
        env={"MLFLOW_TRACKING_TOKEN": SECRETS[0], "MLFLOW_TRACKING_PASSWORD": SECRETS[1]},
    )


# The graph.


def test_the_graph_has_every_step(staged, job):
    assert staged.done.stdout.splitlines()[-1] == "submitted   to DataflowRunner"
    roots = {
        transform.unique_name
        for transform in staged.graph.components.transforms.values()
        if transform.unique_name and "/" not in transform.unique_name
    }
    towers = {f"{verb} {tower}" for verb in ("Cut", "Write") for tower in ("user", "item")}
    assert towers | {"Prepare", "Check", "Audit", "Shape", "Publish", "Clean"} <= roots
    assert job.tables() == set()  # building a graph makes none


def test_pieces_are_spread_before_they_are_read(staged):
    """What lets Dataflow add workers: between cutting and reading there is a shuffle, so the two do not fuse."""
    transforms = {t.unique_name: t for t in staged.graph.components.transforms.values()}
    for tower in ("user", "item"):
        assert transforms[f"Cut {tower}/Spread"].spec.urn == "beam:transform:reshuffle:v1"
        (spread,) = transforms[f"Cut {tower}/Spread"].outputs.values()
        assert spread in transforms[f"Write {tower}/Load"].inputs.values()


def test_steps_show_what_they_do(staged, job):
    write = staged.shown("Write item/Load/WritePiecesToFiles/ParDo(_WriteFn)")
    assert write["tower"] == "item"
    assert write["layer"] == "item_layer"
    assert (write["rows"], write["dimension"], write["dtype"]) == (2015, 8, "float32")
    assert re.fullmatch(r"gs://.+/artifacts/model/variables/variables\.data-00000-of-00001", write["vectors"])
    assert re.fullmatch(r"gs://.+/artifacts/model/assets/items\.txt", write["ids"])
    assert write["table"] == f"{job.destination.table('item')}_staging_<launch>"
    assert write["writer"] == "columnar"
    for step in ("Prepare", "Audit", "Shape", "Publish", "Clean"):
        shown = staged.shown(step)
        assert shown["tables"] == ", ".join(job.destination.table(tower) for tower in ("user", "item"))
        assert (shown["run_id"], shown["train_date"]) == (staged.run_id, "2026-03-01")
        assert shown["if_partition_taken"] == "fail"


# The request.


def test_the_job_is_named_and_labelled_after_the_run(staged, job):
    assert staged.request["name"] == f"historize-{staged.run_id}"
    assert staged.request["labels"] == {
        "run_id": staged.run_id,
        "dataset": job.dataset,
        "pipeline_version": __version__.replace(".", "-"),
        "team": "recommender",
        "experiment": "mine",  # the user's own wins
    }


@pytest.mark.parametrize("run_id", ["0123456789abcdef" * 2, "Weekly_Run.7", "é" * 40, "x" * 3000, "-", "a-"])
def test_any_run_id_makes_a_job_name_that_dataflow_takes(run_id):
    runs = [Run(run_id, "n", run_id, "e", date(2026, 3, 1), "gs://b/a")]
    given = PipelineOptions([])
    name = plan.job_name(parse(["--run_id=r", "--runner=DataflowRunner"]), "token", given, runs)
    every = parse(["--experiment_name=e", "--all_runs", "--runner=DataflowRunner"])
    of_all = plan.job_name(every, "token", given, runs)
    for each in (name, of_all):
        assert re.fullmatch("[a-z]([-a-z0-9]{0,1022}[a-z0-9])?", each)
    assert plan.job_name(parse(["--run_id=r", "--runner=DataflowRunner"]), "another", given, runs) == name != of_all


@pytest.mark.parametrize("name", ["two_tower", "Two Tower's É/ü", "", "x" * 300, "日本"])
def test_any_experiment_makes_a_label_that_dataflow_takes(name):
    labels = plan.labels(parse(["--run_id=r"]), [Run("r", "n", "1", name, date(2026, 3, 1), "gs://b/a")])
    assert [label.split("=")[0] for label in labels] == ["run_id", "experiment", "dataset", "pipeline_version"]
    for label in labels:
        assert re.fullmatch("[a-z][a-z0-9_-]{0,62}=[a-z0-9_-]{0,63}", label)


# What must not be there.


def test_no_secret_is_staged(staged):
    layers = [*staged.layers()]
    # The search does see what is packed: the run's name is in pickles alone.
    assert not any(RUN_NAME.encode() in content for content in staged.objects.values())
    assert any(RUN_NAME.encode() in layer for layer in layers)
    for secret in SECRETS:
        assert not any(secret.encode() in layer for layer in layers)
        assert secret not in staged.done.stdout + staged.done.stderr


def test_no_model_data_is_staged(staged, models):
    layers = [*staged.layers()]
    for tower in ("user", "item"):
        names = [name.encode() for name in models("plain").ids(tower) if len(name.encode()) > 7]
        assert len(names) > 10
        vectors = models("plain").vectors(tower).astype("<f4")
        wanted = [*names, *(row.tobytes() for row in vectors[:100])]
        assert [data for data in wanted if any(data in layer for layer in layers)] == []


def test_five_million_ids_make_the_same_small_job(staged, job, store, damaged):
    """Real models, but for their vocabularies: five million ids inside the graph, and five million in a file."""
    model, count = damaged("plain"), 5_000_000
    path = model.folder / "saved_model.pb"
    path.write_bytes(blown_up(path.read_bytes(), len(model.ids("user")), count))
    (model.folder / "assets" / "items.txt").write_bytes(b"".join(b"item-%09d\n" % i for i in range(count)))
    large = Staged(job, store.log(model, "five million", MARCH_1, bucket=True), "--setup_file=setup.py")
    names = ("job.json", "pipeline.pb")
    small_bytes, large_bytes = (sum(len(it.objects[name]) for name in names) for it in (staged, large))
    assert large_bytes < 1_000_000  # Dataflow takes 10 MB, of the request alone
    assert abs(large_bytes - small_bytes) < 10_000
    assert {step.unique_name for step in staged.graph.components.transforms.values()} == {
        step.unique_name for step in large.graph.components.transforms.values()
    }


def test_the_page_says_how_many_pieces_there_are(tmp_path):
    """Cut as on Dataflow; what a piece costs to send is what it weighs pickled."""
    count = 5_000_000
    (tmp_path / "ids").write_bytes(b"".join(b"user-%09d\n" % i for i in range(count)))
    vocabulary = Vocabulary(f"{tmp_path}/ids", Span(0, 15 * count), Encoding.LINES, 0)
    tower = Tower("user", "user_layer", Matrix("weights", 0, count, 64, "float32", 0), vocabulary)
    found = [*pieces.cut(tower, open_file, pieces.PIECE_BYTES)]
    assert (len(found), found[0].rows) == (153, 32_768)
    assert max(len(pickle.dumps(piece)) for piece in found) < 300
    page = (ROOT / "docs/dataflow.md").read_text(encoding="utf-8")
    assert "8 MB of vectors, 32,768 rows of 64 floats: 5 million rows make 153 pieces, 100 million 3,052" in page
    assert -(-100_000_000 // 32_768) == 3_052


# The workers.


def test_a_container_needs_no_package(staged, job, store, models, tmp_path):
    run_id = store.log(models("longer"), "in a container", MARCH_1, bucket=True)
    contained = Staged(job, run_id, f"--sdk_container_image={IMAGE}", cwd=tmp_path)
    assert contained.images() == {IMAGE}
    assert "workflow.tar.gz" not in contained.objects
    assert "workflow.tar.gz" in staged.objects
    (image,) = staged.images()
    assert re.fullmatch(r"gcr\.io/cloud-dataflow/v1beta3/beam_python3\.\d+_sdk:2\.77\.0", image)


@pytest.fixture(scope="module")
def worker(staged, tmp_path_factory):
    """An empty environment into which the staged package was installed, as a worker of Dataflow does; its Python."""
    folder = tmp_path_factory.mktemp("worker")
    (folder / "workflow.tar.gz").write_bytes(staged.objects["workflow.tar.gz"])

    def install(venv, *options):
        command = [venv / "bin/python", "-m", "pip", "install", "-q", "--no-compile", *options]
        done = subprocess.run([*command, folder / "workflow.tar.gz"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    # Beam's own image has Beam and its dependencies already; here they are installed too, all as they are locked.
    lock = ROOT / "constraints.txt"
    key = [lock.read_text(), (ROOT / "setup.py").read_text()]
    environments.create(folder / "venv", "worker", key, lambda venv: install(venv, "-c", lock))
    install(folder / "venv", "--no-deps", "--force-reinstall")
    yield folder / "venv/bin/python"
    shutil.rmtree(folder)


# In the worker's environment: imports everything, then runs the staged graph, from its bytes.
WORKER = """
import importlib, importlib.util, pkgutil, sys

import beam_pipeline
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.portability import python_urns
from apache_beam.portability.api import beam_runner_api_pb2
from apache_beam.runners.portability.fn_api_runner import FnApiRunner

assert beam_pipeline.__file__.startswith(sys.prefix), beam_pipeline.__file__
for name in ("tensorflow", "keras", "tf_keras", "mlflow", "bqemulator"):
    assert importlib.util.find_spec(name) is None, name
for module in pkgutil.walk_packages(beam_pipeline.__path__, "beam_pipeline."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)

from beam_pipeline import emulators
emulators.connect()
graph = beam_runner_api_pb2.Pipeline.FromString(open(sys.argv[1], "rb").read())
for environment in graph.components.environments.values():
    environment.urn, environment.payload = python_urns.EMBEDDED_PYTHON, b""
FnApiRunner().run_via_runner_api(graph, PipelineOptions([])).wait_until_finish()
"""


@pytest.mark.timeout(600)  # on a new machine pip downloads 200 MB
def test_the_staged_graph_runs_where_only_the_staged_package_is(worker, staged, job, models, tmp_path):
    (tmp_path / "pipeline.pb").write_bytes(staged.objects["pipeline.pb"])
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [worker, "-c", WORKER, tmp_path / "pipeline.pb"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    for tower in ("user", "item"):
        assert job.rows(tower) == {("2026-03-01", staged.run_id): models("plain").rows(tower)}


# Nothing to do.


def test_a_template_with_nothing_to_do_writes_an_empty_job(job, store, models):
    """Without a job file the service reports the template as FAILED, and Airflow tries again for ever."""
    run_id = store.log(models("longer"), "published", MARCH_1, experiment="all published")
    for tower in ("user", "item"):
        table = job.destination.table(tower)
        job.client.create_table(bigquery.Table(table, schema=schema_fields(tower)), exists_ok=True)
        job.client.query_and_wait(
            f"INSERT `{table}` (train_date, mlflow_experiment_id, mlflow_experiment_name, mlflow_run_id, "
            f"mlflow_run_name, {tower}_id, {tower}_embedding) VALUES (DATE '2026-03-01', '1', 'e', '{run_id}', 'r', 'a', [1.0])"
        )
    folder = f"{job.dataset}/nothing"
    done = job.subprocess(
        None,
        *("--experiment_name=all published", "--all_runs", "--runner=DataflowRunner", "--region=europe-west1"),
        *(f"--project={job.client.project}", "--no_auth", f"--sdk_container_image={IMAGE}", "--num_workers=20"),
        *(f"--template_location=gs://warehouse/{folder}/job.json", f"--staging_location=gs://warehouse/{folder}"),
    )
    assert done.returncode == 0, done.stderr
    assert "nothing to do: 1 runs are published already" in done.stdout
    bucket = storage.Client().bucket("warehouse")
    request = json.loads(bucket.blob(f"{folder}/job.json").download_as_bytes())
    assert request["type"] == "JOB_TYPE_BATCH"
    assert request["environment"]["workerPools"][0]["numWorkers"] == 1  # whatever a job with rows would begin with
    assert request["labels"]["experiment"] == "all-published"
    (graph,) = [blob for blob in bucket.list_blobs(prefix=folder) if blob.name.endswith("/pipeline.pb")]
    assert b"Nothing to do" in graph.download_as_bytes()
