"""Which trainings the tables hold, and what is refused before anything is written."""

from history import refused
from worlds import towers

from beam_pipeline.bigquery.history import find_trainings

BOTH = {"user": 9, "item": 5}


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
    found = find_trainings(history.client, history.destination, ("user", "item"))
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
    assert "two_tower_user_embedding cannot be read: it has no column mlflow_run_id" in refused(history, capsys)


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
