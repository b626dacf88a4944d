"""The tables of the newest training: replaced with the history, never by an older run, whatever is killed or at once."""

import re
import subprocess
import time
from datetime import timedelta

import pytest
from job import DESTINATION_TABLES, MARCH_1, MARCH_2, refused

from beam_pipeline import rollback

FLAGS = ["--latest_tables", "--allow_dimension_change"]
LATEST_TABLES = {"two_tower_user_embedding_latest", "two_tower_item_embedding_latest"}


def latest(job):
    """Returns the run that is in both latest tables, and its vectors; asserts that no other is, nor an id twice."""
    runs, models = set(), {}
    for tower in ("user", "item"):
        sql = f"SELECT train_date, mlflow_run_id, {tower}_id, {tower}_embedding FROM {job.dataset}.two_tower_{tower}_embedding_latest"
        rows = job.query(sql)
        runs |= {(str(day), run) for day, run, _, _ in rows}
        models[tower] = {name: vector for _, _, name, vector in rows}
        assert len(models[tower]) == len(rows)
    assert len(runs) == 1
    return runs.pop(), models


def test_the_newest_training_is_in_both(job, store, models):
    first = store.log(models("plain"), "first", MARCH_1)
    second = store.log(models("longer"), "second", MARCH_2)
    assert job.run(first, *FLAGS) == 0
    assert job.tables() == DESTINATION_TABLES | LATEST_TABLES
    assert latest(job) == (("2026-03-01", first), {t: models("plain").rows(t) for t in ("user", "item")})
    assert job.run(second, *FLAGS) == 0
    wanted = ("2026-03-02", second), {t: models("longer").rows(t) for t in ("user", "item")}
    assert latest(job) == wanted
    # Again, and a backfill of the older one: nothing changes.
    assert job.run(second, *FLAGS) == 0
    assert job.run(first, *FLAGS) == 0
    assert latest(job) == wanted
    assert {*job.published()} == {("2026-03-01", first), ("2026-03-02", second)}


def test_a_table_of_another_kind_is_refused_before_anything_is_written(job, store, models, capsys):
    run = store.log(models("plain"), "first", MARCH_1)
    job.query(f"CREATE TABLE {job.dataset}.two_tower_item_embedding_latest (train_date STRING)")
    message = "two_tower_item_embedding_latest cannot be used: column train_date is STRING, not DATE"
    assert message in refused(job, capsys, run, *FLAGS)


def test_an_older_run_fills_no_table_that_begins_later(job, store, models):
    """The history, published without the flag, has a newer one."""
    first = store.log(models("plain"), "first", MARCH_1)
    second = store.log(models("longer"), "second", MARCH_2)
    assert job.run(second) == 0
    assert job.run(first, *FLAGS) == 0
    assert job.query(f"SELECT COUNT(*) FROM {job.dataset}.two_tower_item_embedding_latest") == [(0,)]
    assert job.run(second, *FLAGS) == 0
    assert latest(job)[0] == ("2026-03-02", second)


def test_of_two_runs_of_one_date_the_later_start_wins(job, store, models):
    early = store.log(models("plain"), "early", MARCH_1 - timedelta(hours=2))
    late = store.log(models("longer"), "late", MARCH_1)
    assert job.run(late, *FLAGS) == 0
    assert job.run(early, *FLAGS, "--if_partition_taken=keep") == 0
    assert latest(job)[0] == ("2026-03-01", late)
    later = store.log(models("retrained"), "later", MARCH_1 + timedelta(minutes=10))
    assert job.run(later, *FLAGS, "--if_partition_taken=replace") == 0
    assert latest(job)[0] == ("2026-03-01", later)


def test_a_rollback_until_the_next_training(job, store, models, capsys):
    runs = [
        store.log(models(name), name, MARCH_1 + timedelta(days=n))
        for n, name in enumerate(("plain", "longer", "retrained"))
    ]
    place = [f"--dataset={job.dataset}", f"--project={job.client.project}"]
    assert job.run(runs[0]) == 0
    assert rollback.main(["--date=2026-03-01", *place]) == 1
    assert "there is no table" in capsys.readouterr().err
    assert job.run(runs[1], *FLAGS) == 0
    history = job.published()
    assert rollback.main([f"--run_id={runs[0]}", *place]) == 0
    assert re.search(r"rolled back +\S+two_tower_item_embedding_latest +to 2026-03-01", capsys.readouterr().out)
    assert latest(job) == (("2026-03-01", runs[0]), {t: models("plain").rows(t) for t in ("user", "item")})
    assert job.published() == history
    assert rollback.main(["--date=2026-04-01", *place]) == 1
    assert "--date=2026-04-01: the tables hold no training of that date" in capsys.readouterr().err
    assert job.run(runs[2], *FLAGS) == 0
    assert latest(job)[0] == ("2026-03-03", runs[2])


def watch(job, process):
    """Asks for history and latest table of both towers in one query until a process ends; returns what was seen."""
    counts = [
        f"(SELECT COUNT(*) FROM {job.dataset}.two_tower_{tower}_embedding{suffix})"
        for suffix in ("", "_latest")
        for tower in ("user", "item")
    ]
    seen = set()
    while process.poll() is None:
        seen.update(job.query(f"SELECT {', '.join(counts)}"))
    seen.update(job.query(f"SELECT {', '.join(counts)}"))
    return seen


def test_readers_see_history_and_latest_of_both_towers_change_together(job, store, models):
    first = store.log(models("longer"), "first", MARCH_1)
    second = store.log(models("plain"), "second", MARCH_2)
    assert job.run(first, *FLAGS) == 0
    seen = watch(job, job.start(second, *FLAGS, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
    assert seen == {(50, 50, 50, 50), (3065, 2064, 3015, 2014)}


@pytest.mark.parametrize(
    ("step", "when"), [("shape", "before"), ("publish", "before"), ("clean", "before"), ("clean", "after")]
)
def test_a_killed_job_leaves_nothing_half_and_runs_again(job, store, models, tmp_path, step, when):
    first = store.log(models("longer"), "first", MARCH_1)
    second = store.log(models("plain"), "second", MARCH_2)
    assert job.run(first, *FLAGS) == 0
    hook = f"""
import time
from beam_pipeline.bigquery import publication
original = publication.{step}
def stopped(*args, **options):
    if {when!r} == "after":
        original(*args, **options)
    print("HERE", flush=True)
    time.sleep(600)
publication.{step} = stopped
"""
    process = job.hooked(tmp_path, hook, second, *FLAGS)
    assert any(line == "HERE\n" for line in process.stdout)
    process.kill()
    process.wait()
    assert latest(job)[0] == (("2026-03-02", second) if step == "clean" else ("2026-03-01", first))
    assert job.run(second, *FLAGS) == 0
    assert latest(job) == (("2026-03-02", second), {t: models("plain").rows(t) for t in ("user", "item")})


def test_two_launches_at_once_end_with_the_newer_one(job, store, models):
    first = store.log(models("longer"), "first", MARCH_1)
    second = store.log(models("plain"), "second", MARCH_2)
    processes = [
        job.start(run, *FLAGS, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for run in (second, first)
    ]
    deadline = time.monotonic() + 100
    for process in processes:
        assert process.wait(max(1, deadline - time.monotonic())) == 0
    assert {*job.published()} == {("2026-03-01", first), ("2026-03-02", second)}
    assert latest(job) == (("2026-03-02", second), {t: models("plain").rows(t) for t in ("user", "item")})
