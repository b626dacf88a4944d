"""Ids in files beside a model: in row order, or each with its row."""

import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from beam_pipeline.errors import BadIdError, CorruptFileError, UnsupportedModelError
from beam_pipeline.files import open_file
from beam_pipeline.formats import encodings
from beam_pipeline.formats.files import ids, vectors
from beam_pipeline.formats.model import Encoding, Matrix


def list_folder(path):
    return sorted(os.listdir(path)) if os.path.isdir(path) else []


def vocabulary_of(path, names=(), first_row=0):
    return ids.read_vocabulary(str(path), "user", names, first_row, open_file, list_folder)


def in_order(path, rows=2, **options):
    vocabulary = vocabulary_of(path, **options)
    assert vocabulary.in_row_order
    found, at = [], vocabulary.span.start
    with open_file(vocabulary.path) as file:
        for count, end in encodings.cuts(file, vocabulary, rows):
            found += encodings.decode(vocabulary.encoding, file.read(at, end - at), count).to_pylist()
            at = end
    return [name.decode() for name in found]


def with_rows(path, entries=2, **options):
    vocabulary = vocabulary_of(path, **options)
    assert not vocabulary.in_row_order
    found, at = [], vocabulary.span.start
    with open_file(vocabulary.path) as file:
        for count, end in encodings.cuts(file, vocabulary, entries):
            rows, names = encodings.decode_with_rows(vocabulary, file.read(at, end - at), count)
            found += zip([name.decode() for name in names.to_pylist()], rows.tolist(), strict=True)
            at = end
    return found


@pytest.mark.parametrize("text", [b"a\nb c\n\xc3\xa9\n", b"a\nb c\n\xc3\xa9", b"\xef\xbb\xbfa\r\nb c\r\n\xc3\xa9\r\n"])
def test_text(tmp_path, text):
    path = tmp_path / "ids.txt"
    path.write_bytes(text)
    assert in_order(path) == ["a", "b c", "é"]
    assert vocabulary_of(path, first_row=1).first_row == 1


@pytest.mark.parametrize("indent", [None, 2])
def test_json_array(tmp_path, indent):
    path = tmp_path / "ids.json"
    path.write_text(f" \n{json.dumps(['a', 'b,]', 'é', 7, chr(34)], indent=indent)}\n")
    assert in_order(path) == ["a", "b,]", "é", "7", '"']


@pytest.mark.parametrize("indent", [None, 2])
def test_json_object(tmp_path, indent):
    path = tmp_path / "ids.json"
    path.write_text(json.dumps({"a": 2, "b,}": 0, "é": 1}, indent=indent))
    assert with_rows(path) == [("a", 2), ("b,}", 0), ("é", 1)]


def test_csv(tmp_path):
    path = tmp_path / "ids.csv"
    path.write_text('\ufeff,row,name,user_id\n0,5,x,a\n1,3,"y, z","b ""c"""\n2,4,,é')
    assert with_rows(path) == [("a", 5), ('b "c"', 3), ("é", 4)]
    path.write_text("sku;n\n")
    with pytest.raises(
        UnsupportedModelError, match="0 columns named id or user_id; its first line names 'sku;n': name them"
    ):
        vocabulary_of(path)
    path.write_text("sku,n\r\na,1\r\nb,0\r\n")
    assert with_rows(path, names=("sku", "n")) == [("a", 1), ("b", 0)]


def test_arrays(tmp_path):
    np.save(tmp_path / "classes.npy", np.array(["u1", "u22", "é"]))
    np.savez(tmp_path / "ids.npz", users=np.arange(3), items=np.array(["a", "b"]))
    assert in_order(tmp_path / "classes.npy") == ["u1", "u22", "é"]
    assert in_order(tmp_path / "ids.npz", names=("users",)) == ["0", "1", "2"]
    with pytest.raises(
        UnsupportedModelError, match=r"2 arrays that may be the ids.*name one with --ids user=.*ids.npz#NAME"
    ):
        vocabulary_of(tmp_path / "ids.npz")


def test_parquet(tmp_path):
    pq.write_table(pa.table({"user_id": ["a", "b"], "row": [1, 0]}), tmp_path / "ids.parquet")
    vocabulary = vocabulary_of(tmp_path / "ids.parquet")
    assert (vocabulary.encoding, vocabulary.count, vocabulary.in_row_order) == (Encoding.PARQUET, 2, False)
    assert (vocabulary.table.id_column, vocabulary.table.value_column) == ("user_id", "row")


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("ids.txt", b"", BadIdError, "is empty: no ids"),
        ("ids.txt", b"\x1f\x8b\x08abc", UnsupportedModelError, r"is compressed \(gzip\)"),
        ("ids.json", b"[ ]", BadIdError, "is empty: no ids"),
        ("ids.json", b"3", UnsupportedModelError, "neither a JSON array of ids nor a JSON object"),
        ("ids.json", b'{"a": 1', UnsupportedModelError, "neither a JSON array"),
        ("ids.csv", b"id,row\n", BadIdError, "no lines after its header"),
        ("ids.csv", b"x" * 70_000, CorruptFileError, "its first line has no end"),
        ("ids.csv", b"\xff\xfe\n1", CorruptFileError, "no header of CSV"),
        ("encoder.pkl", b"", UnsupportedModelError, "is a pickle, which would run code"),
    ],
)
def test_files_without_ids(tmp_path, name, content, error, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message):
        vocabulary_of(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("ids.json", b'{"a": "x"}', BadIdError, "the row of id 'a' is not an integer"),
        ("ids.json", b'{"a": true}', BadIdError, "the row of id 'a' is not an integer"),
        ("ids.json", b'{"a": 99999999999999999999}', BadIdError, "is beyond 64 bits"),
        ("ids.json", b'{"a": {"b": 1, "c": 2}}', BadIdError, "the row of id 'a' is not an integer"),
        (
            "ids.csv",
            b"id,row\na,x\n",
            BadIdError,
            "not a table of ids and their rows .*conversion error to int64: invalid value .x",
        ),
        ("ids.csv", b"id,row\na,\n", BadIdError, "id 'a' has no row"),
        ("ids.csv", b"id,row\na\n", BadIdError, "not a table of ids and their rows"),
        ("ids.csv", b'id,row\n"a\nb",3\n', BadIdError, "no table|where 2 were counted"),
    ],
)
def test_bad_entries_are_named(tmp_path, name, content, error, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises((error, CorruptFileError), match=message):
        with_rows(tmp_path / name, entries=9)


def test_rows_as_ids():
    matrix = Matrix("weights", 0, 5, 2, "float32", None)
    vocabulary = ids.row_numbers(matrix, 1)
    assert (vocabulary.encoding, vocabulary.first_row, vocabulary.count) == (Encoding.ROWS, 1, 4)
    assert list(encodings.cuts(None, vocabulary, 3)) == [(3, 4), (1, 5)]


def test_as_many_ids_as_rows(tmp_path):
    matrix = Matrix("weights", 0, 5, 2, "float32", None)
    np.save(tmp_path / "ids.npy", np.arange(4))
    with pytest.raises(
        BadIdError,
        match=r"tower 'user': .*ids\.npy has 4 ids for rows 0 to 4 of the vectors, which are 5; name the row of the first"
        r" id with --first_row user=ROW",
    ):
        vectors.fitted("user", vocabulary_of(tmp_path / "ids.npy"), matrix)
    assert vectors.fitted("user", vocabulary_of(tmp_path / "ids.npy", first_row=1), matrix).fills
    (tmp_path / "ids.txt").write_text("a\nb\n")
    assert vectors.fitted("user", vocabulary_of(tmp_path / "ids.txt"), matrix).count == 5


def test_an_offset_beside_rows(tmp_path):
    (tmp_path / "ids.json").write_text('{"a": 1}')
    with pytest.raises(BadIdError, match="has a row for each id: leave out --first_row"):
        vocabulary_of(tmp_path / "ids.json", first_row=1)
