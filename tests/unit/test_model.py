"""Reading models from Python, compared with what Keras and TensorFlow say is in them."""

import os
import pickle
import shutil

import numpy as np
import pyarrow as pa
import pytest

import beam_pipeline as bp
from beam_pipeline import model as model_module
from beam_pipeline.reading import unordered


def rows(ids, vectors):
    return dict(zip(ids.to_pylist(), vectors.tolist(), strict=True))


@pytest.mark.parametrize("name", ["plain", "special", "one", "float64"])
def test_read_returns_every_id_and_vector(models, name):
    with bp.open_model(models(name).folder) as model:
        assert sorted(model.layers) == ["item_layer", "user_layer"]
        for side in ("user", "item"):
            ids, vectors = model.tower(f"{side}_layer").read()
            assert ids.type == pa.string()
            assert vectors.dtype == np.dtype("float64" if name == "float64" else "float32")
            assert rows(ids, vectors) == models(name).rows(side)
            assert rows(ids, vectors.astype("float64")) == models(name).rows(side)


@pytest.mark.parametrize("name", ["integers", "learnt", "static", "mutable", "sharded", "bfloat"])
def test_vocabularies_in_any_order(tables, monkeypatch, name):
    monkeypatch.setattr(unordered, "PIECE_ENTRIES", 170)
    with bp.open_model(tables(name).folder) as model:
        for side in ("user", "item"):
            tower = model.tower(f"{side}_layer")
            assert rows(*tower.read()) == tables(name).rows(side)
            chunks = [*tower.chunks(size=2 * tower.description.matrix.row_bytes)]
            assert len(chunks) > 1
            together = [pa.concat_arrays([ids for ids, _ in chunks]), np.concatenate([each for _, each in chunks])]
            assert rows(*together) == tables(name).rows(side)


def test_a_keras_file_whose_checksum_covers_both_towers(keras_files):
    file = keras_files("functional").folder / "model.keras"
    with bp.open_model(file) as model:
        for side in ("user", "item"):
            assert rows(*model.tower(f"{side}_embedding").read()) == keras_files("functional").rows(side)


@pytest.mark.parametrize("count", [1, 4, 33, 99, 100, 101])
def test_chunks_of_any_size(models, count):
    with bp.open_model(models("special").folder) as model:
        tower = model.tower("user_layer")
    lengths = [len(ids) for ids, _ in tower.chunks(count * tower.description.matrix.row_bytes)]
    assert lengths == [count] * (100 // count) + [100 % count] * (100 % count > 0)


def test_special_rows_have_names(models):
    with bp.open_model(models("special").folder) as model:
        ids, _ = model.tower("user_layer", include_oov=True).read()
        plain, _ = model.tower("user_layer").read()
    assert ids.to_pylist() == ["nothing", "[UNK]", "[UNK]:1", "[UNK]:2", *plain.to_pylist()]


def test_a_tower_describes_itself_and_travels(models):
    with bp.open_model(f"{models('plain').folder}{os.sep}") as model:
        tower = model.tower("user_layer")
        towers = model.towers({"user": "user_layer", "item": "item_layer"})
    assert (tower.layer, tower.rows, tower.dimension, tower.is_served) == ("user_layer", 3016, 8, False)
    assert [each.is_served for each in towers.values()] == [True, True]
    again = pickle.loads(pickle.dumps(tower))
    assert again == tower
    assert rows(*again.read()) == models("plain").rows("user")


def test_a_damaged_file_is_an_error_after_the_last_chunk(damaged):
    model = damaged("plain")
    (data,) = model.folder.glob("variables/variables.data-*")
    with bp.open_model(model.folder) as opened:
        tower = opened.tower("user_layer")
        matrix = tower.description.matrix
    content = bytearray(data.read_bytes())
    content[matrix.offset + 100] ^= 1
    data.write_bytes(content)
    with pytest.raises(bp.errors.ChecksumError, match="do not match the checkpoint's crc32c"):
        tower.read()
    seen = []
    with pytest.raises(bp.errors.ChecksumError):
        seen.extend(tower.chunks(size=32_000))
    assert len(seen) == 4


def test_an_id_that_appears_twice(damaged):
    model = damaged("plain")
    file = model.folder / "assets" / "items.txt"
    file.write_bytes(file.read_bytes().replace(b"item 7\n", b"item 8\n"))
    with (
        bp.open_model(model.folder) as opened,
        pytest.raises(bp.errors.BadIdError, match=r"tower 'item_layer': id 'item 8' appears 2 times"),
    ):
        opened.tower("item_layer").read()


def test_errors_name_what_is_wrong(models, tmp_path):
    with pytest.raises(bp.errors.NotAModelError, match="does not hold a model"):
        bp.open_model(tmp_path)
    with bp.open_model(models("plain").folder) as model, pytest.raises(bp.PipelineError, match="no_layer"):
        model.tower("no_layer")


def test_ids_of_more_than_a_binary_array_holds_are_sorted_in_large_ones(tables):
    with bp.open_model(tables("static").folder) as model:
        _, ids = model_module._sorted_ids(model.tower("user_layer").description)
    assert ids.type == pa.large_binary()


def test_a_missing_file_is_named(models, tmp_path):
    shutil.copytree(models("one").folder, tmp_path / "one")
    with bp.open_model(tmp_path / "one") as model:
        tower = model.tower("user_layer")
    shutil.rmtree(tmp_path / "one")
    with pytest.raises(bp.errors.ArtifactMissingError, match="does not exist"):
        tower.read()
