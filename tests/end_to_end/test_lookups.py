"""Lookups of integers, learnt ones, and vocabularies that are not in row order, each compared with TensorFlow's answer."""

import shutil
from pathlib import Path

import pytest
from job import MARCH_1, refused
from models import Model

from beam_pipeline.errors import UnsupportedModelError
from beam_pipeline.files import open_file
from beam_pipeline.formats import open_artifact
from beam_pipeline.reading import pieces, unordered


def test_every_row_is_what_tensorflow_says(job, store, tables, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_BYTES", 3000)
    monkeypatch.setattr(unordered, "PIECE_ENTRIES", 170)
    names = ("integers", "learnt", "learnt_integers", "static", "mutable", "sharded", "bfloat")
    job.publish_all(store, {name: tables(name) for name in names}, "--allow_dimension_change")


def test_tables_and_variables_side_by_side(job, store, tables):
    run = store.log(tables("flat"), "flat", MARCH_1)
    for towers in ((), ("--tower=user=user_vectors", "--tower=item=item_vectors")):
        assert job.run(run, *towers) == 0
        for tower in ("user", "item"):
            assert job.rows(tower) == {("2026-03-01", run): tables("flat").rows(tower)}


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        ("dense", "a DenseHashTable is not supported, save the model with a MutableHashTable or a StaticHashTable"),
        ("narrow", "maps TensorFlow type 3 to 3; only strings and int64 to int64 are supported"),
        ("columns", "reads columns of its file; only one id per line, in order, is supported"),
    ],
)
def test_tables_that_are_refused(tables, layer, words):
    with pytest.raises(UnsupportedModelError, match=words):
        open_artifact(str(tables("unread").folder), open_file).tower("user", layer)


def test_several_data_files(tables):
    towers = [open_artifact(str(tables("sharded").folder), open_file).tower(t, f"{t}_layer") for t in ("user", "item")]
    files = {path for t in towers for path in (t.matrix.path, t.vocabulary.path, t.vocabulary.row_numbers_path)}
    assert len(files) == 6


def test_a_variable_in_slices_is_refused(job, store, tables, capsys):
    line = refused(job, capsys, store.log(tables("sliced"), "sliced", MARCH_1))
    assert "is saved in slices (a partitioned variable), which is not supported" in line


def test_special_rows_of_integers(job, store, tables):
    run = store.log(tables("integers"), "special", MARCH_1)
    assert job.run(run, "--include_oov") == 0
    for tower, special in (("user", {"-1", "-1:1"}), ("item", {"0", "-1"})):
        assert {*job.rows(tower)[("2026-03-01", run)]} == {*tables("integers").ids(tower)} | special


def test_special_rows_without_names_are_refused(job, store, tables, capsys):
    run = store.log(tables("bfloat"), "no names", MARCH_1)
    assert "leave out --include_oov" in refused(job, capsys, run, "--include_oov")


def test_damaged_ids_of_a_table_in_the_checkpoint(job, store, tables, tmp_path, capsys):
    model = Model(Path(shutil.copytree(tables("mutable").folder, tmp_path / "mutable")))
    tower = open_artifact(str(model.folder), open_file).tower("user", "user_layer")
    data = bytearray(Path(tower.vocabulary.path).read_bytes())
    data[tower.vocabulary.span.end - 10] ^= 1
    Path(tower.vocabulary.path).write_bytes(data)
    line = refused(job, capsys, store.log(model, "damaged", MARCH_1))
    assert "the ids of tower 'user' do not match the checkpoint's crc32c" in line
