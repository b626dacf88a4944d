"""`.keras` files by real Keras, read without it; every vector compared with what Keras itself loads."""

import contextlib
import json
import random
import struct
import subprocess
import sys
import time
import zipfile
from datetime import date
from pathlib import Path

import pytest
from towers import read_tower

from beam_pipeline.errors import (
    ArtifactMissingError,
    ChecksumError,
    CorruptFileError,
    NotAModelError,
    PipelineError,
    TowerMissingError,
    UnsupportedModelError,
)
from beam_pipeline.files import open_file
from beam_pipeline.formats import encodings, open_artifact
from beam_pipeline.formats.keras import container, reader
from beam_pipeline.formats.keras.reader import KerasFile
from beam_pipeline.formats.saved_model.reader import SavedModel
from beam_pipeline.reading import pieces
from beam_pipeline.reading.pieces import cover
from beam_pipeline.reading.rows import read_piece
from beam_pipeline.reading.tally import tally
from beam_pipeline.training import Run, Training, by_name

BY_NAME = {"user": "user_embedding", "item": "item_embedding"}
BY_LAYER = {"user": "user_layer", "item": "item_layer"}
TOWERS = {
    "functional": BY_NAME,
    "special": BY_NAME,
    "adapted": BY_NAME,
    "nested": BY_LAYER,
    "sequential": {"user": "table"},
    "subclassed": BY_LAYER,
    "configured": BY_LAYER,
    "own": BY_LAYER,
}


def counted(reports, towers):
    """Returns the ids of each tower, once the reports are the whole of it."""
    run = Run("run", "", "", "", date(2026, 3, 1), "")
    return {tower: found.ids for (_, tower), found in tally(reports, [Training(run, "", by_name(towers))]).items()}


def path_of(model):
    return str(model.folder / "model.keras")


def towers_of(model, layers, **options):
    file = KerasFile(path_of(model), open_file, layers.values())
    return [file.tower(name, layer, **options) for name, layer in layers.items()]


# Pieces of a few rows, of the small models.
SIZES = [(name, size) for name in TOWERS for size in (16, 100, 1 << 20) if name != "functional" or size > 100]


@pytest.mark.parametrize(("name", "piece_bytes"), SIZES)
def test_every_vector_is_what_keras_says(keras_files, name, piece_bytes):
    model = keras_files(name)
    for tower in towers_of(model, TOWERS[name]):
        assert read_tower(tower, piece_bytes) == model.rows(tower.name)


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


@pytest.mark.parametrize(("name", "piece_bytes"), SIZES)
def test_every_byte_of_the_weights_is_read_and_adds_up(keras_files, name, piece_bytes):
    model = keras_files(name)
    towers = cover(towers_of(model, TOWERS[name]))
    reports = [
        read_piece("run", piece, t, open_file)[1] for t in towers for piece in pieces.cut(t, open_file, piece_bytes)
    ]
    expected = {tower.name: len(model.ids(tower.name)) for tower in towers}
    assert counted(reports, towers) == expected
    with zipfile.ZipFile(path_of(model)) as archive:
        assert sum(report.bytes for report in reports) == archive.getinfo("model.weights.h5").file_size


def test_one_tower_alone_and_two_on_the_same_matrix(keras_files):
    model = keras_files("special")
    for layers in ({"user": "user_embedding"}, {"one": "user_embedding", "two": "user_embedding"}):
        towers = cover(towers_of(model, layers))
        reports = [read_piece("run", piece, t, open_file)[1] for t in towers for piece in pieces.cut(t, open_file, 100)]
        assert counted(reports, towers) == dict.fromkeys(layers, 100)


# Which layer.


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


def test_an_embedding_of_a_subclassed_model(keras_files):
    with pytest.raises(UnsupportedModelError, match="does not say which lookup feeds it; put the two into one layer"):
        KerasFile(path_of(keras_files("own")), open_file).tower("item", "item_layer.table")


def test_a_quantized_embedding(keras_files):
    with pytest.raises(UnsupportedModelError, match=r"is quantized; save the model before quantize\(\)"):
        KerasFile(path_of(keras_files("quantized")), open_file).tower("user", "table")


# Where the model is.


def test_a_model_is_found_where_it_is_logged(models, keras_files, tmp_path):
    model = Path(path_of(keras_files("sequential")))
    for place in ("model.keras", "data/model.keras"):
        folder = tmp_path / str(len(place))
        (folder / place).parent.mkdir(parents=True)
        (folder / place).write_bytes(model.read_bytes())
        assert open_artifact(str(folder), open_file).path == str(folder / place)
        assert open_artifact(str(folder / place), open_file).path == str(folder / place)
    (tmp_path / "mlflow" / "data").mkdir(parents=True)
    (tmp_path / "mlflow" / "data" / "model").symlink_to(models("one").folder)
    for folder in (models("one").folder, tmp_path / "mlflow"):
        assert isinstance(open_artifact(str(folder), open_file), SavedModel)


def test_no_model(tmp_path):
    with pytest.raises(NotAModelError, match=r"does not hold a model \(none of saved_model.pb, .*--artifact_path"):
        open_artifact(str(tmp_path), open_file)
    with pytest.raises(NotAModelError, match=r"my.keras does not exist; name its folder or file with --artifact_path"):
        open_artifact(str(tmp_path / "my.keras"), open_file)
    with pytest.raises(ArtifactMissingError):
        KerasFile(str(tmp_path / "my.keras"), open_file)


@pytest.mark.parametrize("place", ["my.h5", "my.hdf5", "model.h5", "data/model.h5", "model.weights.h5"])
def test_an_hdf5_file_in_place_of_a_model(tmp_path, place):
    """As Keras 2 saves one when it is told to; named itself, or where Keras and MLflow put it in a folder."""
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_bytes(b"\x89HDF")
    named = tmp_path / place if place.startswith("my") else tmp_path
    with pytest.raises(
        UnsupportedModelError, match=rf"/{place} is an HDF5 file, .*as \.keras .* or as a SavedModel .*log it again"
    ):
        open_artifact(str(named), open_file)


# Files that are damaged, or made to harm.


def rezipped(model, path, change=lambda members: members, **options):
    """Writes the model's members again; `change` is given {name: bytes}."""
    with zipfile.ZipFile(path_of(model)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in change(members).items():
            archive.writestr(name, data)
    return str(path)


def with_config(change):
    def changed(members):
        config = json.loads(members["config.json"])
        change(config["config"]["layers"])
        return {**members, "config.json": json.dumps(config)}

    return changed


def entry_of(layers, kind):
    return next(entry for entry in layers if entry["class_name"] == kind)


@pytest.mark.parametrize("name", ["functional", "special", "subclassed"])
def test_a_file_that_was_zipped_again_is_the_same(keras_files, tmp_path, name):
    model = keras_files(name)
    path = rezipped(model, tmp_path / "again.keras")
    file = KerasFile(path, open_file, TOWERS[name].values())
    for side, layer in TOWERS[name].items():
        assert read_tower(file.tower(side, layer)) == model.rows(side)


def test_compressed_members(keras_files, tmp_path):
    path = rezipped(keras_files("sequential"), tmp_path / "x.keras", compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(UnsupportedModelError, match="is compressed or encrypted"):
        KerasFile(path, open_file)


def test_something_else_in_place_of_the_file(tmp_path):
    for content in (b"", b"<html>not found</html>", b"PK\x05\x06" + bytes(18)):
        (tmp_path / "x.keras").write_bytes(content)
        with pytest.raises(NotAModelError, match=r"no .keras file|has no config.json"):
            KerasFile(str(tmp_path / "x.keras"), open_file)


@pytest.mark.parametrize("missing", ["config.json", "model.weights.h5"])
def test_a_missing_member(keras_files, tmp_path, missing):
    def without(members):
        del members[missing]
        return members

    path = rezipped(keras_files("sequential"), tmp_path / "x.keras", without)
    with pytest.raises(NotAModelError, match=f"has no {missing}"):
        KerasFile(path, open_file)


def test_a_missing_vocabulary(keras_files, tmp_path):
    def without(members):
        return {name: data for name, data in members.items() if "vocabulary.txt" not in name}

    path = rezipped(keras_files("adapted"), tmp_path / "x.keras", without)
    with pytest.raises(UnsupportedModelError, match="has no ids: it was given none"):
        KerasFile(path, open_file).tower("user", "user_embedding")


def flip(path, member, at):
    """Flips a bit of a member's data; everything else stays, its CRC too."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(member)
    data = bytearray(Path(path).read_bytes())
    name, extra = struct.unpack_from("<HH", data, info.header_offset + 26)
    data[info.header_offset + 30 + name + extra + (at if at >= 0 else info.file_size + at)] ^= 1
    Path(path).write_bytes(data)


@pytest.mark.parametrize("at", [5, -10])
def test_a_damaged_config(keras_files, tmp_path, at):
    path = rezipped(keras_files("functional"), tmp_path / "x.keras")
    flip(path, "config.json", at)
    with pytest.raises(ChecksumError, match=r"config.json does not match its CRC-32"):
        KerasFile(path, open_file)


def test_a_damaged_vocabulary(keras_files, tmp_path):
    path = rezipped(keras_files("functional"), tmp_path / "x.keras")
    flip(path, "assets/layers/string_lookup_1/vocabulary.txt", -3)
    tower = KerasFile(path, open_file).tower("item", "item_embedding")
    with pytest.raises(ChecksumError, match="do not match their crc32"):
        list(pieces.cut(tower, open_file, 1000))


@pytest.mark.parametrize("part", ["matrix", "beside"])
def test_damaged_weights(keras_files, tmp_path, part):
    path = rezipped(keras_files("special"), tmp_path / "x.keras")
    file = KerasFile(path, open_file)
    at = file.tower("item", "item_embedding").matrix.offset - file._members["model.weights.h5"].span.start
    flip(path, "model.weights.h5", at + 9 if part == "matrix" else -1)
    towers = cover([file.tower(side, layer) for side, layer in BY_NAME.items()])
    reports = [read_piece("run", piece, t, open_file)[1] for t in towers for piece in pieces.cut(t, open_file, 1000)]
    with pytest.raises(ChecksumError, match="tower 'user', 'item' do not match the checkpoint's crc32;"):
        counted(reports, towers)


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


def test_an_embedding_behind_something_else(keras_files, tmp_path):
    def change(layers):
        entry_of(layers, "StringLookup")["class_name"] = "Hashing"

    path = rezipped(keras_files("functional"), tmp_path / "x.keras", with_config(change))
    with pytest.raises(UnsupportedModelError, match="is fed by Hashing 'user_lookup', not by a lookup"):
        KerasFile(path, open_file).tower("user", "user_embedding")


def test_a_config_of_another_model(keras_files, tmp_path):
    def change(layers):
        layers[:] = [entry for entry in layers if entry["config"]["name"] != "user_embedding"]

    path = rezipped(keras_files("functional"), tmp_path / "x.keras", with_config(change))
    with pytest.raises(CorruptFileError, match=r"is called 'user_embedding' in model.weights.h5, 'item_embedding' in"):
        KerasFile(path, open_file).tower("item", "item_embedding")


def test_a_config_that_is_too_large(keras_files, tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "_MAX_CONFIG", 5000)
    assert KerasFile(path_of(keras_files("sequential")), open_file)

    def change(layers):
        layers[0]["users"] = ["u" * 5000]

    path = rezipped(keras_files("sequential"), tmp_path / "x.keras", with_config(change))
    with pytest.raises(UnsupportedModelError, match="more than 5,000 bytes besides the vocabularies"):
        KerasFile(path, open_file)


@pytest.mark.parametrize(
    "text",
    [b"[" * 100_000, b'{"vocabulary": [', b'{"vocabulary": ["a" ', b"[]", b"{", b'{"config": {"layers": 3}}', b"1"],
)
def test_a_config_that_is_none(keras_files, tmp_path, text):
    path = rezipped(keras_files("sequential"), tmp_path / "x.keras", lambda m: {**m, "config.json": text})
    with pytest.raises(PipelineError):
        KerasFile(path, open_file).tower("user", "table")


@pytest.mark.parametrize("block", [7, 64, 1000, 5000])
def test_lists_are_found_wherever_blocks_end(keras_files, tmp_path, monkeypatch, block):
    """Vocabularies with everything that could be taken for the end of a list, and blocks that end anywhere."""
    names = ['a"]', "\\", '\\"vocabulary": [', "é😀", "[,]", *(f"id {i}" for i in range(200))]

    def change(layers):
        entry_of(layers, "StringLookup")["config"].update(vocabulary=names, vocabulary_size=len(names) + 1)
        entry_of(layers, "Embedding")["vocabulary"] = []

    path = rezipped(keras_files("sequential"), tmp_path / "x.keras", with_config(change))
    monkeypatch.setattr(reader, "_BLOCK", block)
    monkeypatch.setattr(reader, "_SLICE", max(3, block // 3))
    with open_file(path) as file:
        vocabulary = KerasFile(path, open_file).tower("user", "table").vocabulary
        assert encodings.first(file, vocabulary, 10_000)[0] == names


def test_a_directory_that_is_too_large(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "x.keras", "w") as archive:
        for i in range(2000):
            archive.writestr(f"{i}", b"")
    monkeypatch.setattr(container, "_MAX_DIRECTORY", 50_000)
    with pytest.raises(CorruptFileError, match="its directory is too large to be true"):
        KerasFile(str(tmp_path / "x.keras"), open_file)


def test_metadata_that_are_too_large(keras_files, monkeypatch):
    monkeypatch.setattr(container, "_MAX_METADATA", 2000)
    with pytest.raises(CorruptFileError, match=r"its model.weights.h5 is too large to be true"):
        KerasFile(path_of(keras_files("functional")), open_file)


def test_a_file_that_is_cut_short(keras_files, tmp_path):
    """The directory is at the end, so a cut file is no zip; one whose directory was moved has members beyond its end."""
    data = Path(path_of(keras_files("special"))).read_bytes()
    path = tmp_path / "x.keras"
    path.write_bytes(data[:-100])
    with pytest.raises(NotAModelError, match=r"no .keras file"):
        KerasFile(str(path), open_file)
    end = data.rindex(b"PK\x05\x06")
    start = struct.unpack_from("<I", data, end + 16)[0]
    path.write_bytes(data[:2000] + data[start:end] + data[end : end + 16] + struct.pack("<I", 2000) + b"\0\0")
    with pytest.raises(PipelineError, match=r"is not where the zip's directory says|are needed"):
        KerasFile(str(path), open_file)


def test_other_layouts_of_the_weights(keras_files, tmp_path):
    """The HDF5 part written again by h5py, as another version or somebody who means harm may have it."""
    script = (
        "import h5py, io, json, sys\n"
        "source = h5py.File(sys.argv[1])\n"
        "def put(**options):\n"
        "    del target['layers/embedding/vars/0']\n"
        "    target.create_dataset('layers/embedding/vars/0', **options)\n"
        "for number, (change, options) in enumerate(json.loads(sys.argv[2])):\n"
        "    with h5py.File(f'{sys.argv[1]}.{number}', 'w', **options) as target:\n"
        "        for key in source: source.copy(key, target)\n"
        "        data = target['layers/embedding/vars/0'][:]\n"
        "        exec(change)\n"
    )
    good = [("put(data=data)", options) for options in ({}, {"libver": "latest"}, {"userblock_size": 512})]
    bad = {
        "put(data=data, chunks=(2, 2))": "stored in chunks",
        "put(data=data, compression='gzip')": "stored in chunks",
        "put(data=data.astype('>f4'))": "values of type >f4",
        "put(data=data.astype('i4'))": "values of type <i4",
        "put(data=data[:, 0])": "has shape",
        "put(shape=(0, 4), dtype='f4')": "has shape",
        "put(shape=(1 << 40, 4), dtype='f4', external=[('/etc/passwd', 0, 1 << 44)])": "which has only",
        "put(shape=(4, 4), dtype='f4')": "which has only",  # never written: nowhere in the file
        "del target['layers/embedding/vars/0']; target['layers/embedding/vars/0'] = h5py.ExternalLink('x', '/y')": "parsed",
        "target['layers/loop'] = target['layers']; put(data=data, chunks=(2, 2))": "stored in chunks",
        "target['vars'].attrs['name'] = ['x'] * 2000": "cannot be parsed .an attribute of 2,000 values",
        "target['layers/embedding/vars/0'].attrs['x'] = ['x'] * 2000": "cannot be parsed .an attribute of 2,000 values",
    }
    model, weights = keras_files("sequential"), tmp_path / "weights"
    with zipfile.ZipFile(path_of(model)) as archive:
        weights.write_bytes(archive.read("model.weights.h5"))
    changes = json.dumps([*good, *[(change, {}) for change in bad]])
    done = subprocess.run([sys.executable, "-c", script, str(weights), changes], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr

    def read(number):
        changed = Path(f"{weights}.{number}").read_bytes()
        path = rezipped(model, tmp_path / "x.keras", lambda members: {**members, "model.weights.h5": changed})
        return read_tower(KerasFile(path, open_file).tower("user", "table"))

    for number in range(len(good)):
        assert read(number) == model.rows("user")
    for number, message in enumerate(bad.values(), len(good)):
        with pytest.raises(PipelineError, match=message):
            read(number)


@pytest.mark.parametrize("seed", range(8))
def test_any_damage_ends_in_an_error_of_ours(keras_files, tmp_path, seed):
    """Bytes changed at random, checksums of members mended: whatever comes of it, no crash and no other exception."""
    chance = random.Random(seed)
    model = keras_files(("special", "subclassed")[seed % 2])
    with zipfile.ZipFile(path_of(model)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    for _ in range(60):
        changed = {name: bytearray(data) for name, data in members.items()}
        for _ in range(chance.randint(1, 20)):
            data = changed[chance.choice(["model.weights.h5"] * 4 + ["config.json"])]
            data[chance.randrange(len(data))] = chance.choice([0, 1, 0x7F, 0xFF, chance.randrange(256)])
        path = tmp_path / "x.keras"
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in changed.items():
                archive.writestr(name, bytes(data))
        with contextlib.suppress(PipelineError):
            file = KerasFile(str(path), open_file, BY_LAYER.values())
            file.tower_layers()
            towers = [file.tower(side, layer) for side, layer in TOWERS[model.folder.name].items()]
            for tower in cover(towers):
                list(pieces.cut(tower, open_file, 1 << 20))


@pytest.mark.parametrize("seed", range(4))
def test_any_damage_to_the_zip_ends_in_an_error_of_ours(keras_files, tmp_path, seed):
    chance = random.Random(seed)
    data = Path(path_of(keras_files("subclassed"))).read_bytes()
    directory = data.index(b"PK\x01\x02")
    for _ in range(60):
        changed = bytearray(data)
        for _ in range(chance.randint(1, 4)):
            changed[chance.randrange(directory, len(data))] = chance.randrange(256)
        (tmp_path / "x.keras").write_bytes(changed)
        with contextlib.suppress(PipelineError):
            KerasFile(str(tmp_path / "x.keras"), open_file).tower("item", "item_layer")


def test_no_weights_are_read_to_find_them(keras_files):
    reads = []

    def watched(path):
        file = open_file(path)
        fetch = file._fetch
        file._fetch = lambda offset, length: (reads.append(length), fetch(offset, length))[1]
        return file

    KerasFile(path_of(keras_files("functional")), watched).tower("user", "user_embedding")
    # Read-ahead alone: a megabyte at a time.
    assert len(reads) < 6


# Files that mean harm; their checksums are right.


def refused(model, tmp_path, change, match, tower=("user", "table")):
    """Asserts that a changed file is refused, in little time."""
    path = rezipped(model, tmp_path / "x.keras", change)
    started = time.process_time()
    with pytest.raises(PipelineError, match=match) as refusal:
        KerasFile(path, open_file).tower(*tower)
    assert str(refusal.value).isprintable()
    assert time.process_time() - started < 10


def with_settings(**settings):
    return with_config(lambda layers: entry_of(layers, "StringLookup")["config"].update(settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"oov_token": "x" * 1_000_000, "num_oov_indices": 100_000}, "no text of up to 300 bytes"),  # 100 GB of names
        ({"oov_token": ["x"]}, "no text of up to 300 bytes"),
        ({"mask_token": "\ud800"}, "no text of up to 300 bytes"),
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


@pytest.mark.parametrize("levels", [250, 900, 980, 100_000])
def test_a_config_that_is_nested_too_deep(keras_files, tmp_path, levels):
    """Just below the depth at which `json` gives up, whatever recurses over it later would."""

    def deep(members):
        text = members["config.json"].replace(
            b'"class_name": "Embedding"', b'"class_name": ' + b"[" * levels + b"]" * levels
        )
        return {**members, "config.json": text}

    refused(keras_files("sequential"), tmp_path, deep, "nested more than 200 levels|is no JSON")


def test_a_number_of_too_many_digits(keras_files, tmp_path):
    def long(members):
        return {**members, "config.json": b'{"x": ' + b"9" * 5000 + b"," + members["config.json"][1:]}

    refused(keras_files("sequential"), tmp_path, long, "is no JSON .Exceeds the limit")


def test_a_million_vocabularies(keras_files, tmp_path):
    def many(members):
        lists = b"{" + b'"vocabulary": [],' * 400_000 + b'"x": 0}'
        return {**members, "config.json": b'{"x": ' + lists + b"," + members["config.json"][1:]}

    refused(keras_files("sequential"), tmp_path, many, "more than 10,000 vocabularies")


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


@pytest.mark.parametrize("name", ["x/" * 32_000 + "x", "x/" * 70 + "x", "y" * 600])
def test_a_vocabulary_that_lies_too_deep(keras_files, tmp_path, name):
    """The path of each folder around it is kept: a gigabyte, for a name of 64 KB."""
    change = lambda members: {**members, f"assets/{name}/vocabulary.txt": b""}  # noqa: E731 - as the others
    refused(keras_files("sequential"), tmp_path, change, "has an object .* of .* characters")


def test_structures_that_cost_more_than_their_bytes(keras_files, tmp_path):
    """HDF5 by h5py: groups inside of groups, links to the same thing again and again, names without end."""
    script = (
        "import h5py, json, sys\n"
        "for number, change in enumerate(json.loads(sys.argv[2])):\n"
        "    with h5py.File(f'{sys.argv[1]}.{number}', 'w', libver='latest') as target:\n"
        "        exec(change)\n"
    )
    changes = {
        "for _ in range(5000): target = target.create_group('g')": "has an object",
        "target['data'] = [[1.0]]\nfor i in range(40_000): target[f'vars/{i}'] = target['data']": "does not exist",
        "target['g/vars/0'] = [[1.0]]\nfor i in range(40_000): target[f'x/{i}'] = target['g']": "does not exist",
        "target.create_group('y' * 5000)": "has an object",
        "target.create_group('a\\nb/vars').attrs['name'] = 'n' * 60_000": "does not exist",
    }
    weights = tmp_path / "weights"
    command = [sys.executable, "-c", script, str(weights), json.dumps([*changes])]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    for number, message in enumerate(changes.values()):
        content = Path(f"{weights}.{number}").read_bytes()
        change = lambda members, content=content: {**members, "model.weights.h5": content}  # noqa: E731
        refused(keras_files("own"), tmp_path, change, message, ("user", "user_layer"))
