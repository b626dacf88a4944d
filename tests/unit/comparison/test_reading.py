"""Reading through the Storage Read API: from the emulator, and from a small one that sends what BigQuery sends."""

import re

import numpy as np
import pyarrow as pa
import pytest
from fake_storage_read import page, serve

from beam_pipeline.bigquery import storage_read
from beam_pipeline.comparison import reading
from beam_pipeline.errors import BadVectorError, ConfigError


@pytest.fixture
def fake(monkeypatch, request):
    """A client of the small service, which is started with the test's parameters."""
    with serve(**request.param) as host:
        monkeypatch.setenv("BIGQUERY_EMULATOR_HOST", "localhost:1")
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", "localhost:1")
        monkeypatch.setenv("BIGQUERY_STORAGE_EMULATOR_HOST", host)
        yield storage_read.make_client()


@pytest.mark.parametrize("fake", [{"rows": 25_003, "dimension": 4, "streams": 3}], indirect=True)
@pytest.mark.parametrize("rows", [1, 7, 1999, 2000, 2001, 8192, 30_000])
def test_blocks_hold_every_row_once(fake, rows):
    found = []
    for stream in storage_read.open_streams(fake, "billing", "p.d.t", reading.FIELDS):
        if rows == 1:  # a row at a time, of the first rows alone
            found = [next(reading.read_blocks(fake, stream, 4, 4, rows))]
            break
        blocks = [*reading.read_blocks(fake, stream, 4, 4, rows)]
        assert all(len(block) == rows for block in blocks[:-1])
        assert len(blocks[-1]) <= rows
        found += blocks
    ids = np.concatenate([block.ids for block in found])
    assert [*ids] == [f"id {n:08}" for n in range(1 if rows == 1 else 25_003)]
    expected = np.random.default_rng(0).normal(size=(2, 2000, 4))
    vectors = np.concatenate([block.before for block in found])[:2000]
    assert (vectors == expected[0][: len(vectors)]).all()


@pytest.mark.parametrize("fake", [{"refuses": True}], indirect=True)
@pytest.mark.parametrize("domain", ["", "example.com:"])
def test_a_missing_permission_names_the_role_and_the_project_that_is_billed(fake, domain):
    message = (
        f"bigquery.readsessions.create' permission for 'projects/{domain}b' to read projects/{domain}p/datasets/d/tables/t"
        f"); grant it roles/bigquery.readSessionUser on project {domain}b and "
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        storage_read.open_streams(fake, f"{domain}b", f"{domain}p.d.t", reading.FIELDS)


def test_an_emulator_without_the_api(monkeypatch):
    monkeypatch.setenv("BIGQUERY_EMULATOR_HOST", "localhost:1")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "localhost:1")
    monkeypatch.delenv("BIGQUERY_STORAGE_EMULATOR_HOST", raising=False)
    with pytest.raises(Exception, match="BIGQUERY_STORAGE_EMULATOR_HOST is not; set it"):
        storage_read.make_client()


def joined(before, after, ids=None):
    kind = pa.list_(pa.float64())
    return pa.record_batch(
        [pa.array(ids or [f"i{n}" for n in range(len(before))]), pa.array(before, kind), pa.array(after, kind)],
        [*reading.FIELDS],
    )


def test_a_side_that_is_missing():
    """A REPEATED column has empty arrays; a list column of Arrow may have nulls."""
    rows = reading.to_rows([joined([[1, 2], [], None], [[], [3, 4], [5, 6]])], 2, 2)
    assert rows.has_before.tolist() == [True, False, False]
    assert rows.has_after.tolist() == [False, True, True]
    assert rows.before.tolist() == [[1, 2], [0, 0], [0, 0]]
    assert rows.after.tolist() == [[0, 0], [3, 4], [5, 6]]
    sliced = reading.to_rows([joined([[1, 2], [], None], [[], [3, 4], [5, 6]]).slice(1)], 2, 2)
    assert (sliced.ids.tolist(), sliced.after.tolist()) == (["i1", "i2"], [[3, 4], [5, 6]])


def test_bad_vectors_are_named():
    with pytest.raises(BadVectorError, match="'i1' has a vector of 3 values, not 2"):
        reading.to_rows([joined([[1, 2], [1, 2, 3]], [[1, 2], [1, 2]])], 2, 2)
    with pytest.raises(BadVectorError, match="'i2' has a vector with NaN"):
        reading.to_rows([joined([[1, 2], [], [1, float("nan")]], [[1, 2]] * 3)], 2, 2)


def test_a_page_is_as_it_is_sent():
    rows = reading.to_rows([page(0, 3, 4, reading.FIELDS)], 4, 4)
    assert rows.common.all()
    assert rows.groups is None


# A worker's memory and speed.
