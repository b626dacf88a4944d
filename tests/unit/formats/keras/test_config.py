"""config.json: without the ids in it, and with more in it than a model has."""

import pytest
from keras_zips import entry_of, flip, path_of, refused, rezipped, with_config

from beam_pipeline.errors import (
    ChecksumError,
    PipelineError,
    UnsupportedModelError,
)
from beam_pipeline.files import open_file
from beam_pipeline.formats import encodings
from beam_pipeline.formats.keras import config
from beam_pipeline.formats.keras.reader import KerasFile


@pytest.mark.parametrize("at", [5, -10])
def test_a_damaged_config(keras_files, tmp_path, at):
    path = rezipped(keras_files("functional"), tmp_path / "x.keras")
    flip(path, "config.json", at)
    with pytest.raises(ChecksumError, match=r"config.json does not match its CRC-32"):
        KerasFile(path, open_file)


def test_a_config_that_is_too_large(keras_files, tmp_path, monkeypatch):
    monkeypatch.setattr(config, "_MAX_CONFIG", 5000)
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
    monkeypatch.setattr(config, "_BLOCK", block)
    monkeypatch.setattr(config, "_SLICE", max(3, block // 3))
    with open_file(path) as file:
        vocabulary = KerasFile(path, open_file).tower("user", "table").vocabulary
        assert encodings.first(file, vocabulary, 10_000)[0] == names


@pytest.mark.parametrize("levels", [250, 900, 980, 100_000])
def test_a_config_that_is_nested_too_deep(keras_files, tmp_path, levels):
    """Just below the depth at which `json` gives up, whatever recurses over it later would."""

    def deep(members):
        text = members["config.json"].replace(
            b'"class_name": "Embedding"', b'"class_name": ' + b"[" * levels + b"]" * levels
        )
        return {**members, "config.json": text}

    refused(keras_files("sequential"), tmp_path, deep, "nested more than 200 levels|is not JSON")


def test_a_number_of_too_many_digits(keras_files, tmp_path):
    def long(members):
        return {**members, "config.json": b'{"x": ' + b"9" * 5000 + b"," + members["config.json"][1:]}

    refused(keras_files("sequential"), tmp_path, long, "is not JSON .Exceeds the limit")


def test_a_million_vocabularies(keras_files, tmp_path):
    def many(members):
        lists = b"{" + b'"vocabulary": [],' * 400_000 + b'"x": 0}'
        return {**members, "config.json": b'{"x": ' + lists + b"," + members["config.json"][1:]}

    refused(keras_files("sequential"), tmp_path, many, "more than 10,000 vocabularies")
