import shutil

import numpy as np
import pytest
import towers

from beam_pipeline.errors import (
    ArtifactMissingError,
    BadIdError,
    ChecksumError,
    CorruptFileError,
    NotAModelError,
    PipelineError,
    TowerMissingError,
    TruncatedFileError,
)
from beam_pipeline.files import open_file
from beam_pipeline.formats import ids
from beam_pipeline.formats.saved_model import SavedModel


def read_tower(folder, name, piece_bytes=1 << 10, **options):
    return towers.read_tower(SavedModel(str(folder), open_file).tower(name, f"{name}_layer", **options), piece_bytes)


@pytest.mark.parametrize("name", ["plain", "special", "one", "float64"])
@pytest.mark.parametrize("tower", ["user", "item"])
def test_every_vector_is_what_keras_says(models, name, tower):
    assert read_tower(models(name).folder, tower) == models(name).rows(tower)


def test_rows_without_ids_are_left_out_but_read(models):
    found = read_tower(models("special").folder, "user")
    assert len(found) == 100
    assert "nothing" not in found


def test_out_of_vocabulary_rows_on_request(models):
    found = read_tower(models("special").folder, "user", include_oov=True)
    assert list(found)[:4] == ["nothing", "[UNK]", "[UNK]:1", "[UNK]:2"]
    assert len(found) == 104


@pytest.mark.parametrize("rows", [1, 2, 99, 100, 101, 1000])
@pytest.mark.parametrize("tower", ["user", "item"])
def test_pieces_of_any_size_hold_the_same(models, rows, tower):
    assert read_tower(models("special").folder, tower, piece_bytes=rows * 16) == models("special").rows(tower)


def test_a_missing_tower_is_answered_with_those_that_are(models):
    model = SavedModel(str(models("plain").folder), open_file)
    with pytest.raises(TowerMissingError, match=r"layer 'movie_layer' does not exist .*: item_layer, user_layer;"):
        model.tower("item", "movie_layer")
    with pytest.raises(TowerMissingError, match=r"holds 1 lookup\(s\) and 0 embedding\(s\)"):
        model.tower("item", "item_layer.layer-0")


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(NotAModelError, match=r"saved_model.pb does not exist; name its folder .* --artifact_path"):
        SavedModel(str(tmp_path), open_file)


def test_something_else_in_place_of_the_graph(damaged):
    model = damaged("plain")
    (model.folder / "saved_model.pb").write_bytes(b"<html>not found</html>")
    with pytest.raises(CorruptFileError, match=r"saved_model.pb"):
        SavedModel(str(model.folder), open_file)


def test_an_empty_graph(damaged):
    model = damaged("plain")
    (model.folder / "saved_model.pb").write_bytes(b"")
    with pytest.raises(CorruptFileError, match="holds no graph"):
        SavedModel(str(model.folder), open_file)


def test_a_missing_index(damaged):
    model = damaged("plain")
    (model.folder / "variables" / "variables.index").unlink()
    with pytest.raises(ArtifactMissingError, match=r"variables.index does not exist"):
        SavedModel(str(model.folder), open_file)


@pytest.mark.parametrize("at", [10, 100, -60, -5])
def test_a_corrupt_index(damaged, at):
    model = damaged("plain")
    path = model.folder / "variables" / "variables.index"
    data = bytearray(path.read_bytes())
    data[at] ^= 0x55
    path.write_bytes(data)
    with pytest.raises(PipelineError, match=r"variables.index"):
        SavedModel(str(model.folder), open_file)


def test_an_index_cut_short(damaged):
    model = damaged("plain")
    path = model.folder / "variables" / "variables.index"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CorruptFileError, match=r"variables.index is not a checkpoint index"):
        SavedModel(str(model.folder), open_file)


def test_truncated_weights_are_found_before_anything_is_written(damaged):
    model = damaged("plain")
    path = next((model.folder / "variables").glob("*.data-*"))
    path.write_bytes(path.read_bytes()[:50_000])
    # The objects' names lie at the end of the same file.
    with pytest.raises(TruncatedFileError, match=r"00000-of-00001 has 50,000 bytes, but .* are needed"):
        SavedModel(str(model.folder), open_file)


def test_damaged_object_names(damaged):
    model = damaged("plain")
    path = next((model.folder / "variables").glob("*.data-*"))
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ChecksumError, match=r"_CHECKPOINTABLE_OBJECT_GRAPH"):
        SavedModel(str(model.folder), open_file)


def test_a_missing_vocabulary_file(damaged):
    model = damaged("plain")
    shutil.rmtree(model.folder / "assets")
    with pytest.raises(ArtifactMissingError, match=r"assets/items.txt does not exist"):
        SavedModel(str(model.folder), open_file).tower("item", "item_layer")


def test_more_ids_than_rows(damaged):
    model = damaged("plain")
    path = model.folder / "assets" / "items.txt"
    path.write_bytes(path.read_bytes() + b"one more\nand another\n")
    tower = SavedModel(str(model.folder), open_file).tower("item", "item_layer")
    with pytest.raises(BadIdError, match=r"id 'one more' has row 2,015, but the matrix has only 2,015 rows"):
        list(ids.cut(tower, open_file, 1000))


def test_reading_takes_little_memory_and_no_weights(models):
    reads = []

    def watched(path):
        file = open_file(path)
        fetch = file._fetch
        file._fetch = lambda offset, length: (reads.append((path, length)), fetch(offset, length))[1]
        return file

    SavedModel(str(models("plain").folder), watched).tower("user", "user_layer")
    weights = sum(length for path, length in reads if ".data-" in path)
    assert weights < np.prod(models("plain").vectors("user").shape) * 4
