import json
import shutil

import numpy as np
import pytest
import towers
from wire_format import field, rewrite

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
from beam_pipeline.formats.saved_model.reader import SavedModel
from beam_pipeline.reading import pieces


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
        list(pieces.cut(tower, open_file, 1000))


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


# Artifacts that mean harm.


def rewritten(model, path, change, name="saved_model.pb"):
    """Changes the fields at a path of a model's file."""
    file = model.folder / name
    file.write_bytes(rewrite(file.read_bytes(), path, change))
    return SavedModel(str(model.folder), open_file)


@pytest.mark.parametrize("name", ["../saved_model.pb", "..", "a/../../x", "/etc/passwd", ""])
def test_a_vocabulary_file_outside_of_the_model(damaged, name):
    # MetaGraphDef.asset_file_def, AssetFileDef.filename
    model = rewritten(damaged("plain"), [2, 6, 2], lambda _: name.encode())
    with pytest.raises(CorruptFileError, match=r"its vocabulary file .* is not in the model"):
        model.tower("item", "item_layer")


def test_a_name_with_line_breaks_stays_in_its_line(damaged):
    model = rewritten(damaged("plain"), [2, 6, 2], lambda _: b"x\nerror: \x1b[2J\0")
    with pytest.raises(ArtifactMissingError) as missing:
        model.tower("item", "item_layer")
    assert str(missing.value).isprintable()


def test_a_first_row_before_the_matrix(damaged):
    def change(function):
        # NodeDef.attr of InitializeTableFromTextFileV2: "offset", AttrValue.i
        minus_one = field(1, b"offset") + field(2, field(3, (1 << 64) - 1))
        return rewrite(function, [3, 5], lambda entry: minus_one if b"offset" in entry else entry)

    model = rewritten(damaged("plain"), [2, 2, 2, 1], change)
    with pytest.raises(CorruptFileError, match="its first id has row -1"):
        model.tower("item", "item_layer")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_oov_indices": 10**12}, "has 1,000,000,000,000 out-of-vocabulary rows"),
        ({"num_oov_indices": -1}, "has -1 out-of-vocabulary rows"),
        ({"num_oov_indices": [1]}, "has no sensible number of out-of-vocabulary rows"),
        ({"num_oov_indices": True}, "has no sensible number of out-of-vocabulary rows"),
        ({"num_oov_indices": 10**4200}, "has no sensible number of out-of-vocabulary rows"),
        ({"oov_token": ["x"]}, "token that is not text of up to 300 bytes"),
        ({"oov_token": "x" * 301}, "token that is not text of up to 300 bytes"),
        ({"mask_token": "\ud800"}, "token that is not text of up to 300 bytes"),
        ({"mask_token": 10**4299}, "token that is not text of up to 300 bytes"),
        ({"x": "<9>"}, "no lookup's config"),
        ({"x": "<[>"}, "no lookup's config"),
    ],
)
def test_special_rows_that_are_none(damaged, settings, message):
    """`<9>` stands for a number of 5,000 digits and `<[>` for 100,000 brackets, at both of which Python gives up."""

    def change(text):
        content = json.loads(text)
        if content["class_name"] != "StringLookup":
            return text
        content["config"].update(settings)
        return json.dumps(content).replace('"<9>"', "9" * 5000).replace('"<[>"', "[" * 100_000).encode()

    model = rewritten(damaged("special"), [1, 5], change, "keras_metadata.pb")
    assert model.tower("user", "user_layer")  # Without the special rows nobody asks.
    with pytest.raises(CorruptFileError, match=message):
        model.tower("user", "user_layer", include_oov=True)


def test_millions_of_objects(damaged):
    """Two bytes each in the file, half a kilobyte in memory."""
    with pytest.raises(CorruptFileError, match="more than 1,000,000 objects"):
        rewritten(damaged("one"), [2, 7], lambda graph: graph + field(1, b"") * 1_100_000)


def objects(*nodes):
    """A SavedObjectGraph of (children by name, field of its kind)."""
    return b"".join(
        field(1, b"".join(field(1, field(1, child) + field(2, name.encode())) for name, child in children) + kind)
        for children, kind in nodes
    )


def test_objects_that_hold_each_other(damaged):
    """Two towers below 5,000 layers, one in the other: looked at from each, that is 12 million objects."""
    user_object, table = field(4, b""), field(10, b"")
    variable = field(7, field(1, 1) + field(2, field(2, field(1, 3)) * 2))
    depth = 5000
    last = [("a", depth + 1), ("b", depth + 2), ("c", depth + 3), ("d", depth + 4)]
    chain = [([("next", number + 1)], user_object) for number in range(depth)]
    graph = objects(*chain, (last, user_object), *[([], table)] * 2, *[([], variable)] * 2)
    model = rewritten(damaged("one"), [2, 7], lambda _: graph)
    with pytest.raises(CorruptFileError, match="its objects hold each other too often"):
        model.tower_layers()
    assert len(model._graph.path(depth + 1)) == depth + 1


def test_an_object_that_belongs_to_no_other(damaged):
    model = rewritten(damaged("one"), [2, 7], lambda _: objects(([], field(4, b"")), ([], field(10, b""))))
    with pytest.raises(CorruptFileError, match="object 1 belongs to no other"):
        model._graph.path(1)
