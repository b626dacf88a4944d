"""Which layers of a `.keras` file are towers."""

import json
import time
import zipfile

import pytest
from keras_zips import entry_of, path_of, rezipped, with_config
from towers import read_tower

from beam_pipeline.errors import (
    CorruptFileError,
    TowerMissingError,
    UnsupportedModelError,
)
from beam_pipeline.files import open_file
from beam_pipeline.formats.keras.reader import KerasFile


@pytest.mark.parametrize(
    ("name", "towers"),
    [
        ("functional", ["item_embedding", "user_embedding"]),
        ("nested", ["item_layer", "user_layer"]),
        ("sequential", ["table"]),
        ("subclassed", ["item_layer", "layers/sequential"]),
        ("own", ["item_layer", "layers/tower"]),
    ],
)
def test_the_layers_that_are_towers(keras_files, name, towers):
    assert KerasFile(path_of(keras_files(name)), open_file).tower_layers() == towers
    file = KerasFile(path_of(keras_files(name)), open_file)
    for tower in towers:
        assert file.tower("any", tower).matrix.rows


def test_a_missing_tower_is_answered_with_those_that_are(keras_files):
    file = KerasFile(path_of(keras_files("functional")), open_file)
    with pytest.raises(
        TowerMissingError, match=r"layer 'user_layer' does not exist .* towers: item_embedding, user_embedding; choose"
    ):
        file.tower("user", "user_layer")
    with pytest.raises(TowerMissingError, match=r"layer 'user_lookup' holds 1 lookup\(s\) and 0 embedding\(s\)"):
        file.tower("user", "user_lookup")


def test_a_layer_inside_of_another(keras_files):
    model = keras_files("nested")
    with zipfile.ZipFile(path_of(model)) as archive:
        config = json.loads(archive.read("config.json"))
    inner = [entry for entry in config["config"]["layers"] if entry["config"]["name"] == "item_layer"]
    (embedding,) = [e["config"]["name"] for e in inner[0]["config"]["layers"] if e["class_name"] == "Embedding"]
    tower = KerasFile(path_of(model), open_file).tower("item", f"item_layer.{embedding}")
    assert read_tower(tower) == model.rows("item")


def test_an_attribute_whose_name_is_not_in_the_file_is_the_tower_that_is_left(keras_files):
    path = path_of(keras_files("subclassed"))
    # `user_layer` comes after "layers" in the alphabet: Keras has saved it as layers/sequential.
    asked = KerasFile(path, open_file, ["user_layer", "item_layer"])
    assert asked.tower("user", "user_layer").matrix == asked.tower("user", "layers/sequential").matrix
    for layers in (["user_layer"], ["user_layer", "movie_layer"], ["user_layer", "item_layer", "x_layer"], []):
        with pytest.raises(TowerMissingError, match="'user_layer' does not exist"):
            KerasFile(path, open_file, layers).tower("user", "user_layer")
    with pytest.raises(TowerMissingError, match="'a_layer' does not exist"):
        KerasFile(path, open_file, ["a_layer", "item_layer"]).tower("user", "a_layer")


def test_an_embedding_of_a_subclassed_model(keras_files):
    with pytest.raises(UnsupportedModelError, match="does not say which lookup feeds it; put the two into one layer"):
        KerasFile(path_of(keras_files("own")), open_file).tower("item", "item_layer.table")


def test_an_embedding_behind_something_else(keras_files, tmp_path):
    def change(layers):
        entry_of(layers, "StringLookup")["class_name"] = "Hashing"

    path = rezipped(keras_files("functional"), tmp_path / "x.keras", with_config(change))
    with pytest.raises(UnsupportedModelError, match="is fed by Hashing 'user_lookup', not by a lookup"):
        KerasFile(path, open_file).tower("user", "user_embedding")


def test_a_hundred_thousand_embeddings(keras_files, tmp_path):
    """Each is looked for among all others."""

    def many(layers):
        entry = {"class_name": "Embedding", "config": {"name": ""}, "inbound_nodes": [["x"]]}
        layers += [{**entry, "config": {"name": str(number)}} for number in range(60_000)]

    for name in ("sequential", "functional"):  # The one goes by order, the other by connections.
        path = rezipped(keras_files(name), tmp_path / "x.keras", with_config(many))
        started = time.process_time()
        assert KerasFile(path, open_file).tower_layers()
        assert time.process_time() - started < 10


def test_layers_that_share_all_others(keras_files, tmp_path):
    """A thousand layers, saved in one place, in which there is much."""

    def change(members):
        assets = {f"assets/layers/shared/{number}/vocabulary.txt": b"" for number in range(3000)}
        return with_config(
            lambda layers: layers.extend(
                {"class_name": "Shared", "config": {"name": str(number)}, "shared_object_id": 7}
                for number in range(1000)
            )
        )({**members, **assets})

    path = rezipped(keras_files("functional"), tmp_path / "x.keras", change)
    started = time.process_time()
    with pytest.raises(CorruptFileError, match="its layers share each other too often"):
        KerasFile(path, open_file).tower_layers()
    assert time.process_time() - started < 10
