"""How towers go on after their embeddings: what the reader says against what the library answers, model by model."""

import json

import pytest
from models import SUPPORT, made_by

from beam_pipeline.errors import TowerMissingError, UnsupportedModelError
from beam_pipeline.files import open_file
from beam_pipeline.formats import open_artifact
from beam_pipeline.formats.model import Ending
from beam_pipeline.launch.options import DEFAULT_TOWERS
from beam_pipeline.launch.selection import discover

# The first test creates about fifty models, unless they are cached; beside other work that takes minutes.
pytestmark = pytest.mark.timeout(600)

ANSWERS = {"row": Ending.EMBEDDING, "scaled": Ending.SCALED, "other": Ending.GOES_ON}
UNTRACED = {"subclassed", "subclassed_dense_outside", "subclassed_dropout", "without_functions"}
"""Models of which the file does not say what they do; a Dense that lies in the tower shows all the same."""
SCALED_WHERE_COMPARED = {"cosine_in_the_call"}
CAUTIOUS = {"functional_own_layer"}
"""The code of a layer of one's own is not in a .keras file: it may do anything."""
DOT_PRODUCTS = {
    "plain", "dropout", "normalised", "temperature", "triplets", "two_tasks", "signatures", "functional",
    "functional_flat", "functional_product", "exported_functional", "exported_functional_product", "module",
}  # fmt: skip
MEETINGS = {
    "concatenated": "ConcatV2",
    "difference": "Sub",
    "multiplied_and_weighted": "Mul",
    "functional_concatenated": "ConcatV2",
    "functional_difference": "Sub",
    "functional_weighted": "Mul",
    "exported_functional_concatenated": "ConcatV2",
    "exported_functional_difference": "Sub",
    "exported_functional_weighted": "Mul",
}


REFUSED = {
    "one_hot": ("user_layer", "holds a lookup and a matrix that the model multiplies by"),
    "hashed_beside_a_city": (
        "user_layer",
        r"holds 2 embeddings \(user_layer.city\S*embeddings, user_layer.ids\S*embeddings\)",
    ),
    "words": ("item_layer", "looks up the words of a text: they are not ids"),
    "subclassed_words": ("item_layer", "looks up the words of a text: they are not ids"),
    "subclassed_one_hot": ("item_layer", r"holds 1 lookup\(s\) and 0 embedding\(s\)"),
}
"""Model → a layer that is no tower, and why."""


@pytest.fixture(scope="module")
def folder():
    return made_by("make_tails.py")("").folder


def names():
    """Names of the models, without the libraries that make them: CI's and a person's `-k` should see them."""
    import re

    script = (SUPPORT / "make_tails.py").read_text()
    found = re.findall(r'^    "(\w+)": (?:after_both|of_module|functional|subclassed)\(', script, re.MULTILINE)
    found += re.findall(r"^@(?:model|refused)\ndef (\w+)", script, re.MULTILINE)
    return sorted([*found, *(f"exported_{name}" for name in found if name.startswith("functional"))])


def opened(path):
    artifact = open_artifact(str(path), open_file, DEFAULT_TOWERS.values())
    return artifact, discover(artifact.tower_layers()) or DEFAULT_TOWERS


def test_no_model_is_left_out(folder):
    assert sorted(path.stem for path in folder.glob("*.json")) == names()


@pytest.mark.parametrize("name", sorted({*names()} - {"module_normalised_before", "same_ids", "shared", *REFUSED}))
def test_what_the_library_answers(folder, name):
    artifact, layers = opened(folder / name)
    answers = json.loads((folder / f"{name}.json").read_text())
    for tower, tail in artifact.tails(layers).items():
        expected = ANSWERS[answers[tower]]
        if name in UNTRACED:
            assert tail.ending == Ending.UNKNOWN
            assert tail.reason
        elif name in SCALED_WHERE_COMPARED:
            assert tail.ending == Ending.SCALED
        elif name in CAUTIOUS:
            assert tail.ending == Ending.GOES_ON
        else:
            assert tail.ending == expected, tail
        assert bool(tail.operations) is (tail.ending in (Ending.SCALED, Ending.GOES_ON))
        if name in DOT_PRODUCTS:
            assert (tail.meeting, tail.is_biased) == ("", False)
        assert tail.meeting.endswith(MEETINGS.get(name, ""))
        assert tail.is_biased is (name == "biased")


@pytest.mark.parametrize("name", REFUSED)
def test_layers_that_are_no_towers(folder, name):
    layer, reason = REFUSED[name]
    artifact, _ = opened(folder / name)
    assert layer not in artifact.tower_layers()
    with pytest.raises((TowerMissingError, UnsupportedModelError), match=reason):
        _ = artifact.tower("x", layer), artifact.tails({"x": layer})


def test_an_embedding_that_inputs_share_is_nobodys_vector(folder):
    artifact, _ = opened(folder / "shared")
    tail = artifact.tails({"item": "item_embedding"})["item"]
    assert (tail.ending, tail.reason) == (Ending.GOES_ON, "several inputs share the embedding")


def test_operations_are_named_with_their_layers(folder):
    artifact, layers = opened(folder / "dense_of_another_length")
    layer, _, operations = artifact.tails(layers)["user"].steps.partition(" ")
    assert layer.startswith("dense")
    assert operations.startswith("(MatMul, BiasAdd, Relu), dense")


def test_a_tower_alone(folder):
    for name in ("plain", "functional", "exported_functional", "module"):
        artifact, layers = opened(folder / name)
        for tower, layer in layers.items():
            assert artifact.tails({tower: layer})[tower].ending == Ending.EMBEDDING
    artifact, layers = opened(folder / "dense")
    assert artifact.tails({"user": layers["user"]})["user"].ending == Ending.GOES_ON


def test_rows_gathered_from_something_else_than_the_matrix_are_no_tower(folder):
    artifact, layers = opened(folder / "module_normalised_before")
    assert artifact.tower_layers() == ["item_vectors"]
    with pytest.raises(TowerMissingError):
        artifact.tails(layers)


def test_a_layer_that_was_named_has_to_be_there(folder):
    path = folder / "subclassed"
    # Of the two attributes Keras stores the name of one. A default name may be the other one; any other is a mistake.
    assert open_artifact(str(path), open_file, DEFAULT_TOWERS.values()).tower("user", "user_layer")
    with pytest.raises(TowerMissingError, match=r"'zzz' does not exist .* towers: item_layer, layers/sequential;"):
        open_artifact(str(path), open_file).tower("user", "zzz")


@pytest.mark.parametrize(
    ("layers", "towers"),
    [
        (["item_layer", "user_layer.city_embedding"], None),
        (["item_layer.title", "user_layer.city"], None),
        (["towers.user", "towers.item"], {"user": "towers.user", "item": "towers.item"}),
        (["layers/user_tower", "layers/item_tower"], {"user": "layers/user_tower", "item": "layers/item_tower"}),
    ],
)
def test_a_part_of_a_tower_is_not_taken_for_the_tower(layers, towers):
    assert discover(layers) == towers
