"""The ids of lookups in `.keras` files, and rows that stand for none."""

import pytest
from keras_zips import TOWERS, entry_of, flip, path_of, refused, rezipped, towers_of, with_config
from towers import read_tower

from beam_pipeline.errors import (
    ChecksumError,
    CorruptFileError,
    PipelineError,
    UnsupportedModelError,
)
from beam_pipeline.files import open_file
from beam_pipeline.formats.keras.reader import KerasFile
from beam_pipeline.reading import pieces


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("special", {"user": ["nothing", "[UNK]", "[UNK]:1", "[UNK]:2"], "item": ["0", "-1"]}),
        ("adapted", {"user": ["0", "-1", "-1:1"], "item": ["[MASK]", "[UNK]"]}),
        ("subclassed", {"user": ["[UNK]"], "item": ["m", "[UNK]", "[UNK]:1"]}),
        ("configured", {"user": ["[UNK]"], "item": ["[UNK]", "[UNK]:1"]}),
    ],
)
def test_out_of_vocabulary_rows_on_request(keras_files, name, expected):
    for tower in towers_of(keras_files(name), TOWERS[name], include_oov=True):
        special = expected[tower.name]
        assert list(read_tower(tower)) == special + keras_files(name).ids(tower.name)


@pytest.mark.parametrize("name", ["lists", "arguments"])
@pytest.mark.parametrize("tower", ["user", "item"])
def test_a_list_that_was_not_stored(keras_files, name, tower):
    file = KerasFile(path_of(keras_files(name)), open_file, ["user_layer", "item_layer"])
    with pytest.raises(
        UnsupportedModelError,
        match=r"the ids of lookup '.*string_lookup' are not in the file: a subclassed Keras model does not store a "
        r"vocabulary given as a list; give it as a file .*, learn it with adapt\(\), or have get_config return the layer",
    ):
        file.tower(tower, f"{tower}_layer")


def test_a_missing_vocabulary(keras_files, tmp_path):
    def without(members):
        return {name: data for name, data in members.items() if "vocabulary.txt" not in name}

    path = rezipped(keras_files("adapted"), tmp_path / "x.keras", without)
    with pytest.raises(UnsupportedModelError, match="has no ids: it was given none"):
        KerasFile(path, open_file).tower("user", "user_embedding")


def test_a_damaged_vocabulary(keras_files, tmp_path):
    path = rezipped(keras_files("functional"), tmp_path / "x.keras")
    flip(path, "assets/layers/string_lookup_1/vocabulary.txt", -3)
    tower = KerasFile(path, open_file).tower("item", "item_embedding")
    with pytest.raises(ChecksumError, match="do not match their crc32"):
        list(pieces.cut(tower, open_file, 1000))


def test_ids_and_their_number_in_the_config(keras_files, tmp_path):
    def more(layers):
        entry_of(layers, "StringLookup")["config"]["vocabulary_size"] += 1

    path = rezipped(keras_files("sequential"), tmp_path / "x.keras", with_config(more))
    with pytest.raises(CorruptFileError, match=r"has 3 ids, its graph says 4"):
        list(pieces.cut(KerasFile(path, open_file).tower("user", "table"), open_file, 1000))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"invert": True}, "turn ids into row numbers"),
        ({"output_mode": "multi_hot"}, "turn ids into row numbers"),
        ({"num_oov_indices": 1 << 40}, "out-of-vocabulary rows"),
        ({"num_oov_indices": "1"}, "out-of-vocabulary rows"),
        ({"vocabulary": [{"class_name": "__bytes__", "config": {"value": "a"}}]}, "has ids of bytes"),
        ({"vocabulary": 17}, "has no ids"),
        ({"vocabulary": -1}, "has no ids"),
        ({"vocabulary": "/etc/passwd"}, "was given the file '/etc/passwd', which Keras < 3.12 does not store"),
    ],
)
def test_a_lookup_that_cannot_be_read(keras_files, tmp_path, settings, message):
    def change(layers):
        entry_of(layers, "StringLookup")["config"].update(settings)

    path = rezipped(keras_files("sequential"), tmp_path / "x.keras", with_config(change))
    with pytest.raises(PipelineError, match=message):
        KerasFile(path, open_file).tower("user", "table")


def with_settings(**settings):
    return with_config(lambda layers: entry_of(layers, "StringLookup")["config"].update(settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"oov_token": "x" * 1_000_000, "num_oov_indices": 100_000}, "not text of up to 300 bytes"),  # 100 GB of names
        ({"oov_token": ["x"]}, "not text of up to 300 bytes"),
        ({"mask_token": "\ud800"}, "not text of up to 300 bytes"),
        ({"vocabulary_size": 10**4299}, None),
        ({"vocabulary_size": -(1 << 70)}, None),
        ({"num_oov_indices": 10**4200}, "no sensible number of out-of-vocabulary rows"),
        ({"vocabulary": "a\nb"}, "was given the file"),
    ],
)
def test_settings_that_cost_more_than_their_bytes(keras_files, tmp_path, settings, message):
    if message:
        refused(keras_files("sequential"), tmp_path, with_settings(**settings), message)
    else:
        path = rezipped(keras_files("sequential"), tmp_path / "x.keras", with_settings(**settings))
        assert KerasFile(path, open_file).tower("user", "table").vocabulary.count is None
