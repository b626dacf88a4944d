"""Where a model is, in a folder as MLflow logs it."""

from pathlib import Path

import pytest
from keras_zips import path_of

from beam_pipeline.errors import (
    ArtifactMissingError,
    NotAModelError,
    UnsupportedModelError,
)
from beam_pipeline.files import open_file
from beam_pipeline.formats import open_artifact
from beam_pipeline.formats.keras.reader import KerasFile
from beam_pipeline.formats.saved_model.reader import SavedModel


def test_a_model_is_found_where_it_is_logged(models, keras_files, tmp_path):
    model = Path(path_of(keras_files("sequential")))
    for place in ("model.keras", "data/model.keras"):
        folder = tmp_path / str(len(place))
        (folder / place).parent.mkdir(parents=True)
        (folder / place).write_bytes(model.read_bytes())
        assert open_artifact(str(folder), open_file).path == str(folder / place)
        assert open_artifact(str(folder / place), open_file).path == str(folder / place)
    (tmp_path / "mlflow" / "data").mkdir(parents=True)
    (tmp_path / "mlflow" / "data" / "model").symlink_to(models("one").folder)
    for folder in (models("one").folder, tmp_path / "mlflow"):
        assert isinstance(open_artifact(str(folder), open_file), SavedModel)


def test_no_model(tmp_path):
    with pytest.raises(NotAModelError, match=r"does not hold a model \(none of saved_model.pb, .*--artifact_path"):
        open_artifact(str(tmp_path), open_file)
    with pytest.raises(NotAModelError, match=r"my.keras does not exist; name its folder or file with --artifact_path"):
        open_artifact(str(tmp_path / "my.keras"), open_file)
    with pytest.raises(ArtifactMissingError):
        KerasFile(str(tmp_path / "my.keras"), open_file)


@pytest.mark.parametrize("place", ["my.h5", "my.hdf5", "model.h5", "data/model.h5", "model.weights.h5"])
def test_an_hdf5_file_in_place_of_a_model(tmp_path, place):
    """As Keras 2 saves one when it is told to; named itself, or where Keras and MLflow put it in a folder."""
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_bytes(b"\x89HDF")
    named = tmp_path / place if place.startswith("my") else tmp_path
    with pytest.raises(
        UnsupportedModelError, match=rf"/{place} is an HDF5 file, .*as \.keras .* or as a SavedModel .*log it again"
    ):
        open_artifact(str(named), open_file)
