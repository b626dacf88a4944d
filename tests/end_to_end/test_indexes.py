"""Search indexes by the command line, against the emulators."""

import pytest
from job import MARCH_1, refused
from models import made_by


@pytest.fixture(scope="module")
def indexes():
    return made_by("make_indexes.py")


def test_every_row_of_an_index_is_what_it_answers(job, store, indexes):
    run = store.log(indexes("tfrs"), "tfrs", MARCH_1)
    ended = job.subprocess(run)
    assert ended.returncode == 0, ended.stderr
    for tower in ("user", "item"):
        assert job.rows(tower) == {("2026-03-01", run): indexes("tfrs").rows(tower)}
    assert sorted(job.query("SELECT tower, vector_source FROM {log}")) == [("item", "index"), ("user", "embedding")]


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("tfrs_repeated", "'ítem 0 ü'"),
        ("mismatched", "the ids of index 'vectors' are 21, and its vectors 20"),
        ("diverged", "the vector of id 'ítem 3 ü' (row 3) holds NaN or infinity"),
        ("scann_quantised", "holds its vectors quantised only"),
        ("beside_dense", "tower 'user': the model continues after the embedding of 'encoder': dense"),
    ],
)
def test_nothing_is_published_of_an_index_that_cannot_be_served(job, store, indexes, capsys, name, problem):
    assert problem in refused(job, capsys, store.log(indexes(name), name, MARCH_1))
