"""Ids and vectors in Parquet files, compared with what pyarrow itself reads of the whole file."""

import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from beam_pipeline.errors import (
    ArtifactMissingError,
    BadIdError,
    BadVectorError,
    ChecksumError,
    CorruptFileError,
    UnsupportedModelError,
)
from beam_pipeline.files import open_file
from beam_pipeline.formats.files import parquet


def list_folder(path):
    return sorted(os.listdir(path)) if os.path.isdir(path) else []


def vectors_of(path, columns=None, rows=10):
    table = parquet.find_vectors(str(path), "item", columns, open_file, list_folder)
    ids, vectors = [], []
    for group in table.groups:
        for names, some in parquet.read_vectors(table, group, rows, open_file):
            assert len(names) == len(some) <= rows
            ids += names.to_pylist()
            vectors.append(some)
    return table, [name.decode() for name in ids], np.concatenate(vectors)


def written(path, values, ids=None, *, kind=None, names=("id", "vector"), **options):
    """Writes a file and returns its ids and vectors."""
    kind = kind or pa.list_(pa.float32())
    ids = [f"i{n}" for n in range(len(values))] if ids is None else ids
    pq.write_table(pa.table({names[0]: pa.array(ids), names[1]: pa.array(values, kind)}), path, **options)
    return ids


def rows_of(count=25, dimension=3):
    return np.random.default_rng(1).normal(size=(count, dimension)).astype("f4").tolist()


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.float32()),
        pa.list_(pa.float32(), 3),
        pa.large_list(pa.float64()),
        pa.list_(pa.float64(), 3),
    ],
)
@pytest.mark.parametrize("options", [{}, {"row_group_size": 7, "compression": "zstd", "use_dictionary": False}])
def test_rows(tmp_path, kind, options):
    path, values = tmp_path / "v.parquet", rows_of()
    ids = written(path, values, kind=kind, **options)
    table, found_ids, found = vectors_of(path)
    assert (table.rows, table.dimension) == (25, 3)
    assert table.dtype == found.dtype.name == kind.value_type.to_pandas_dtype().__name__
    assert found_ids == ids
    assert found.tolist() == pq.read_table(path)["vector"].to_pylist()


def test_half_floats(tmp_path):
    path, values = tmp_path / "v.parquet", np.float16([[1.5, 2], [3, 4]])
    written(path, list(values), kind=pa.list_(pa.float16()))
    table, _, found = vectors_of(path)
    assert table.dtype == "float16"
    assert np.array_equal(found, values)


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (pa.array([1, -2, 3]), ["1", "-2", "3"]),
        (pa.array(["a", "é", "c"]).dictionary_encode(), ["a", "é", "c"]),
        (pa.array([b"a", b"b", b"c"]), ["a", "b", "c"]),
        (pa.array(["a", "b", "c"], pa.large_string()), ["a", "b", "c"]),
    ],
)
def test_kinds_of_ids(tmp_path, ids, expected):
    written(tmp_path / "v.parquet", rows_of(3), ids)
    assert vectors_of(tmp_path / "v.parquet")[1] == expected


def test_names_of_columns(tmp_path):
    path = tmp_path / "v.parquet"
    written(path, rows_of(), names=("item_id", "item_embedding"))
    assert len(vectors_of(path)[1]) == 25
    written(path, rows_of(), names=("sku", "emb"))
    assert len(vectors_of(path, ("sku", "emb"))[1]) == 25
    with pytest.raises(
        UnsupportedModelError,
        match="0 columns named id or item_id; its columns are 'sku', 'emb': name them with --vectors item=PATH#ID,VECT",
    ):
        vectors_of(path)
    with pytest.raises(UnsupportedModelError, match="has 0 columns 'x'"):
        vectors_of(path, ("sku", "x"))


def test_many_files(tmp_path):
    expected = []
    for part in range(3):
        ids = [f"p{part}-{n}" for n in range(5)]
        expected += written(tmp_path / f"part-{part}.snappy.parquet", rows_of(5), ids)
    (tmp_path / "_SUCCESS").write_text("")
    (tmp_path / "_metadata.parquet").write_text("")
    assert vectors_of(tmp_path)[1] == expected
    assert vectors_of(tmp_path / "part-*.parquet")[1] == expected
    assert vectors_of(tmp_path / "*-1.*.parquet")[1] == expected[5:10]
    with pytest.raises(ArtifactMissingError, match=r"x\*\.parquet names no Parquet files"):
        vectors_of(tmp_path / "x*.parquet")
    written(tmp_path / "part-9.parquet", rows_of(5, 4))
    with pytest.raises(BadVectorError, match=r"part-9.parquet: id 'i0' has a vector of 4 values, and others have 3"):
        vectors_of(tmp_path)
    written(tmp_path / "part-9.parquet", rows_of(5), kind=pa.list_(pa.float64()))
    with pytest.raises(BadVectorError, match="has vectors of float64 in 'vector', the files before it float32"):
        vectors_of(tmp_path)


def test_an_empty_file_among_others(tmp_path):
    written(tmp_path / "a.parquet", [], pa.array([], pa.string()))
    written(tmp_path / "b.parquet", rows_of(5))
    assert len(vectors_of(tmp_path)[1]) == 5
    with pytest.raises(BadVectorError, match=r"a\.parquet has no rows"):
        vectors_of(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("values", "ids", "error", "message"),
    [
        ([[1, 2], [1, 2, 3], [1, 2]], None, BadVectorError, "id 'i1' has a vector of 3 values, and others have 2"),
        ([[1, 2], [1], [1, 2, 3]], None, BadVectorError, r"id 'i1' .* has a vector of 1 values, and others have 2 \(and 1"),
        ([[1, 2], None, [1, 2]], None, BadVectorError, "id 'i1' has NULL instead of a vector"),
        ([[1], None, [1]], None, BadVectorError, "id 'i1' .* has NULL instead of a vector"),
        ([[1, 2], [1, None], [1, 2]], None, BadVectorError, "id 'i1' .* has a vector with NULL in it"),
        ([[1, 2], [1, 2]], ["a", None], BadIdError, "the id of row 1 in row group 0 is NULL"),
        ([[], []], None, BadVectorError, "2 values in 2 vectors|1 values|others have"),
        ([[1] * 9, [1]], None, BadVectorError, "others have 5"),
    ],
)  # fmt: skip
def test_bad_rows_are_named(tmp_path, values, ids, error, message):
    written(tmp_path / "v.parquet", values, ids)
    with pytest.raises(error, match=message):
        vectors_of(tmp_path / "v.parquet")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"id": ["a"], "vector": [[1]]}, "column 'vector' has type list<.*int64>, and a vector is a list of floats"),
        ({"id": ["a"], "vector": ["[1, 2]"]}, "column 'vector' has type string"),
        ({"id": [1.5], "vector": [[1.0]]}, "column 'id' has type double, and an id is a string or an integer"),
    ],
)
def test_other_types(tmp_path, table, message):
    pq.write_table(pa.table(table), tmp_path / "v.parquet")
    with pytest.raises(UnsupportedModelError, match=message):
        vectors_of(tmp_path / "v.parquet")


def test_damage_is_noticed_where_pages_have_checksums(tmp_path):
    path = tmp_path / "v.parquet"
    options = {"use_dictionary": False, "compression": "none"}
    written(path, rows_of(500), **options, write_page_checksum=True)
    data = bytearray(path.read_bytes())
    at = pq.ParquetFile(path).metadata.row_group(0).column(1).data_page_offset + 3000
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(ChecksumError, match=r"v\.parquet: a page does not match its checksum"):
        vectors_of(path)


def test_a_file_that_is_none(tmp_path):
    path = tmp_path / "v.parquet"
    path.write_bytes(b"no parquet at all")
    with pytest.raises(CorruptFileError, match="is not a Parquet file, or truncated"):
        vectors_of(path)
    written(path, rows_of())
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CorruptFileError, match="is not a Parquet file, or truncated"):
        vectors_of(path)
    path.write_bytes(b"PAR1" + bytes(8) + b"\xff\xff\xff\x7fPAR1")
    with pytest.raises(UnsupportedModelError, match="a footer of 2,147,483,647 bytes"):
        vectors_of(path)
    path.write_bytes(b"PAR1" + bytes(100) + b"\x50\0\0\0PAR1")
    with pytest.raises(CorruptFileError, match=r"v\.parquet cannot be read as Parquet"):
        vectors_of(path)


def test_a_file_that_was_replaced(tmp_path):
    path = tmp_path / "v.parquet"
    written(path, rows_of())
    table = parquet.find_vectors(str(path), "item", None, open_file, list_folder)
    written(path, rows_of(24))
    with pytest.raises(CorruptFileError, match="row group 0 has no longer 25 rows"):
        list(parquet.read_vectors(table, table.groups[0], 10, open_file))


def test_ids_with_rows(tmp_path):
    path = tmp_path / "ids.parquet"
    pq.write_table(pa.table({"id": ["a", "b", "c"], "row": pa.array([2, 0, 1], pa.int32())}), path)
    table = parquet.find_rows(str(path), "user", None, open_file, list_folder)
    ((rows, ids),) = parquet.read_rows(table, table.groups[0], 100, open_file)
    assert rows.tolist() == [2, 0, 1]
    assert ids.to_pylist() == [b"a", b"b", b"c"]
    pq.write_table(pa.table({"id": ["a", "b"], "row": [2, None]}), path)
    table = parquet.find_rows(str(path), "user", None, open_file, list_folder)
    with pytest.raises(BadIdError, match=r"id 'b' .* has NULL instead of a row"):
        list(parquet.read_rows(table, table.groups[0], 100, open_file))
    pq.write_table(pa.table({"id": ["a"], "row": [2.0]}), path)
    with pytest.raises(UnsupportedModelError, match="column 'row' has type double, and a row is an integer"):
        parquet.find_rows(str(path), "user", None, open_file, list_folder)


def test_a_large_row_group_is_read_in_parts(tmp_path, monkeypatch):
    """40 MB in one row group, of which a batch and some pages are in memory."""
    monkeypatch.setattr(parquet, "_SMALL", 0)
    path = tmp_path / "v.parquet"
    values = np.random.default_rng(1).normal(size=(160_000, 64)).astype("f4")
    column = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), 64)
    pq.write_table(
        pa.table({"id": pa.array(range(len(values))), "vector": column}), path, row_group_size=len(values), compression="none"
    )  # fmt: skip
    table = parquet.find_vectors(str(path), "item", None, open_file, list_folder)
    before, most, at = pa.total_allocated_bytes(), 0, 0
    for _, some in parquet.read_vectors(table, table.groups[0], 8192, open_file):
        assert np.array_equal(some, values[at : at + len(some)])
        at += len(some)
        most = max(most, pa.total_allocated_bytes() - before)
    assert at == len(values)
    assert most < 20 << 20


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("{}/part-*.parquet", ["{}/part-0.parquet", "{}/part-10.parquet"]),
        ("{}/part-?.parquet", ["{}/part-0.parquet"]),
        ("{}/*[1].parq", ["{}/x[1].parq"]),
        ("{}", ["{}/part-0.parquet", "{}/part-10.parquet", "{}/x[1].parq"]),
        ("{}/", ["{}/part-0.parquet", "{}/part-10.parquet", "{}/x[1].parq"]),
        ("{}/part-0.parquet", ["{}/part-0.parquet"]),
        ("{}/not-there.parquet", ["{}/not-there.parquet"]),
        ("part-*.parquet", ["part-0.parquet", "part-10.parquet"]),
        ("./part-1*.parquet", ["./part-10.parquet"]),
    ],
)
def test_which_files_a_path_names(tmp_path, monkeypatch, path, found):
    for name in ("part-0.parquet", "part-10.parquet", "x[1].parq", "_SUCCESS", "_metadata.parquet", ".part-1.parquet"):
        (tmp_path / name).write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    assert parquet.find_files(path.format(tmp_path), list_folder) == [each.format(tmp_path) for each in found]


def test_paths_that_name_no_files(tmp_path):
    with pytest.raises(ArtifactMissingError, match="names no Parquet files"):
        parquet.find_files(f"{tmp_path}/*.parquet", list_folder)
    with pytest.raises(UnsupportedModelError, match=r"\* and \? are for names of files, not for gs://b/day=\*/; name"):
        parquet.find_files("gs://b/day=*/x.parquet", list_folder)
