"""Bad input: one line, exit 1, nothing published, nothing left."""

import json
import shutil
from datetime import UTC, datetime

import pytest
from damage import data_file, flip, overwrite_vector, rewrite_items
from job import MARCH_1, refused

from beam_pipeline.launch.launcher import launch
from beam_pipeline.launch.options import parse
from beam_pipeline.tracking import client


def test_unknown_runs(job, store, capsys):
    assert "no run 'feedbeef" in refused(job, capsys, "feedbeef" * 4)
    assert "no experiment 'nope' in" in refused(job, capsys, None, "--experiment_name=nope")
    line = refused(job, capsys, None, f"--experiment_name={store.experiment}", "--run_name=nope")
    assert "has no FINISHED run named 'nope'" in line


def test_an_experiment_without_a_finished_run(job, store, models, capsys):
    store.log(models("longer"), "running", MARCH_1, experiment="unfinished", status="RUNNING")
    assert "has no FINISHED run;" in refused(job, capsys, None, "--experiment_name=unfinished")


@pytest.mark.parametrize(
    ("status", "note"),
    [
        ("FINISHED", []),
        ("RUNNING", ["{run} is RUNNING: start the job again if it logs its model again before it ends"]),
        ("FAILED", ["{run} is FAILED: make sure that its model is the one to publish"]),
    ],
)
def test_a_named_run_that_has_not_finished_is_noted(job, store, models, capsys, status, note):
    run = store.log(models("longer"), "named", MARCH_1, status=status)
    assert job.run(run, "--plan=json") == 0
    findings = json.loads(capsys.readouterr().out)["findings"]
    notes = [(line["status"], line["text"]) for line in findings if line["check"] == "run"]
    assert notes == [("note", text.format(run=run)) for text in note]


def test_a_tracking_server_that_is_not_there(job, capsys):
    begin = datetime.now(UTC)
    line = refused(job, capsys, "0" * 32, "--tracking_uri=http://127.0.0.1:9")
    assert "MLflow at http://127.0.0.1:9 does not respond" in line
    assert (datetime.now(UTC) - begin).total_seconds() < 30
    assert "no MLflow store at sqlite:////no/such.db" in refused(
        job, capsys, "0" * 32, "--tracking_uri=sqlite:////no/such.db"
    )


def test_a_tracking_server_that_never_answers(job, capsys, monkeypatch):
    import socket

    assert client._PATIENCE <= 10
    monkeypatch.setattr(client, "_PATIENCE", 2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        begin = datetime.now(UTC)
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert "does not respond" in refused(job, capsys, "0" * 32, f"--tracking_uri={uri}")
    assert (datetime.now(UTC) - begin).total_seconds() < 3 * 2


def test_no_model_in_the_run(job, store, models, capsys):
    run = store.log(models("longer"), "longer", MARCH_1)
    line = refused(job, capsys, run, "--artifact_path=other")
    assert "/other does not hold a model" in line
    assert "--artifact_path" in line
    shutil.rmtree(store.artifacts(run))
    assert "does not hold a model" in refused(job, capsys, run)


def test_a_tower_that_is_not_there(job, store, models, capsys):
    run = store.log(models("longer"), "longer", MARCH_1)
    line = refused(job, capsys, run, "--tower=user=user_layer", "--tower=item=film_layer")
    assert "tower 'item': layer 'film_layer' does not exist" in line
    assert "item_layer, user_layer" in line


# Every damaged byte, value and id is in tests/unit/reading/test_damages.py; a job for each kind.


def test_weights_that_do_not_match_their_checksum(job, store, damaged, capsys, monkeypatch):
    monkeypatch.setattr("beam_pipeline.reading.pieces.PIECE_BYTES", 1000)
    model = damaged("plain")
    flip(model, 60_000)
    line = refused(job, capsys, store.log(model, "flipped", MARCH_1))
    assert "do not match the checkpoint's crc32c" in line


def test_a_value_that_is_not_finite(job, store, damaged, capsys):
    model = damaged("plain")
    overwrite_vector(model, 8, float("nan"))
    line = refused(job, capsys, store.log(model, "diverged", MARCH_1))
    assert "tower 'item': the vector of id 'item 7' (row 8) holds NaN or infinity" in line


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda ids: [*ids[:9], b"", *ids[10:]], "the id of row 10 is empty"),
        # BigQuery finds this one.
        (lambda ids: [*ids[:9], ids[3], *ids[10:]], "id 'item 3' appears 2 times in the vocabulary"),
    ],
)
def test_bad_ids(job, store, damaged, capsys, change, words):
    model = damaged("plain")
    rewrite_items(model, change)
    line = refused(job, capsys, store.log(model, "bad ids", MARCH_1))
    assert f"tower 'item': {words}" in line


def test_truncated_weights(job, store, damaged, capsys):
    model = damaged("plain")
    with data_file(model).open("r+b") as file:
        file.truncate(1000)
    assert "has 1,000 bytes, but bytes" in refused(job, capsys, store.log(model, "cut", MARCH_1))


def test_weights_cut_while_the_job_runs(job, store, models, tmp_path):
    run = store.log(models("plain"), "cut", MARCH_1)
    hook = """
from beam_pipeline.reading import rows
original = rows.read_piece
def read_piece(run_id, piece, tower, open_file):
    open(tower.matrix.path, "r+b").truncate(1000)
    return original(run_id, piece, tower, open_file)
rows.read_piece = read_piece
"""
    process = job.hooked(tmp_path, hook, run)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 1
    assert "has 1,000 bytes" in err.splitlines()[-1]
    assert job.tables() == set()


@pytest.mark.parametrize("what", ["missing", "corrupt"])
def test_a_bad_index(job, store, damaged, capsys, what):
    model = damaged("plain")
    index = model.folder / "variables" / "variables.index"
    if what == "missing":
        index.unlink()
    else:
        index.write_bytes(index.read_bytes()[:-1] + b"\0")
    line = refused(job, capsys, store.log(model, what, MARCH_1))
    assert "variables.index " + ("does not exist" if what == "missing" else "is not a checkpoint index") in line


def test_fewer_ids_than_rows_is_fine(job, store, damaged):
    model = damaged("plain")
    rewrite_items(model, lambda ids: ids[:-10])
    run = store.log(model, "fewer", MARCH_1)
    assert job.run(run) == 0
    assert job.published() == {("2026-03-01", run): (3015, 2004)}


def test_a_missing_dataset(job, store, models, capsys):
    run = store.log(models("longer"), "longer", MARCH_1)
    line = refused(job, capsys, run, "--dataset=raw_nowhere")
    assert "raw_nowhere does not exist; create it where the bucket is: bq --location=EU mk --dataset" in line
    assert "raw_nowhere" not in {dataset.dataset_id for dataset in job.client.list_datasets()}


def test_a_local_artifact_on_a_distributed_runner(job, store, models, capsys):
    run = store.log(models("longer"), "longer", MARCH_1)
    line = refused(job, capsys, run, "--runner=DataflowRunner", "--region=europe-west1")
    assert "DataflowRunner cannot read the local folder" in line
    assert "--shared_files" not in line
    line = refused(job, capsys, run, "--runner=FlinkRunner")
    assert "FlinkRunner cannot read the local folder" in line
    assert "--shared_files if the workers can read it, or --runner=DirectRunner" in line


def test_no_destination(store, models, capsys, monkeypatch):
    for name in ("BIGQUERY_EMULATOR_HOST", "STORAGE_EMULATOR_HOST", "GOOGLE_CLOUD_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    run = store.log(models("longer"), "longer", MARCH_1)
    assert launch(parse([f"--run_id={run}", f"--tracking_uri={store.uri}"])) == 1
    assert "--warehouse=DIR" in capsys.readouterr().err.splitlines()[-1]


def test_ids_are_data_in_every_query(job, store, damaged, capsys):
    """Ids with quotes and backslashes survive the audit's own queries too."""
    model = damaged("plain")
    rewrite_items(model, lambda ids: [*ids[:8], b"it's `x` \\", b"it's `x` \\", *ids[10:]])
    line = refused(job, capsys, store.log(model, "quotes", MARCH_1))
    assert 'id "it\'s `x` \\\\" appears 2 times' in line
