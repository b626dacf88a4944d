"""Which pairs are compared, and what cannot be."""

from datetime import date

import pytest

from beam_pipeline.bigquery import history
from beam_pipeline.bigquery.history import Towers, Trained
from beam_pipeline.bigquery.tables import Destination
from beam_pipeline.comparison.pairs import choose, consecutive
from beam_pipeline.comparison.tables import Pair
from beam_pipeline.errors import ConfigError, TrainingMissingError

BOTH = {"user": 9, "item": 5}


def trained(day, run, rows=None):
    return Trained(date(2026, 3, day), run, f"weekly {run}", "two_tower", rows or BOTH)


A, B, B2, C = trained(1, "a"), trained(8, "b"), trained(8, "b2"), trained(15, "c")
NAMES = ("user", "item")


def test_tables_whose_partitions_are_looked_at_are_named_by_literals():
    """By parameters BigQuery would look at every table of the dataset, and refuse more than a thousand."""
    sql = history.partitions_sql(Destination("example.com:p", "d", "EU", "t"), ["t_user_embedding", "t_item_embedding"])
    assert " FROM `example.com:p.d`.INFORMATION_SCHEMA.PARTITIONS " in sql
    assert "WHERE table_name IN ('t_user_embedding', 't_item_embedding') AND " in sql


@pytest.mark.parametrize(
    ("earlier", "later", "wanted"),
    [
        (None, None, Pair(B, C)),
        (None, "2026-03-08", Pair(A, B)),
        (None, "b", Pair(A, B)),
        ("2026-03-01", None, Pair(A, C)),
        ("a", "2026-03-15", Pair(A, C)),
    ],
)
def test_the_pair_that_is_meant(earlier, later, wanted):
    assert choose([A, B, C], NAMES, earlier, later) == wanted


def test_two_runs_of_one_date():
    assert choose([A, B, B2, C], NAMES, "b2", "c") == Pair(B2, C)
    assert choose([A, B, B2], NAMES, "b", "b2") == Pair(B, B2)  # a noise floor: trained twice on the same data
    named = (
        r"2026-03-08 has 2 runs, 2026-03-08 weekly b \(b\), 2026-03-08 weekly b2 \(b2\); name one by its run id with"
    )
    for earlier, later, flag in ((None, None, "--from"), ("2026-03-08", "c", "--from"), (None, "2026-03-08", "--to")):
        with pytest.raises(ConfigError, match=f"{named} {flag}"):
            choose([A, B, B2, C], NAMES, earlier, later)
    with pytest.raises(ConfigError, match=f"{named} --to"):
        choose([A, B, B2], NAMES)


@pytest.mark.parametrize(
    ("earlier", "later", "error", "message"),
    [
        ("2026-03-02", None, TrainingMissingError, r"--from=2026-03-02: .* there are 2026-03-01 weekly a \(a\), 2026"),
        (
            None,
            "nobody",
            TrainingMissingError,
            r"--to=nobody: the tables hold no such run; there are 2026-03-01 weekly a",
        ),
        ("c", "a", ConfigError, "--from=2026-03-15 is after --to=2026-03-01; exchange them"),
        ("a", "a", ConfigError, r"both 2026-03-01 weekly a \(a\); name two trainings"),
        ("2026-03-01", "a", ConfigError, "name two trainings"),
    ],
)
def test_what_is_refused(earlier, later, error, message):
    with pytest.raises(error, match=message):
        choose([A, B, C], NAMES, earlier, later)


def test_a_tower_that_only_one_training_has():
    message = r"training 2026-03-15 weekly c \(c\) has no tower 'user'; leave it out with --towers=item"
    with pytest.raises(TrainingMissingError, match=message):
        choose([A, trained(15, "c", {"item": 5})], NAMES)
    assert choose([A, trained(15, "c", {"item": 5})], ("item",)) is not None


def test_one_training_and_none():
    assert choose([A], NAMES) is None
    assert choose([A, B, C], NAMES, None, "a") is None  # after each training, the first one as well
    assert choose([B, B2], NAMES, "b", "b2") is not None
    with pytest.raises(TrainingMissingError, match="hold no training"):
        choose([], NAMES)


def test_many_trainings_are_not_all_named():
    many = [trained(day, f"r{day}") for day in range(1, 31)]
    with pytest.raises(TrainingMissingError, match=r"there are 2026-03-21 weekly r21 .* and 20 earlier$"):
        choose(many, NAMES, "x")


def test_consecutive_pairs():
    told = []
    assert consecutive([A, B, C], NAMES, [], told.append) == [Pair(A, B), Pair(B, C)]
    assert consecutive([A, B, C], NAMES, [("a", "b")], told.append) == [Pair(B, C)]
    assert told == []
    assert consecutive([A, B, B2, C], NAMES, [], told.append) == [Pair(A, C)]
    assert told.pop().startswith("2026-03-08 has 2 runs, 2026-03-08 weekly b (b), ")
    assert consecutive([A, trained(8, "b", {"item": 5}), C], NAMES, [], told.append) == []
    assert len(told) == 2


@pytest.mark.parametrize(
    ("named", "there", "wanted"),
    [
        ((), ("item", "user"), Towers("user", "item")),
        ((), ("extra", "item", "user"), Towers("user", "item")),
        ((), ("movie", "user"), Towers("user", "movie")),
        ((), ("item", "query"), Towers("query", "item")),
        ((), ("item",), Towers(None, "item")),
        ((), ("user",), Towers("user", None)),
        (("a", "b"), ("a", "b", "c"), Towers("a", "b")),
        (("user",), ("user", "item"), Towers("user", None)),
    ],
)
def test_which_tower_is_which(named, there, wanted):
    assert history._roles(named, there) == wanted


def test_towers_that_cannot_be_told_apart():
    with pytest.raises(ConfigError, match="towers are left, right; say which is which with --towers=USERS,ITEMS"):
        history._roles((), ("left", "right"))
