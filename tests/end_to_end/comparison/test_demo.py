"""Trained models: the demo's own, with an item that was planted and without; and what becomes of their runs in MLflow."""

import os
from pathlib import Path

import pytest
from history import History
from mlflow.tracking import MlflowClient
from store import example_runs

from beam_pipeline.launch.launcher import launch
from beam_pipeline.launch.options import parse

PLANTED = "item-jazz-007"


@pytest.fixture(scope="module")
def demo(warehouse, commands, tmp_path_factory):
    """Three trainings of the demo, published: between the first two nothing is planted, before the third an item is."""
    from google.cloud import bigquery

    folder = tmp_path_factory.mktemp("demo") / "store"
    client = bigquery.Client(project=warehouse.project)
    dataset = f"demo_{os.getpid()}"
    client.create_dataset(dataset)
    history = History(client, dataset, f"{warehouse.temp_location}/{dataset}", commands)
    history.tracking_uri, history.runs = example_runs("demo", folder)
    flags = [f"--dataset={dataset}", f"--temp_location={warehouse.temp_location}/{dataset}"]
    all_runs = ["--experiment_name=two_tower", "--all_runs", f"--tracking_uri={history.tracking_uri}"]
    assert launch(parse([*all_runs, *flags])) == 0
    yield history
    client.delete_dataset(dataset, delete_contents=True)


@pytest.mark.timeout(400)
def test_the_planted_item_is_first_and_nothing_else_is_far(demo, capsys):
    assert demo.compare("--all") == 0
    first, second, third = demo.runs
    found = demo.results("tower = 'item'")
    planted = found[second, third, "item"]["most_moved"]
    assert planted[0]["id"] == PLANTED
    assert planted[0]["score_change"] > 0.9
    assert planted[1]["score_change"] < 0.7
    assert found[first, second, "item"]["most_moved"][0]["score_change"] < 0.7
    # Its neighbours are of its own genre before, and of the next one after.
    assert all(near["id"].startswith("item-jazz") for near in planted[0]["nearest_before"])
    assert all(near["id"].startswith("item-metal") for near in planted[0]["nearest_after"])
    out = capsys.readouterr().out
    assert "items       120 of 120 common; score change median 0." in out
    assert f"  {PLANTED}" in out


def test_numbers_and_page_on_the_later_run(demo, capsys, tmp_path):
    second, third = demo.runs[1:]
    assert demo.compare(f"--from={second}", f"--to={third}", "--log_run", f"--tracking_uri={demo.tracking_uri}") == 0
    client = MlflowClient(demo.tracking_uri)
    metrics = client.get_run(third).data.metrics
    row = demo.results()[second, third, "item"]
    assert metrics["embedding.item.score_change_p99"] == pytest.approx(row["score_change_p99"])
    assert metrics["embedding.user.recommendations_kept"] == pytest.approx(row["recommendations_kept"])
    assert metrics["embedding.item.ids_added"] == 0
    assert client.get_run(second).data.metrics == {}
    (artifact,) = client.list_artifacts(third, "embedding_comparison")
    page = client.download_artifacts(third, artifact.path, str(tmp_path))
    assert PLANTED in Path(page).read_text(encoding="utf-8")
    # MLflow is not there: the results are all the same.
    capsys.readouterr()
    assert (
        demo.compare(f"--from={second}", f"--to={third}", "--log_run", f"--tracking_uri=sqlite:///{tmp_path}/x.db") == 0
    )
    assert "warning: published, but not logged to the run: no MLflow store at" in capsys.readouterr().err
