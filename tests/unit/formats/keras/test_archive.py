"""The zip of a `.keras` file, as Keras saves it, packed otherwise, and damaged."""

import struct
import zipfile
from pathlib import Path

import pytest
from keras_zips import path_of, rezipped

from beam_pipeline.errors import (
    CorruptFileError,
    NotAModelError,
    PipelineError,
    UnsupportedModelError,
)
from beam_pipeline.files import open_file
from beam_pipeline.formats.keras import archive
from beam_pipeline.formats.keras.reader import KerasFile


def test_compressed_members(keras_files, tmp_path):
    path = rezipped(keras_files("sequential"), tmp_path / "x.keras", compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(UnsupportedModelError, match="is compressed or encrypted"):
        KerasFile(path, open_file)


def test_something_else_in_place_of_the_file(tmp_path):
    for content in (b"", b"<html>not found</html>", b"PK\x05\x06" + bytes(18)):
        (tmp_path / "x.keras").write_bytes(content)
        with pytest.raises(NotAModelError, match=r"not a .keras file|has no config.json"):
            KerasFile(str(tmp_path / "x.keras"), open_file)


def test_a_directory_that_is_too_large(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "x.keras", "w") as zipped:
        for i in range(2000):
            zipped.writestr(f"{i}", b"")
    monkeypatch.setattr(archive, "_MAX_DIRECTORY", 50_000)
    with pytest.raises(CorruptFileError, match="its directory exceeds the limit of 50,000 bytes"):
        KerasFile(str(tmp_path / "x.keras"), open_file)


def test_a_file_that_is_cut_short(keras_files, tmp_path):
    """The directory is at the end, so a cut file is no zip; one whose directory was moved has members beyond its end."""
    data = Path(path_of(keras_files("special"))).read_bytes()
    path = tmp_path / "x.keras"
    path.write_bytes(data[:-100])
    with pytest.raises(NotAModelError, match=r"not a .keras file"):
        KerasFile(str(path), open_file)
    end = data.rindex(b"PK\x05\x06")
    start = struct.unpack_from("<I", data, end + 16)[0]
    path.write_bytes(data[:2000] + data[start:end] + data[end : end + 16] + struct.pack("<I", 2000) + b"\0\0")
    with pytest.raises(PipelineError, match=r"is not where the zip's directory says|are needed"):
        KerasFile(str(path), open_file)
