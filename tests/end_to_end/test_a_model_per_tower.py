"""Towers that are models of their own, logged to one run: one launch, one transaction, every row what the tower answers."""

import json

import pytest
from job import MARCH_1, MARCH_2, refused
from models import made_by


@pytest.fixture(scope="module")
def indexes():
    return made_by("make_indexes.py")


@pytest.fixture
def pair(indexes):
    """Returns the two models of a run, by their artifact paths."""
    return {"query_model": indexes("alone_users"), "candidate_model": indexes("alone")}


def assert_published(job, indexes, run, day="2026-03-01", items="alone"):
    assert job.rows("user")[day, run] == indexes("alone_users").rows("item")
    assert job.rows("item")[day, run] == indexes(items).rows("item")
    log = dict(job.query("SELECT tower, model_uri FROM {log} WHERE mlflow_run_id = '" + run + "'"))
    assert log["user"].endswith("/artifacts/query_model")
    assert log["item"].endswith("/artifacts/candidate_model")


def test_towers_of_two_models_named_and_found(job, store, indexes, pair, capsys):
    run = store.log(pair, "apart", MARCH_1)
    ended = job.subprocess(run, "--tower=user=query_model:sequential", "--tower=item=candidate_model:")
    assert ended.returncode == 0, ended.stderr
    assert_published(job, indexes, run)
    # One row for each tower, of one launch.
    assert job.query("SELECT COUNT(*), COUNT(DISTINCT published_at) FROM {log}") == [(2, 1)]
    # Without flags, as the latest run; an index may stand for the items.
    later = store.log({**pair, "candidate_model": indexes("tfrs")}, "with an index", MARCH_2)
    assert job.run(None, f"--experiment_name={store.experiment}", "--run_name=with an index") == 0
    output = capsys.readouterr().out
    assert "--tower=user=query_model:sequential --tower=item=candidate_model:candidates" in output
    assert_published(job, indexes, later, "2026-03-02", "tfrs")


def test_plan_and_inspection_of_two_models(job, store, pair, capsys):
    run = store.log(pair, "apart", MARCH_1)
    assert job.run(run, "--plan=json") == 0
    (training,) = json.loads(capsys.readouterr().out)["trainings"]
    assert [tower["layer"] for tower in training["towers"]] == [
        "query_model:sequential",
        "candidate_model:sequential",
    ]
    assert [uri.rpartition("/")[2] for uri in training["model_uri"].split(", ")] == ["query_model", "candidate_model"]
    assert job.run(run, "--inspect") == 0
    shown = capsys.readouterr().out
    assert "query_model" in shown
    assert "candidate_model" in shown
    assert shown.count("layer       sequential") == 2
    assert shown.count("then      ends at the embedding") == 2


def test_nothing_is_published_where_the_models_do_not_say_which_is_which(job, store, indexes, pair, capsys):
    run = store.log({"a": indexes("alone_users"), "b": indexes("alone")}, "unnamed", MARCH_1)
    assert "has 2 models: a, b; choose with --artifact_path=NAME" in refused(job, capsys, run)
    run = store.log({**pair, "ranking": indexes("alone")}, "three", MARCH_1)
    assert "has 3 models" in refused(job, capsys, run)
    run = store.log({**pair, "candidate_model": indexes("alone_dense")}, "deep", MARCH_1)
    line = refused(job, capsys, run)
    assert "tower 'item': the model continues after the embedding of 'candidate_model:sequential': dense" in line
    run = store.log({**pair, "query_model": indexes("tfrs")}, "two layers", MARCH_1)
    line = refused(job, capsys, run, "--tower=user=candidate_model:", "--tower=item=query_model:nothing")
    assert "layer 'nothing' does not exist" in line
