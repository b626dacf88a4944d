"""The job that Dataflow gets: built and staged by the real DataflowRunner, only not submitted, and then run."""

import json
import re

import pytest
from apache_beam.metrics.metric import Lineage
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.portability import python_urns
from apache_beam.portability.api import beam_runner_api_pb2
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from google.cloud import storage
from worlds import rotation, towers, turned

from beam_pipeline import __version__
from beam_pipeline.comparison.command import _labels, _subject, parse
from beam_pipeline.comparison.tables import Pair, Trained
from beam_pipeline.launch import execution


class Staged:
    """What a launch has put into the bucket: the job's request, and Beam's graph."""

    def __init__(self, history, *flags):
        folder = f"staged/{history.dataset}"
        self.done = history.subprocess(
            "--runner=DataflowRunner",
            "--region=europe-west1",
            f"--template_location=gs://warehouse/{folder}/job.json",
            f"--staging_location=gs://warehouse/{folder}",
            "--sdk_container_image=europe-docker.pkg.dev/my-project/images/beam_pipeline:1",
            "--no_auth",
            *flags,
        )
        assert self.done.returncode == 0, self.done.stderr
        blobs = storage.Client().list_blobs("warehouse", prefix=folder)
        objects = {blob.name.rsplit("/", 1)[1]: blob.download_as_bytes() for blob in blobs}
        self.size = sum(len(objects[name]) for name in ("job.json", "pipeline.pb"))
        self.request = json.loads(objects["job.json"])
        self.graph = beam_runner_api_pb2.Pipeline.FromString(objects["pipeline.pb"])
        self.steps = {t.unique_name: t for t in self.graph.components.transforms.values()}


def test_the_staged_graph(history):
    before = towers(users=300, items=90)
    history.publish("2026-03-01", "r1", before)
    history.publish("2026-03-08", "r2", turned(before, rotation(1)))
    tables = history.tables()
    staged = Staged(history, "--fail_if_unusual", "--labels=team=recommender")
    assert staged.done.stdout.splitlines()[-1] == "submitted   to DataflowRunner"
    assert staged.request["name"] == "compare-r2-r1"
    assert staged.request["labels"] == {
        "run_id": "r2",
        "experiment": "two_tower",
        "dataset": history.dataset,
        "pipeline_version": __version__.replace(".", "-"),
        "team": "recommender",
    }
    assert staged.size < 1_000_000
    names = {name.split("/")[1] for name in staged.steps if name.count("/") == 1}
    wanted = (
        "LaunchPrefix KeepLaunchId Prepare Join Fit Measure Total Ask Look Nearest Finish Load Shape Publish Clean Gate"
    )
    assert {*wanted.split()} <= names
    # What lets Dataflow use many workers: streams are spread before they are read.
    for spread, reads in (("Spread", "Join"), ("Streams", "Measure"), ("Items", "Look")):
        assert staged.steps[f"Compare/{spread}"].spec.urn == "beam:transform:reshuffle:v1"
        (streams,) = staged.steps[f"Compare/{spread}"].outputs.values()
        (read,) = [
            t
            for name, t in staged.steps.items()
            if re.match(rf"Compare/{reads}(/|$)", name) and t.spec.urn == "beam:transform:pardo:v1"
        ]
        assert streams in read.inputs.values()
    items = [
        beam_runner_api_pb2.LabelledPayload.FromString(i.payload) for i in staged.steps["Compare/Join"].display_data
    ]
    shown = {item.key: getattr(item, item.WhichOneof("value")) for item in items}
    assert (shown["from"], shown["to"], shown["pairs"]) == ("2026-03-01 weekly r1", "2026-03-08 weekly r2", 1)
    assert history.tables() == tables  # building a graph creates none

    for environment in staged.graph.components.environments.values():
        environment.urn, environment.payload = python_urns.EMBEDDED_PYTHON, b""
    result = FnApiRunner().run_via_runner_api(staged.graph, PipelineOptions([]))
    result.wait_until_finish()
    prefix = f"bigquery:local.{history.dataset}.two_tower"
    assert Lineage.query(result.metrics(), Lineage.SOURCE) == {f"{prefix}_{one}_embedding" for one in ("user", "item")}
    assert Lineage.query(result.metrics(), Lineage.SINK) == {
        f"{prefix}_embedding_comparison",
        f"{prefix}_item_embedding_change",
    }
    assert history.results()["r1", "r2", "item"]["score_change_p99"] < 1e-6
    assert len(history.changes("item")["r1", "r2"]) == 90
    assert history.files() == []


@pytest.mark.parametrize("run", ["0123456789abcdef" * 2, "Weekly_Run.7", "é" * 40, "x" * 3000, "-", "a-"])
def test_any_run_makes_a_name_and_labels_that_dataflow_takes(run):
    trained = Trained(None, run, "n", "Two Tower's É/ü", {})
    for flags in ([], ["--all"]):
        config = parse(["--project=my-project", "--runner=DataflowRunner", *flags])
        subject = _subject(config, [Pair(trained, trained)])
        name = execution.job_name(config, "token", PipelineOptions([]), subject)
        assert re.fullmatch("[a-z]([-a-z0-9]{0,1022}[a-z0-9])?", name)
        for label in _labels(config, [Pair(trained, trained)]):
            assert re.fullmatch("[a-z][a-z0-9_-]{0,62}=[a-z0-9_-]{0,63}", label)
