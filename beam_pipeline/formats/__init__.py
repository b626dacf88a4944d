"""Readers of model artifacts: which towers, which ids in which rows, where the bytes are. No Beam, no TensorFlow."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

from beam_pipeline.errors import ArtifactMissingError, NotAModelError, UnsupportedModelError
from beam_pipeline.files import OpenFile, join
from beam_pipeline.formats.keras.reader import KerasFile
from beam_pipeline.formats.model import Artifact
from beam_pipeline.formats.saved_model.reader import SavedModel

_PLACES = ("saved_model.pb", "data/model.keras", "data/model/saved_model.pb", "model.keras")
"""Where a model is in a folder: as the trainer logs it, as `mlflow.tensorflow.log_model` does, as a single file."""


_HDF5 = (".h5", ".hdf5")
# Where Keras or MLflow put one instead.
_HDF5_PLACES = ("data/model.h5", "model.h5", "model.weights.h5")


def is_hdf5(path: str) -> bool:
    """Returns whether a file is an HDF5 file of Keras, by its name."""
    return path.endswith(_HDF5)


def refuse_hdf5(path: str) -> UnsupportedModelError:
    """Returns the error for an HDF5 file, of a model or of weights alone."""
    return UnsupportedModelError(
        f"{path} is an HDF5 file, which cannot be read: save the model as .keras (model.save('model.keras')) or as a "
        "SavedModel (model.export('model')), and log it again"
    )


def open_artifact(folder: str, open_file: OpenFile, layers: Iterable[str] = ()) -> Artifact:
    """Opens the model in a folder, or a `.keras` file itself.

    Args:
        folder: local or `gs://`.
        open_file: opens files in it.
        layers: all layers that will be asked for as towers.

    Raises:
        NotAModelError: there is no model.
        UnsupportedModelError: it is in a form that cannot be read.
        CorruptFileError: a file contradicts its format.
    """
    path = model_path(folder, open_file)
    return KerasFile(path, open_file, layers) if path.endswith(".keras") else SavedModel(path, open_file)


def model_path(folder: str, open_file: OpenFile) -> str:
    """Returns the path of the SavedModel, or of the `.keras` file, in a folder.

    Args:
        folder: local or `gs://`, or a `.keras` file itself.
        open_file: opens files in it.

    Raises:
        NotAModelError: there is none.
        UnsupportedModelError: it is in a form that cannot be read.
    """
    if folder.endswith(".keras"):
        try:
            open_file(folder).close()
        except ArtifactMissingError as error:
            raise NotAModelError(f"no model: {error}; name its folder or file with --artifact_path") from error
        return folder
    if is_hdf5(folder):
        raise refuse_hdf5(folder)
    reasons = []
    for place in _PLACES:
        path = join(folder, place)
        try:
            open_file(path).close()
        except ArtifactMissingError as error:
            reasons.append(str(error))
            continue
        return path.removesuffix("/saved_model.pb")
    for place in _HDF5_PLACES:
        with contextlib.suppress(ArtifactMissingError):
            open_file(join(folder, place)).close()
            raise refuse_hdf5(join(folder, place))
    raise NotAModelError(
        f"{folder} does not hold a model (none of {', '.join(_PLACES)}): {reasons[0]}; name its folder, or its .keras "
        "file, inside the run with --artifact_path"
    )
