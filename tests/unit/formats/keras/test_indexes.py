"""Search indexes in `.keras` files of the real libraries, against what these answer once they loaded them."""

import zipfile

import pytest
from keras_zips import flip, path_of, rezipped
from models import made_by
from towers import read_tower

from beam_pipeline.errors import ChecksumError, CorruptFileError, TowerMissingError, UnsupportedModelError
from beam_pipeline.files import open_file
from beam_pipeline.formats.keras.reader import KerasFile
from beam_pipeline.formats.model import Ending
from beam_pipeline.launch.inspection import describe
from beam_pipeline.launch.selection import discover
from beam_pipeline.model import open_model

NAMES = {
    "tfrs": ("query_model", "candidates"),
    "tfrs_integers": ("query_model", "candidates"),
    "tfrs_functional": ("sequential", "brute_force"),
    "tfrs_beside": ("layers/sequential", "layers/brute_force"),
    "keras_rs": ("sequential", "brute_force_retrieval"),
    "keras_rs_beside": ("layers/sequential", "item_index"),
}


@pytest.fixture(scope="module")
def indexes():
    return made_by("make_keras_indexes.py")


@pytest.fixture
def opened(indexes):
    files = []

    def open_saved(name):
        files.append(KerasFile(path_of(indexes(name)), open_file))
        return files[-1]

    yield open_saved
    for file in files:
        file.close()


def found(file):
    return discover([*file.tower_layers(), *file.embeddings_without_ids()], file.index_layers())


@pytest.mark.parametrize("name", NAMES)
def test_an_index_holds_what_the_library_loads(indexes, opened, name):
    file = opened(name)
    layers = found(file)
    # Names of layers that Keras chose end with a number.
    assert all(layer.startswith(begin) for layer, begin in zip(layers.values(), NAMES[name], strict=True))
    assert file.tower_layers() == sorted(layers.values())
    assert file.index_layers() == [layers["item"]]
    tower = file.tower("item", layers["item"])
    assert tower.vector_source == "index"
    assert read_tower(tower, 100) == indexes(name).rows("item")
    assert read_tower(file.tower("user", layers["user"])).items() >= indexes(name).rows("user").items()
    tails = file.tails(layers)
    assert tails["item"].ending == Ending.EMBEDDING
    is_subclassed = name not in ("tfrs_functional", "keras_rs")
    assert tails["user"].ending == (Ending.UNKNOWN if is_subclassed else Ending.EMBEDDING)
    assert "beside its towers" not in tails["user"].reason
    for side, layer in layers.items():  # Each by itself.
        assert file.tails({side: layer})[side].ending == tails[side].ending


def test_strings_of_several_collections(indexes, opened):
    file = opened("tfrs_many")
    tower = file.tower("item", "candidates")
    assert read_tower(tower, 1000) == indexes("tfrs_many").rows("item")
    assert file.tower("item", "candidates").matrix == tower.matrix


def test_a_query_tower_that_goes_on(opened):
    file = opened("keras_rs_dense")
    tail = file.tails(found(file))["user"]
    assert (tail.ending, tail.operations[0][1]) == (Ending.GOES_ON, "Dense")


def test_an_index_without_ids_needs_them(opened):
    file = opened("keras_rs_without_ids")
    (layer,) = file.embeddings_without_ids()
    assert layer not in file.tower_layers()
    assert found(file)["item"] == layer
    with pytest.raises(TowerMissingError, match=r"has vectors, and no ids; name them with --ids item=PATH .*=rows"):
        file.tower("item", layer)
    assert file.matrix("item", layer).rows == 20
    assert file.tails({"item": layer}, ["item"])["item"].ending == Ending.EMBEDDING


def test_an_index_with_ids_needs_no_others(opened):
    file = opened("tfrs")
    with pytest.raises(TowerMissingError, match=r"index 'candidates' in .* has ids of its own; leave out --ids item="):
        file.matrix("item", "candidates")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("scann", "does not hold what ScaNN searches; save a BruteForce index beside it, or the model with tf"),
        ("empty", "give it its candidates"),
    ],
)
def test_an_index_without_vectors_is_refused(opened, name, problem):
    file = opened(name)
    (layer,) = file.index_layers()
    with pytest.raises(UnsupportedModelError, match=problem):
        file.tower("item", layer)


def test_a_layer_of_ones_own_is_an_index_if_a_person_says_so(indexes, opened):
    file = opened("own")
    assert file.index_layers() == []
    assert [layer.rstrip("_0123456789") for layer in file.tower_layers()] == ["sequential"]
    (layer,) = (index.name for index in file._indexes.values())
    tower = file.tower("item", layer)
    assert read_tower(tower) == indexes("keras_rs").rows("item")
    tail = file.tails({"item": layer})["item"]
    assert (tail.ending, tail.reason) == (Ending.UNKNOWN, "the code of the index's call is not in the file")


def test_inspection_shows_an_index(indexes, opened):
    path = path_of(indexes("tfrs"))
    lines = list(describe(opened("tfrs"), path.removesuffix("/model.keras"), open_file, {}))
    at = lines.index("layer       candidates")
    assert lines[at + 1] == "  index     20 rows × 8 float32, 640 bytes in model.keras"
    assert lines[at + 2] == "  ids       20, 320 bytes in model.keras"
    assert lines[at + 3] == "  such as   'ítem 0 ü', 'item-1', 'item-2', …"
    assert lines[at + 5] == "  then      ends at the embedding"


def weights(indexes, name):
    with zipfile.ZipFile(path_of(indexes(name))) as archive:
        return archive.read("model.weights.h5")


@pytest.mark.parametrize("text", [b"item-7", b"user-7"])
def test_damaged_ids_are_found_by_the_files_checksum(indexes, tmp_path, text):
    """Ids of an index are in the file whose checksum covers its vectors; those of a lookup have one of their own."""
    path = rezipped(indexes("tfrs"), tmp_path / "model.keras")
    is_index = text.startswith(b"item")
    member = "model.weights.h5" if is_index else "assets/query_model/layers/string_lookup/vocabulary.txt"
    with zipfile.ZipFile(path) as archive:
        at = archive.read(member).index(text)
    flip(path, member, at + 5)
    with open_model(path) as model, pytest.raises(ChecksumError, match="crc32"):
        model.tower("candidates" if is_index else "query_model").read()


def test_ids_and_vectors_of_different_number(indexes, tmp_path):
    """The file says 20 vectors and 19 ids: the number of ids is in the data space of their dataset, as 8 bytes, twice."""

    def change(members):
        data = members["model.weights.h5"]
        # Version 1, one dimension, a maximum, 5 reserved bytes; then the size and the largest size.
        space = bytes([1, 1, 1, 0, 0, 0, 0, 0]) + (20).to_bytes(8, "little") * 2
        assert data.count(space) == 1
        return {**members, "model.weights.h5": data.replace(space, space[:8] + (19).to_bytes(8, "little") * 2)}

    path = rezipped(indexes("tfrs"), tmp_path / "model.keras", change)
    file = KerasFile(path, open_file)
    with pytest.raises(CorruptFileError, match="the ids of index 'candidates' are 19, and its vectors 20"):
        file.tower("item", "candidates")
