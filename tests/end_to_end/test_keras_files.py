"""The whole job with `.keras` files by real Keras, as MLflow stores them, compared with Keras row by row."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from damage import flip_keras
from job import MARCH_1, refused
from mlflow.tracking import MlflowClient
from models import SUPPORT

from beam_pipeline.files import open_file
from beam_pipeline.formats.keras.reader import KerasFile

BY_NAME = ("--tower=user=user_embedding", "--tower=item=item_embedding")


def log_file(store, path):
    """Logs one file as `mlflow.log_artifact(path, "model")` does; returns the run's id."""
    client = MlflowClient(store.uri)
    run = client.create_run(store.experiment_id, start_time=int(MARCH_1.timestamp() * 1000), run_name="file")
    client.log_artifact(run.info.run_id, str(path), "model")
    client.set_terminated(run.info.run_id)
    return run.info.run_id


def check(job, run, model):
    for tower in ("user", "item"):
        ((found_run, found),) = [(key[1], rows) for key, rows in job.rows(tower).items()]
        assert found_run == run
        assert found == model.rows(tower)


@pytest.mark.parametrize(
    ("names", "flags"),
    [
        (("functional", "special", "adapted", "keras2_functional"), BY_NAME),
        (("subclassed", "configured", "keras2_subclassed"), ()),
    ],
)
@pytest.mark.parametrize("piece_bytes", [8 << 20, 1000])
def test_every_row_is_what_keras_says(job, store, keras_files, monkeypatch, names, flags, piece_bytes):
    monkeypatch.setattr("beam_pipeline.reading.pieces.PIECE_BYTES", piece_bytes)
    job.publish_all(store, {name: keras_files(name) for name in names}, "--allow_dimension_change", *flags)


def test_a_file_of_any_name(job, store, keras_files, tmp_path, capsys):
    path = shutil.copy(keras_files("functional").folder / "model.keras", tmp_path / "my.keras")
    run = log_file(store, path)
    assert "/model does not hold a model" in refused(job, capsys, run, *BY_NAME)
    assert job.run(run, "--artifact_path=model/my.keras", *BY_NAME) == 0
    check(job, run, keras_files("functional"))


def test_on_cloud_storage(job, store, keras_files):
    run = store.log(keras_files("functional"), "keras on gs", MARCH_1, bucket=True)
    assert job.run(run, *BY_NAME) == 0
    check(job, run, keras_files("functional"))


def test_logged_by_mlflow_tensorflow_log_model(job, store, keras_files):
    folder = keras_files("functional").folder
    script = SUPPORT / "make_keras_files.py"
    command = [sys.executable, str(script), str(folder.parent), folder.name, store.uri, store.experiment_id]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    run_id = done.stdout.split()[-1]
    client = MlflowClient(store.uri)
    run = client.get_run(run_id)
    # MLflow 3 keeps the model beside the run, not in it.
    model = client.get_logged_model(run.outputs.model_outputs[0].model_id).artifact_location.removeprefix("file://")
    assert (Path(model) / "data" / "model.keras").exists()
    assert job.run(run_id) == 0
    check(job, run_id, keras_files("functional"))


def test_as_a_process_of_its_own_without_keras(job, store, keras_files, tmp_path):
    run = log_file(store, keras_files("functional").folder / "model.keras")
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, sys\n"
        "atexit.register(lambda: print('IMPORTED', *({'tensorflow', 'keras', 'h5py'} & {*sys.modules})))\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = job.cold(run, *BY_NAME, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "IMPORTED"
    check(job, run, keras_files("functional"))


def test_special_rows_on_request(job, store, keras_files):
    run = log_file(store, keras_files("special").folder / "model.keras")
    assert job.run(run, "--include_oov", *BY_NAME) == 0
    (users,), (items,) = job.rows("user").values(), job.rows("item").values()
    assert {*users} - {*keras_files("special").ids("user")} == {"nothing", "[UNK]", "[UNK]:1", "[UNK]:2"}
    assert {*items} - {*keras_files("special").ids("item")} == {"0", "-1"}


# A job for each checksum; every place and size of pieces is in tests/unit/reading/test_damages.py.
@pytest.mark.parametrize("where", ["item", "vocabulary"])
def test_a_damaged_byte(job, store, keras_files, tmp_path, capsys, monkeypatch, where):
    monkeypatch.setattr("beam_pipeline.reading.pieces.PIECE_BYTES", 1000)
    path = Path(shutil.copy(keras_files("functional").folder / "model.keras", tmp_path))
    model = KerasFile(str(path), open_file)
    flip_keras(path, {side: model.tower(side, f"{side}_embedding") for side in ("user", "item")}, where)
    line = refused(job, capsys, log_file(store, path), *BY_NAME)
    if where == "vocabulary":
        assert "do not match their crc32; the file was damaged" in line
    else:
        assert "do not match the checkpoint's crc32; the file was damaged" in line


def test_a_list_that_was_not_stored(job, store, keras_files, capsys):
    line = refused(job, capsys, log_file(store, keras_files("lists").folder / "model.keras"))
    assert "are not in the file: a subclassed Keras model does not store a vocabulary given as a list" in line
