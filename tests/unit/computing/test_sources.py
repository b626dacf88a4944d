"""Parquet files of features: what their footers say is checked before anything is read."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from beam_pipeline.computing import sources
from beam_pipeline.computing.columns import Columns
from beam_pipeline.computing.signature import Input
from beam_pipeline.computing.sources import CHUNK_ROWS, ParquetFiles
from beam_pipeline.computing.tower import _parquet_files
from beam_pipeline.errors import ArtifactMissingError, ChecksumError, CorruptFileError, FeaturesError
from beam_pipeline.formats.files import footer

INPUTS = (Input("age", "int32"), Input("history", "string", (None,)))
COLUMNS = Columns("user", "user_id", ("age", "history"), INPUTS)
ROWS = 10_000
IDS = [f"u{number}" for number in range(ROWS)]


def write(path, rows=ROWS, **options):
    histories = [[f"i{number % 7}"] * (number % 3) for number in range(rows)]
    ages = pa.array(np.arange(rows) % 90, pa.int32())
    table = pa.table({"user_id": IDS[:rows], "age": ages, "history": histories, "unused": range(rows)})
    pq.write_table(table, path, **options)
    return table.drop_columns(["unused"]), ParquetFiles(str(path), (str(path),))


def read(files):
    """Returns all rows; none of a chunk is more than is called at once."""
    batches = [batch for share, _ in files.cut(COLUMNS, None) for batch in files.read(share, COLUMNS)]
    assert max(batch.num_rows for batch in batches) <= CHUNK_ROWS
    return pa.Table.from_batches(batches)


def test_every_row_is_read_in_order(tmp_path):
    table, files = write(tmp_path / "a.parquet", row_group_size=6000)
    assert read(files).equals(table.select(COLUMNS.all))
    assert [rows for _, rows in files.cut(COLUMNS, None)] == [6000, 4000]


def test_long_lists_are_read_in_smaller_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_CHUNK_VALUES", 100)
    table, files = write(tmp_path / "a.parquet")
    ((share, _),) = files.cut(COLUMNS, None)
    batches = list(files.read(share, COLUMNS))
    assert max(batch.num_rows for batch in batches) < 100
    assert pa.Table.from_batches(batches).equals(table.select(COLUMNS.all))


def lying(monkeypatch, change):
    """Has the footer say something else of a column, as a damaged or crafted one may."""
    original = footer._Reader._metadata

    def metadata(reader):
        leaf = original(reader)
        return change(leaf) if leaf.path.startswith(("age", "history")) else leaf

    monkeypatch.setattr(footer._Reader, "_metadata", metadata)


@pytest.mark.parametrize(
    ("column", "values", "size", "error", "problem"),
    [
        ("age", 9_999, 100, CorruptFileError, "row group 0 has 9,999 values in column 'age', and 10,000 rows"),
        ("age", 1 << 60, 100, CorruptFileError, "has 1,152,921,504,606,846,976 values in column 'age'"),
        ("age", 10_000, 1 << 40, FeaturesError, "column 'age' has 1,099,511,627,776 bytes in row group 0, and a worker"),
        ("history.list.element", 1 << 40, 100, FeaturesError, "column 'history' has 8,796,093,022,208 bytes"),
        ("history.list.element", 3, 100, CorruptFileError, "has 3 values in column 'history', and 10,000 rows"),
        ("history.list.element", 10_000, -1, CorruptFileError, "has 10,000 values in column 'history'"),
    ],
)  # fmt: skip
def test_sizes_are_checked_before_a_column_is_read(tmp_path, monkeypatch, column, values, size, error, problem):
    _, files = write(tmp_path / "a.parquet")
    lying(monkeypatch, lambda leaf: footer.Leaf(leaf.path, values, size) if leaf.path == column else leaf)
    with pytest.raises(error, match=problem):
        list(files.cut(COLUMNS, None))


def test_a_damaged_page_is_found_by_its_checksum(tmp_path):
    path = tmp_path / "a.parquet"
    _, files = write(path, use_dictionary=False, compression="none", write_page_checksum=True)
    data = bytearray(path.read_bytes())
    data[data.index(b"u100") + 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ChecksumError, match="a page does not match its checksum"):
        read(files)


def test_a_file_that_is_replaced_is_noticed(tmp_path):
    _, files = write(tmp_path / "a.parquet", row_group_size=6000)
    shares = [share for share, _ in files.cut(COLUMNS, None)]
    write(tmp_path / "a.parquet", 100)
    with pytest.raises(CorruptFileError, match="has no row group 1 any more: it changed since the job started"):
        list(files.read(shares[1], COLUMNS))


def test_a_column_that_is_there_twice(tmp_path):
    _, files = write(tmp_path / "a.parquet", 10)
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array([1], pa.int32())] * 2, names=["user_id", "age"] * 2)
    pq.write_table(twice, tmp_path / "b.parquet")
    files = ParquetFiles("", (*files.paths, str(tmp_path / "b.parquet")))
    with pytest.raises(FeaturesError, match=r"column 'user_id' is there 2 times in .*b\.parquet"):
        list(files.cut(COLUMNS, None))


def test_files_are_found_as_those_of_vectors_are(tmp_path):
    for name in ("a1.parquet", "a2.parquet", "b.parquet", "_c.parquet", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    found = _parquet_files("user", f"{tmp_path}/a?.parquet").paths
    assert found == (f"{tmp_path}/a1.parquet", f"{tmp_path}/a2.parquet")
    with pytest.raises(ArtifactMissingError, match=r"--features user=.*/z\*\.parquet: .* names no Parquet files"):
        _parquet_files("user", f"{tmp_path}/z*.parquet")
