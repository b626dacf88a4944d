"""SavedModels whose calls alone say which lookup feeds which embedding: exported ones, and Functional ones of Keras 2."""

import pytest
from job import MARCH_1, refused
from models import made_by

from beam_pipeline.errors import TowerMissingError
from beam_pipeline.files import open_file
from beam_pipeline.formats.saved_model.reader import SavedModel
from beam_pipeline.reading import pieces


@pytest.fixture(scope="module")
def exported():
    return made_by("make_exported_models.py")


def asked(user, item):
    return f"--tower=user={user}", f"--tower=item={item}"


BY_NAME = asked("user_embedding", "item_embedding")


@pytest.mark.parametrize(
    ("names", "flags"),
    [
        # Two towers whose names say which is which need not be named. The last has, beside the ids' embedding, that of
        # another feature in one layer.
        (("keras3_functional", "keras2_functional", "keras2_saved", "keras3_named", "features"), ()),
        # Both towers of the last have the same ids, so they have to be named.
        (("keras3_functional", "keras2_functional", "keras2_saved", "one_lookup"), BY_NAME),
        (("keras2_named",), asked("user_layer", "item_layer")),
    ],
)
def test_every_row_is_what_the_artifact_answers(job, store, exported, monkeypatch, names, flags):
    monkeypatch.setattr(pieces, "PIECE_BYTES", 5000)
    job.publish_all(store, {name: exported(name) for name in names}, "--allow_dimension_change", *flags)


@pytest.mark.parametrize("name", ["keras3_unnamed", "keras2_unnamed"])
def test_layers_without_a_telling_name_are_listed_and_can_be_asked_for(job, store, exported, capsys, name):
    run = store.log(exported(name), name, MARCH_1)
    line = refused(job, capsys, run)
    layers = line.partition("layers that are towers: ")[2].partition(";")[0].split(", ")
    assert len(layers) == 2
    model = SavedModel(str(exported(name).folder), open_file)
    by_rows = {model.tower("any", layer).vocabulary.count: layer for layer in layers}
    assert job.run(run, *asked(*(by_rows[len(exported(name).ids(tower))] for tower in ("user", "item")))) == 0
    for tower in ("user", "item"):
        assert job.rows(tower) == {("2026-03-01", run): exported(name).rows(tower)}


def test_row_numbers_that_are_changed_on_the_way_are_no_pair(job, store, exported, capsys):
    line = refused(job, capsys, store.log(exported("shifted"), "shifted", MARCH_1))
    assert "layer 'user_layer' does not exist" in line
    assert "layers that are towers: none" in line
    model = SavedModel(str(exported("shifted").folder), open_file)
    with pytest.raises(TowerMissingError, match="no lookup holds the ids of the embedding"):
        model.tower("user", "variables.0")


def test_an_embedding_of_something_else_beside_a_lookup_is_refused(job, store, exported, capsys):
    line = refused(job, capsys, store.log(exported("hashed"), "hashed", MARCH_1))
    assert "layer 'user_layer' holds a lookup and an embedding that the model feeds from elsewhere" in line


def test_special_rows_have_names_only_in_keras_metadata(job, store, exported, capsys):
    run = store.log(exported("keras3_functional"), "exported", MARCH_1)
    line = refused(job, capsys, run, "--include_oov")
    assert "has no keras_metadata.pb, which alone names the rows before the ids" in line
    run = store.log(exported("keras2_saved"), "saved", MARCH_1)
    assert job.run(run, "--include_oov") == 0
    special = {"user": {"nothing", "[UNK]", "[UNK]:1", "[UNK]:2"}, "item": {"0", "-1"}}
    for tower in ("user", "item"):
        found = job.rows(tower)[("2026-03-01", run)]
        assert {*found} - {*exported("keras2_saved").ids(tower)} == special[tower]
