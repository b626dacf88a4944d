"""Damaged weights, values and ids of a real model, read and added up without a pipeline; jobs are in end_to_end."""

import re
import shutil
from datetime import date
from pathlib import Path

import pytest
from damage import flip, flip_keras, overwrite_vector, rewrite_items

from beam_pipeline.errors import BadIdError, BadVectorError, ChecksumError, PipelineError
from beam_pipeline.files import open_file
from beam_pipeline.formats.keras.reader import KerasFile
from beam_pipeline.formats.saved_model.reader import SavedModel
from beam_pipeline.reading import pieces
from beam_pipeline.reading.rows import read_piece
from beam_pipeline.reading.tally import tally
from beam_pipeline.training import Run, Training, by_name

PIECE_BYTES = [16 << 20, 1000]


def audit(model, piece_bytes):
    """Reads both towers, piece by piece, and adds up the reports."""
    artifact = SavedModel(str(model.folder), open_file)
    return audit_towers([artifact.tower(name, f"{name}_layer") for name in ("user", "item")], piece_bytes)


def audit_towers(towers, piece_bytes):
    reports = [
        read_piece("run", piece, tower, open_file)[1]
        for tower in towers
        for piece in pieces.cut(tower, open_file, piece_bytes)
    ]
    return tally(reports, [Training(Run("run", "", "", "", date(2026, 3, 1), ""), "", by_name(towers))])


@pytest.mark.parametrize("piece_bytes", PIECE_BYTES)
def test_an_undamaged_model(models, piece_bytes):
    found = audit(models("plain"), piece_bytes)
    assert {name: one.ids for (_, name), one in found.items()} == {"user": 3015, "item": 2014}


@pytest.mark.parametrize("at", [0, 5_000, 60_000, 160_000])
@pytest.mark.parametrize("piece_bytes", PIECE_BYTES)
def test_weights_that_do_not_match_their_checksum(damaged, at, piece_bytes):
    model = damaged("plain")
    flip(model, at)
    with pytest.raises(ChecksumError, match="do not match the checkpoint's crc32c"):
        audit(model, piece_bytes)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("piece_bytes", PIECE_BYTES)
def test_a_value_that_is_not_finite(damaged, value, piece_bytes):
    model = damaged("plain")
    overwrite_vector(model, 8, value)
    with pytest.raises(
        BadVectorError, match=r"tower 'item': the vector of id 'item 7' \(row 8\) holds NaN or infinity"
    ):
        audit(model, piece_bytes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda ids: [*ids, b"one more"], "id 'one more' has row 2,015, but the matrix has only 2,015 rows"),
        (lambda ids: [*ids[:9], b"", *ids[10:]], "the id of row 10 is empty"),
        (lambda ids: [*ids[:9], b"\xff\xfe", *ids[10:]], "id '\\\\xff\\\\xfe' (row 10) is not UTF-8"),
    ],
)
def test_bad_ids(damaged, change, words):
    """Ids that appear twice are BigQuery's to find: test_refusals.py."""
    model = damaged("plain")
    rewrite_items(model, change)
    with pytest.raises(BadIdError, match=re.escape(f"tower 'item': {words}")):
        audit(model, 16 << 20)


@pytest.mark.parametrize("where", ["user", "item", "beside", "vocabulary"])
@pytest.mark.parametrize("piece_bytes", PIECE_BYTES)
def test_a_damaged_byte_of_a_keras_file(keras_files, tmp_path, where, piece_bytes):
    path = Path(shutil.copy(keras_files("functional").folder / "model.keras", tmp_path))
    artifact = KerasFile(str(path), open_file)
    towers = {side: artifact.tower(side, f"{side}_embedding") for side in ("user", "item")}
    flip_keras(path, towers, where)
    checked = "their crc32" if where == "vocabulary" else "the checkpoint's crc32"
    with pytest.raises(PipelineError, match=f"do not match {checked}; the file was damaged"):
        audit_towers(pieces.cover([*towers.values()]), piece_bytes)
