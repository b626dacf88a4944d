"""Mutated artifacts: the right rows, or one of the named errors; never another exception, and in little time and memory.

A seeded mutator damages files of real models, mends the checksums that would stop it early, and reads them as the
launcher and the workers do. More of it: BEAM_PIPELINE_MUTATIONS=20000 python -m pytest tests/test_fuzz.py
"""

import os
import random
import resource
import shutil
import time
from datetime import date

import google_crc32c
import pytest

from beam_pipeline.errors import PipelineError
from beam_pipeline.files import open_file
from beam_pipeline.formats import ids, open_artifact
from beam_pipeline.formats.artifact import cover
from beam_pipeline.runs import Run, Training
from beam_pipeline.transforms import read_piece, tally

MUTATIONS = int(os.environ.get("BEAM_PIPELINE_MUTATIONS", "400"))
SECONDS, MEGABYTES = 10, 300
EXTREMES = [0, 1, 0x7F, 0xFF, 1 << 31, (1 << 32) - 1, 1 << 63, (1 << 64) - 1]


def mutated(data, chance):
    """Returns bytes with one to three damages."""
    data = bytearray(data)
    for _ in range(chance.randint(1, 3)):
        at, length = chance.randrange(len(data)), chance.choice([1, 1, 2, 4, 8, 64, 1000])
        kind = chance.randrange(7)
        if kind == 0:
            data[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            data[at : at + length] = chance.randbytes(length)
        elif kind == 2:
            del data[at : at + length]
        elif kind == 3:
            data[at:at] = data[at : at + length]
        elif kind == 4:
            data[at : at + length] = bytes(length)
        elif kind == 5:
            data[at : at + 8] = chance.choice(EXTREMES).to_bytes(8, "little")
        else:
            number, varint = chance.choice(EXTREMES), bytearray()
            while number >= 0x80:
                varint.append(number & 0x7F | 0x80)
                number >>= 7
            data[at : at + 1] = varint + bytes([number])
        data = data or bytearray(b"\0")
    return bytes(data)


def mended(data):
    """Returns a checkpoint index whose first block matches its checksum again."""
    end = len(data) - 48
    for size in range(max(0, end - 60), max(0, end - 20)):  # where the data block ends, about
        if data[size : size + 1] == b"\0":
            crc = google_crc32c.value(data[: size + 1])
            masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
            return data[: size + 1] + masked.to_bytes(4, "little") + data[size + 5 :]
    return data


def read(path, layer="{}_layer"):
    """Returns {tower: {id: vector}} of a model, as launcher and workers read it."""
    artifact = open_artifact(str(path), open_file, [layer.format("user"), layer.format("item")])
    try:
        artifact.tower_layers()
        towers = cover([artifact.tower(name, layer.format(name)) for name in ("user", "item")])
    finally:
        artifact.close()
    rows, reports = {}, []
    for tower in towers:
        found = rows[tower.name] = []
        for piece in ids.cut(tower, open_file, 20_000):
            batch, report = read_piece("run", piece, tower, open_file)
            reports.append(report)
            if batch is not None:
                found += zip(batch.ids.to_pylist(), map(tuple, batch.vectors.tolist()), strict=True)
    run = Run("run", "", "", "", date(2026, 3, 1), "")
    tally(reports, [Training(run, "", towers)])
    return rows


def matrix_rows(path, layer):
    """Returns all rows of both matrices, those without ids too."""
    rows = set()
    artifact = open_artifact(str(path), open_file, [layer.format("user"), layer.format("item")])
    for name in ("user", "item"):
        matrix = artifact.tower(name, layer.format(name)).matrix
        with open_file(matrix.path) as file:
            vectors = matrix.decode(file.read(matrix.offset, matrix.rows * matrix.row_bytes))
        rows |= {*map(tuple, vectors.tolist())}
    artifact.close()
    return rows


def campaign(label, file, path, layer, count, mend=lambda data, _: data):
    """Damages a file of the model at `path` again and again, and reads the model."""
    original = file.read_bytes()
    right = matrix_rows(path, layer)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes = {"read": 0, "refused": 0}
    for seed in range(count):
        chance = random.Random(f"{label} {seed}")
        file.write_bytes(mend(mutated(original, chance), chance))
        begin = time.monotonic()
        try:
            rows = read(path, layer)
        except PipelineError as error:
            outcomes["refused"] += 1
            message = str(error)
        else:
            outcomes["read"] += 1
            message = ""
            # Neither ids nor graph of a SavedModel have a checksum, and the graph says which row is whose: other ids,
            # and rows that had none, are legal there.
            assert {vector for found in rows.values() for _, vector in found} <= right, seed
        assert "\n" not in message, seed
        assert time.monotonic() - begin < SECONDS, seed
    assert outcomes["refused"]
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < MEGABYTES


@pytest.mark.parametrize("name", ["plain", "special"])
@pytest.mark.parametrize(
    "file", ["saved_model.pb", "variables/variables.index", "variables/variables.data-00000-of-00001"]
)
def test_a_mutated_saved_model(models, tmp_path, name, file):
    folder = tmp_path / name
    shutil.copytree(models(name).folder, folder)

    def mend(data, chance):
        return mended(data) if file.endswith("index") and chance.random() < 0.8 else data

    campaign(f"{name} {file}", folder / file, folder, "{}_layer", MUTATIONS // 8, mend)


@pytest.mark.parametrize("name", ["functional", "adapted"])
def test_a_mutated_keras_file(keras3_models, tmp_path, name):
    file = tmp_path / "model.keras"
    shutil.copy(keras3_models(name).folder / "model.keras", file)
    campaign(name, file, file, "{}_embedding", MUTATIONS // 8)
