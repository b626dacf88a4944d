"""`.keras` files of the tests, and the same with changes."""

import json
import struct
import time
import zipfile
from pathlib import Path

import pytest

from beam_pipeline.errors import (
    PipelineError,
)
from beam_pipeline.files import open_file
from beam_pipeline.formats.keras.reader import KerasFile

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


def path_of(model):
    return str(model.folder / "model.keras")


def towers_of(model, layers, **options):
    file = KerasFile(path_of(model), open_file, layers.values())
    return [file.tower(name, layer, **options) for name, layer in layers.items()]


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


def flip(path, member, at):
    """Flips a bit of a member's data; everything else stays, its CRC too."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(member)
    data = bytearray(Path(path).read_bytes())
    name, extra = struct.unpack_from("<HH", data, info.header_offset + 26)
    data[info.header_offset + 30 + name + extra + (at if at >= 0 else info.file_size + at)] ^= 1
    Path(path).write_bytes(data)


def refused(model, tmp_path, change, match, tower=("user", "table")):
    """Asserts that a changed file is refused, in little time."""
    path = rezipped(model, tmp_path / "x.keras", change)
    started = time.process_time()
    with pytest.raises(PipelineError, match=match) as refusal:
        KerasFile(path, open_file).tower(*tower)
    assert str(refusal.value).isprintable()
    assert time.process_time() - started < 10
