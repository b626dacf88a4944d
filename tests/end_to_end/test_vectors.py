"""Whether what is published is what the model serves: refusals, notes and the log, with the whole job."""

import json

import pytest
from job import MARCH_1, MARCH_2, refused
from models import made_by

from beam_pipeline.launch.launcher import launch


@pytest.fixture(scope="module")
def tails():
    return made_by("make_tails.py", "dense", "normalised", "concatenated", "mean_of_a_list", "same_ids")


def report(capsys, check):
    lines = capsys.readouterr().out.splitlines()
    found = [line for line in lines if line[6:].startswith(f"{check} ")]
    return [line[:6].strip() + ": " + line[6:].removeprefix(check).strip() for line in found]


def test_a_tower_that_goes_on_is_refused_unless_its_rows_are_asked_for(job, store, tails, capsys):
    run = store.log(tails("dense"), "dense", MARCH_1)
    line = refused(job, capsys, run)
    assert line.startswith(
        "error: tower 'user': the model continues after the embedding of 'user_layer': dense (MatMul, BiasAdd); the rows "
        "of the embedding are not the vectors that it serves."
    )
    assert "publish the rows all the same with --embedding_rows" in line
    assert job.run(run, "--embedding_rows") == 0
    assert report(capsys, "vectors user")[0].startswith(
        "note: rows of the embedding, which the model does not serve: user_layer continues with dense (MatMul, BiasAdd)"
    )
    assert len(job.rows("user")[("2026-03-01", run)]) == 9
    assert job.query("SELECT tower, vector_source FROM {log} ORDER BY tower") == [
        ("item", "embedding_rows"),
        ("user", "embedding_rows"),
    ]


def test_the_log_says_what_the_vectors_are(job, store, tails, capsys):
    assert job.run(store.log(tails("concatenated"), "concatenated", MARCH_1)) == 0
    assert report(capsys, "vectors user") == [
        "note: the towers meet in ConcatV2, not in a dot product or a cosine: the vectors are the model's embeddings, "
        "but how near they are is not its score"
    ]
    assert job.query("SELECT DISTINCT vector_source FROM {log}") == [("embedding",)]


def test_a_scaling_is_a_note(job, store, tails, capsys):
    run = store.log(tails("normalised"), "normalised", MARCH_1)
    assert launch(job.config(run, "--plan=json")) == 0
    findings = [each for each in json.loads(capsys.readouterr().out)["findings"] if each["check"] == "vectors item"]
    (finding,) = findings
    assert finding["status"] == "note"
    assert finding["text"].startswith(
        "the model scales the rows (l2_normalize (Square, Sum, Maximum, Rsqrt), unit_norm"
    )
    assert finding["text"].endswith("they are right under COSINE, not under DOT_PRODUCT or EUCLIDEAN")


def test_all_runs_name_the_run_whose_tower_goes_on(job, store, tails, capsys):
    store.log(tails("normalised"), "normalised", MARCH_1, experiment="tails")
    run = store.log(tails("dense"), "dense", MARCH_2, experiment="tails")
    line = refused(job, capsys, None, "--experiment_name=tails", "--all_runs")
    assert line.endswith(f"(run {run})")


def test_towers_with_the_same_ids(job, store, tails, models, capsys):
    run = store.log(models("three"), "three", MARCH_1)
    named = ("--tower=user=user_tower", "--tower=item=item_tower")
    assert launch(job.config(run, *named, "--plan")) == 0
    assert report(capsys, "towers") == [
        "note: user and item have the same ids: they cannot be searched against each other"
    ]
    run = store.log(tails("mean_of_a_list"), "mean", MARCH_1)
    assert launch(job.config(run, "--plan")) == 1
    lines = capsys.readouterr().out.splitlines()
    (stop,) = [line for line in lines if line.startswith("stop")]
    assert "the model continues after the embedding of 'user_layer': Mean" in stop
    assert any("user and item have the same ids: they cannot be searched" in line for line in lines)
    # Items can be had.
    assert job.run(run, "--tower=item=item_layer") == 0
    assert len(job.rows("item")[("2026-03-01", run)]) == 7


def test_towers_that_were_found_by_their_names_have_ids_of_their_own(job, store, tails, capsys):
    line = refused(job, capsys, store.log(tails("same_ids"), "same_ids", MARCH_1))
    assert "user and item have the same ids: 'user_tower' and 'item_tower', which nobody named" in line
    assert line.endswith("name them: --tower=user=user_tower --tower=item=item_tower")


def test_a_misspelt_layer_of_a_subclassed_model_is_refused(job, store, keras_files, capsys):
    run = store.log(keras_files("subclassed"), "subclassed", MARCH_1)
    line = refused(job, capsys, run, "--tower=user=zzz,item=item_layer")
    assert "layer 'zzz' does not exist" in line
    assert "layers that are towers: item_layer, layers/sequential; choose with --tower user=LAYER" in line


def test_inspect_says_how_each_layer_goes_on(job, store, tails, capsys):
    run = store.log(tails("dense"), "dense", MARCH_1)
    assert launch(job.config(run, "--inspect")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition(": ")[0] for line in lines if line.startswith("  then ")] == [
        "  then      continues after the embedding",
        "  then      continues after the embedding",
    ]
