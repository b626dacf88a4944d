"""Which pairs are compared, and what cannot be."""

from datetime import date

import pytest
from history import refused
from worlds import towers

from beam_pipeline.comparison import pairs
from beam_pipeline.comparison.pairs import Towers, choose, consecutive
from beam_pipeline.comparison.tables import Pair, Trained
from beam_pipeline.errors import ConfigError, TrainingMissingError

BOTH = {"user": 9, "item": 5}


def trained(day, run, rows=None):
    return Trained(date(2026, 3, day), run, f"weekly {run}", "two_tower", rows or BOTH)


A, B, B2, C = trained(1, "a"), trained(8, "b"), trained(8, "b2"), trained(15, "c")
NAMES = ("user", "item")


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
    assert pairs._roles(named, there) == wanted


def test_towers_that_cannot_be_told_apart():
    with pytest.raises(ConfigError, match="towers are left, right; say which is which with --towers=USERS,ITEMS"):
        pairs._roles((), ("left", "right"))


# From tables.


def test_trainings_are_found_with_the_log_and_without(history):
    """A partition that is older than the log, one that was replaced since, one with two runs, one half gone."""
    made = towers(users=9, items=5, dimension=2)
    history.publish("2026-03-01", "old", made, logged=False)
    history.publish("2026-03-08", "new", made)
    history.log("2026-03-08", "replaced", {"user": 8, "item": 4})
    history.query("UPDATE {d}.two_tower_embedding_log SET published_at = '2026-03-01' WHERE mlflow_run_id = 'replaced'")
    history.publish("2026-03-15", "first", made)
    history.publish("2026-03-15", "second", made)
    history.publish("2026-03-22", "half", made)
    history.query("DELETE FROM {d}.two_tower_user_embedding WHERE train_date = '2026-03-22'")
    history.log("2026-03-29", "gone", {"user": 9, "item": 5})
    found = pairs.find_trainings(history.client, history.destination, ("user", "item"))
    assert [(str(one.train_date), one.run_id, one.rows) for one in found] == [
        ("2026-03-01", "old", BOTH),
        ("2026-03-08", "new", BOTH),
        ("2026-03-15", "first", BOTH),
        ("2026-03-15", "second", BOTH),
        ("2026-03-22", "half", {"item": 5}),
    ]
    assert [one.run_name for one in found][:2] == ["weekly old", "weekly new"]


def test_tables_of_the_first_version_without_a_log(history):
    """Six columns, as before there was an experiment's id or a log."""
    made = towers(users=90, items=80)
    for day, run in (("2026-03-01", "r1"), ("2026-03-08", "r2")):
        history.publish(day, run, made, logged=False)
    for tower in ("user", "item"):
        name = f"{history.dataset}.two_tower_{tower}_embedding"
        history.query(
            f"CREATE OR REPLACE TABLE {name} PARTITION BY train_date AS SELECT train_date, mlflow_run_id, "
            f"mlflow_experiment_name, mlflow_run_name, {tower}_id, {tower}_embedding FROM {name}"
        )
    assert history.compare() == 0
    assert len(history.results()) == 2


def test_bad_input_is_one_line_and_nothing_is_written(history, capsys, tmp_path):
    assert history.compare() == 1
    assert "there is no history in" in capsys.readouterr().err
    made = towers(users=9, items=5, dimension=2)
    history.publish("2026-03-01", "r1", made)
    history.publish("2026-03-08", "r2", made)
    history.publish("2026-03-15", "r3", {"item": made["item"]})
    d = history.dataset
    cases = {
        ("--to=2026-03-02",): "error: --to=2026-03-02: the tables hold no training of that date; there are 2026-03-01",
        ("--from=r9",): "error: --from=r9: the tables hold no such run; there are 2026-03-01 weekly r1 (r1), ",
        ("--from=r2", "--to=r1"): "error: --from=2026-03-08 is after --to=2026-03-01; exchange them",
        (
            "--from=r1",
            "--to=2026-03-01",
        ): "error: --from and --to are both 2026-03-01 weekly r1 (r1); name two trainings",
        (): "error: training 2026-03-15 weekly r3 (r3) has no tower 'user'; leave it out with --towers=item",
        ("--towers=user,song",): "error: --towers: there is no table local.",
        (
            "--to=r2",
            "--labels=item=SELECT 1 AS nothing",
        ): "error: --labels=item=…: the query for id, label and group_name",
        (
            "--to=r2",
            f"--labels=item=SELECT mlflow_run_id AS id, item_id AS label, '' AS group_name FROM {d}.two_tower_item_embedding",
        ): ("error: --labels=item=…: the query gives id 'r1' 5 times; an id has one label"),
        ("--to=r2", "--labels=song=SELECT 1 AS id, 2 AS label, 3 AS group_name"): (
            "error: --labels=song=…: there is no tower 'song'; towers are user, item"
        ),
        ("--to=r2", f"--report={tmp_path}"): f"error: the page {tmp_path} cannot be written: it is a folder",
        (
            "--to=r2",
            f"--report={tmp_path}/no/page.html",
        ): "cannot be written: No such file or directory; name another file",
    }
    for flags, message in cases.items():
        assert message in refused(history, capsys, *flags), flags
    assert [*tmp_path.iterdir()] == []
    history.query(
        "CREATE OR REPLACE TABLE {d}.two_tower_user_embedding PARTITION BY train_date AS "
        "SELECT train_date, user_id, user_embedding FROM {d}.two_tower_user_embedding"
    )
    assert "two_tower_user_embedding cannot be compared: it has no column mlflow_run_id" in refused(history, capsys)


def test_a_missing_permission_stops_before_anything_is_written(history, capsys, monkeypatch):
    from fake_storage_read import serve

    history.publish("2026-03-01", "r1", towers(users=9, items=5))
    history.publish("2026-03-08", "r2", towers(users=9, items=5))
    with serve(refuses=True) as host:
        monkeypatch.setenv("BIGQUERY_STORAGE_EMULATOR_HOST", host)
        assert "grant it roles/bigquery.readSessionUser on project local" in refused(history, capsys)


def test_a_result_table_that_is_another_one(history, capsys):
    history.publish("2026-03-01", "r1", towers(users=9, items=5))
    history.publish("2026-03-08", "r2", towers(users=9, items=5))
    history.query("CREATE TABLE {d}.two_tower_embedding_comparison (train_date DATE, tower INT64)")
    line = refused(history, capsys)
    assert (
        "two_tower_embedding_comparison cannot be used: it is not partitioned by DAY(train_date); column tower" in line
    )
