"""Embeddings without a lookup: their matrices, where their towers go on, and what is said of their ids."""

import numpy as np
import pytest
from models import made_by

from beam_pipeline.errors import TowerMissingError, UnsupportedModelError
from beam_pipeline.files import open_file
from beam_pipeline.formats import open_artifact
from beam_pipeline.formats.model import Ending

BY_NAME = {"user": "user_embedding", "item": "item_embedding"}
LAYERS = {
    **{f"{saver}_{kind}": BY_NAME for saver in ("keras3", "keras2", "exported", "saved") for kind in ("functional", "deep")},
    "saved_subclassed": {"user": "user_embedding", "item": "item_tower"},
    "keras3_subclassed": {"user": "layers/embedding", "item": "item_tower"},
    "module": {"user": "user", "item": "item"},
}  # fmt: skip


@pytest.fixture(scope="module")
def label_encoded():
    return made_by("make_label_encoded.py")


@pytest.fixture
def opened(label_encoded, request):
    with_layers = request.param
    artifact = open_artifact(str(label_encoded(with_layers).folder), open_file, ())
    yield with_layers, artifact
    artifact.close()


@pytest.mark.parametrize("opened", LAYERS, indirect=True)
def test_rows_are_the_librarys(opened, label_encoded):
    name, artifact = opened
    assert artifact.tower_layers() == []
    for tower, layer in LAYERS[name].items():
        matrix = artifact.matrix(tower, layer)
        with open_file(matrix.path) as file:
            vectors = matrix.decode(file.read(matrix.offset, matrix.size))
        assert np.array_equal(vectors, label_encoded(name).vectors(tower))


@pytest.mark.parametrize("opened", LAYERS, indirect=True)
def test_where_towers_go_on(opened):
    name, artifact = opened
    tails = artifact.tails(LAYERS[name], {*LAYERS[name]})
    expected = Ending.GOES_ON if name.endswith("deep") else Ending.EMBEDDING
    if name == "keras3_subclassed":  # Its code is not in the file.
        expected = Ending.UNKNOWN
    assert {tail.ending for tail in tails.values()} == {expected}


@pytest.mark.parametrize(
    "opened", ["keras3_functional", "saved_functional", "exported_functional", "module"], indirect=True
)
def test_missing_ids_are_said_with_the_remedy(opened):
    name, artifact = opened
    assert artifact.embeddings_without_ids() == sorted(LAYERS[name].values())
    with pytest.raises((TowerMissingError, UnsupportedModelError), match=r"ids .*--ids \w+=PATH .*--ids \w+=rows"):
        artifact.tower("user", LAYERS[name]["user"])
    with pytest.raises(
        TowerMissingError, match=r"does not exist.*embeddings without ids: item\w*, user\w* \(name their"
    ):
        artifact.tower("user", "user_layer")
    with pytest.raises(TowerMissingError, match="embeddings without ids: item"):
        artifact.matrix("user", "user_layer")


def test_ids_of_an_embedding_that_has_a_lookup(models, keras_files):
    for folder, layer in (
        (models("plain").folder, "user_layer"),
        (keras_files("functional").folder, "user_embedding"),
    ):
        artifact = open_artifact(str(folder), open_file, ())
        layer = layer if layer in artifact.tower_layers() else artifact.tower_layers()[0]
        with pytest.raises(TowerMissingError, match=r"has a lookup that holds its ids; leave out --ids user=…"):
            artifact.matrix("user", layer)
        artifact.close()
