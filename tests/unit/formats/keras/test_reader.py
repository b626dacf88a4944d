"""`.keras` files by real Keras, read without it; every vector compared with what Keras itself loads."""

import contextlib
import random
import zipfile
from datetime import date
from pathlib import Path

import pytest
from keras_zips import BY_LAYER, BY_NAME, TOWERS, flip, path_of, rezipped, towers_of, with_config
from towers import read_tower

from beam_pipeline import files
from beam_pipeline.errors import (
    ChecksumError,
    CorruptFileError,
    NotAModelError,
    PipelineError,
    UnsupportedModelError,
)
from beam_pipeline.files import open_file
from beam_pipeline.formats.keras.reader import KerasFile
from beam_pipeline.reading import pieces
from beam_pipeline.reading.pieces import cover
from beam_pipeline.reading.rows import read_piece
from beam_pipeline.reading.tally import tally
from beam_pipeline.training import Run, Training, by_name


def counted(reports, towers):
    """Returns the ids of each tower, once the reports are the whole of it."""
    run = Run("run", "", "", "", date(2026, 3, 1), "")
    return {tower: found.ids for (_, tower), found in tally(reports, [Training(run, "", by_name(towers))]).items()}


# Pieces of a few rows, of the small models.
SIZES = [(name, size) for name in TOWERS for size in (16, 100, 1 << 20) if name != "functional" or size > 100]


@pytest.mark.parametrize(("name", "piece_bytes"), SIZES)
def test_every_vector_is_what_keras_says(keras_files, name, piece_bytes):
    model = keras_files(name)
    for tower in towers_of(model, TOWERS[name]):
        assert read_tower(tower, piece_bytes) == model.rows(tower.name)


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


def test_a_quantized_embedding(keras_files):
    with pytest.raises(UnsupportedModelError, match=r"is quantized; save the model before quantize\(\)"):
        KerasFile(path_of(keras_files("quantized")), open_file).tower("user", "table")


@pytest.mark.parametrize("name", ["functional", "special", "subclassed"])
def test_a_file_that_was_zipped_again_is_the_same(keras_files, tmp_path, name):
    model = keras_files(name)
    path = rezipped(model, tmp_path / "again.keras")
    file = KerasFile(path, open_file, TOWERS[name].values())
    for side, layer in TOWERS[name].items():
        assert read_tower(file.tower(side, layer)) == model.rows(side)


@pytest.mark.parametrize("missing", ["config.json", "model.weights.h5"])
def test_a_missing_member(keras_files, tmp_path, missing):
    def without(members):
        del members[missing]
        return members

    path = rezipped(keras_files("sequential"), tmp_path / "x.keras", without)
    with pytest.raises(NotAModelError, match=f"has no {missing}"):
        KerasFile(path, open_file)


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


def test_a_config_of_another_model(keras_files, tmp_path):
    def change(layers):
        layers[:] = [entry for entry in layers if entry["config"]["name"] != "user_embedding"]

    path = rezipped(keras_files("functional"), tmp_path / "x.keras", with_config(change))
    with pytest.raises(CorruptFileError, match=r"is called 'user_embedding' in model.weights.h5, 'item_embedding' in"):
        KerasFile(path, open_file).tower("item", "item_embedding")


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


def test_no_weights_are_read_to_find_them(keras_files, monkeypatch):
    monkeypatch.setattr(files, "_MOST_AHEAD", 1)  # Reading ahead would cover this small file.
    reads = []

    def watched(path):
        file = open_file(path)
        fetch = file._fetch
        file._fetch = lambda offset, length: (reads.append((offset, offset + length)), fetch(offset, length))[1]
        return file

    path = path_of(keras_files("functional"))
    matrix = KerasFile(path, watched).tower("user", "user_embedding").matrix
    inside = sum(max(0, min(end, matrix.span.end) - max(start, matrix.span.start)) for start, end in reads)
    # Pages in which its ends lie, and what the file has between its chunks.
    assert inside < matrix.size / 2
