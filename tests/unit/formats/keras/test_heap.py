"""Strings of an HDF5 file, as h5py writes them, and files that lie about them."""

import io

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_pipeline.errors import CorruptFileError
from beam_pipeline.files import ByteFile
from beam_pipeline.formats.keras.heap import read_strings
from beam_pipeline.formats.protobuf import Span

TEXTS = ["a", "", "é" * 50, "x" * 70_000, "b" * 7, "c" * 8, "d" * 9, *(f"string {n}" for n in range(500))]


def written(texts):
    """Returns the bytes of an HDF5 file, and of the references in it."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file.create_dataset("ids", data=np.array(texts, object), dtype=h5py.string_dtype())
    with h5py.File(buffer) as file:
        start = file["ids"].id.get_offset()
    data = buffer.getvalue()
    return data, data[start : start + 16 * len(texts)]


def read(data, references, before=b""):
    whole = before + data
    file = ByteFile("model.keras", io.BytesIO(whole), len(whole))
    return [each.decode() for each in read_strings(file, Span(len(before), len(whole)), references).to_pylist()]


def test_strings_are_those_that_were_written():
    data, references = written(TEXTS)
    assert read(data, references) == TEXTS
    assert read(data, references[16 * 3 : 16 * 9], before=b"zip" * 100) == TEXTS[3:9]
    assert read(data, b"") == []


@given(st.lists(st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=40), min_size=1, max_size=200))
def test_any_strings(texts):
    assert read(*written(texts)) == texts


def reference(length, address, number):
    return length.to_bytes(4, "little") + address.to_bytes(8, "little") + number.to_bytes(4, "little")


DATA, REFERENCES = written(["one", "two", "three"])
ADDRESS = int.from_bytes(REFERENCES[4:12], "little")


@pytest.mark.parametrize(
    ("references", "problem"),
    [
        (reference(3, ADDRESS, 9), "string 0 is not where the file says"),
        (reference(4, ADDRESS, 1), "string 0 is not where the file says"),
        (reference(3, ADDRESS + 8, 1), "no collection of strings at byte"),
        (reference(3, len(DATA) - 3, 1), "no collection of strings at byte"),
        (reference(3, (1 << 64) - 1, 1), "no collection of strings at byte"),
        (reference(0xFFFFFFFF, ADDRESS, 1), "1 strings take 4,294,967,295 bytes, more than there are"),
        (reference(3, ADDRESS, 1) * 5000, "5,000 strings take 15,000 bytes, more than there are"),
    ],
)
def test_lies_are_named_and_cost_nothing(references, problem):
    with pytest.raises(CorruptFileError, match=problem):
        read(DATA, references)


@pytest.mark.parametrize("size", [0, 15, 1 << 20, (1 << 64) - 1])
def test_a_collection_that_lies_about_its_size(size):
    data = DATA[: ADDRESS + 8] + size.to_bytes(8, "little") + DATA[ADDRESS + 16 :]
    with pytest.raises(CorruptFileError, match="no collection of strings at byte"):
        read(data, REFERENCES)


def test_collections_that_overlap_are_not_read_again_and_again():
    """Each claims the rest of the file: together they would be read as often as there are strings."""
    heads = b"".join(b"GCOL\1\0\0\0" + ((400 - n) * 32).to_bytes(8, "little") + bytes(16) for n in range(400))
    references = b"".join(reference(1, 32 * n, 1) for n in range(400))
    with pytest.raises(CorruptFileError, match=r"no collection of strings|is not where the file says"):
        read(heads, references)
