"""--all_runs: every training of an experiment in one job, against the emulators."""

import dataclasses
import json
import shutil
from datetime import UTC, date, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from job import MARCH_1, refused

from beam_pipeline.errors import PartitionTakenError
from beam_pipeline.tracking.runs import choose
from beam_pipeline.training import Run


def week(number):
    return MARCH_1 + timedelta(weeks=number)


def log_weeks(store, model, experiment, count, **options):
    """Logs trainings into an experiment of their own; returns {date: run id}."""
    runs = {}
    for number in range(count):
        runs[str(week(number).date())] = store.log(
            model, f"week {number}", week(number), experiment=experiment, **options
        )
    return runs


def test_every_run_in_one_job_each_in_its_partition(job, store, models, capsys):
    runs = {}
    for number, name in enumerate(("plain", "retrained", "plain")):
        runs[name, str(week(number).date())] = store.log(models(name), name, week(number), experiment="backfill")
    store.log(models("longer"), "failed", week(3), experiment="backfill", status="FAILED")
    assert job.run(None, "--experiment_name=backfill", "--all_runs") == 0
    for tower in ("user", "item"):
        assert job.rows(tower) == {(day, run): models(name).rows(tower) for (name, day), run in runs.items()}
    out = capsys.readouterr().out
    assert "runs        3 to publish, 0 published already" in out
    assert "3 partitions 2026-03-01 to 2026-03-15: 9,045 rows" in out
    log = f"SELECT DISTINCT mlflow_run_id FROM {job.dataset}.two_tower_embedding_log"
    assert {run for (run,) in job.query(log)} == {*runs.values()}

    later = store.log(models("retrained"), "later", week(4), experiment="backfill")
    assert job.run(None, "--experiment_name=backfill", "--all_runs") == 0
    assert "runs        1 to publish, 3 published already" in capsys.readouterr().out
    assert job.published()[str(week(4).date()), later] == (3015, 2014)
    assert job.run(None, "--experiment_name=backfill", "--all_runs") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "done        nothing to do: 4 runs are published already"


def test_the_rows_writer_too(job, store, models):
    runs = log_weeks(store, models("plain"), "by rows", 2)
    assert job.run(None, "--experiment_name=by rows", "--all_runs", "--writer=rows") == 0
    assert job.rows("item") == {(day, run): models("plain").rows("item") for day, run in runs.items()}


def test_since_and_until(job, store, models, capsys):
    runs = log_weeks(store, models("longer"), "some weeks", 4)
    flags = ["--experiment_name=some weeks", "--all_runs"]
    assert job.run(None, *flags, "--since=2026-03-08", "--until=2026-03-15") == 0
    assert {*job.published()} == {item for item in runs.items() if "2026-03-08" <= item[0] <= "2026-03-15"}
    line = refused(job, capsys, None, *flags, "--since=2027-01-01")
    assert "has no FINISHED run since 2027-01-01; it has 4" in line


@pytest.mark.parametrize("how", ["fail", "replace", "keep"])
def test_two_runs_of_one_date(job, store, models, capsys, how):
    experiment = f"twice {how}"
    early = store.log(models("longer"), "early", MARCH_1, experiment=experiment)
    late = store.log(models("longer"), "late", MARCH_1 + timedelta(minutes=5), experiment=experiment)
    other = store.log(models("longer"), "other", week(1), experiment=experiment)
    flags = [f"--experiment_name={experiment}", "--all_runs", f"--if_partition_taken={how}"]
    if how == "fail":
        line = refused(job, capsys, None, *flags)
        assert f"runs {early} and {late} are both of 2026-03-01, and a partition holds one model" in line
        assert job.tables() == set()
        return
    assert job.run(None, *flags) == 0
    kept = {late, other} | ({early} if how == "keep" else set())
    assert {run for _, run in job.published()} == kept
    if how == "replace":
        assert f"early ({early}): run {late} of the same date takes its place" in capsys.readouterr().out


def test_a_run_without_a_model_is_left_out_and_a_damaged_one_stops(job, store, models, damaged, capsys):
    good = store.log(models("longer"), "good", MARCH_1, experiment="mixed")
    empty = store.log(models("longer"), "evaluation", week(1), experiment="mixed")
    for file in sorted(store.artifacts(empty).rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    store.artifacts(empty).rmdir()
    unsupported = store.log(models("longer"), "hdf5", MARCH_1 + timedelta(days=1), experiment="mixed")
    shutil.rmtree(store.artifacts(unsupported))
    store.artifacts(unsupported).mkdir()
    (store.artifacts(unsupported) / "model.h5").touch()
    assert job.run(None, "--experiment_name=mixed", "--all_runs") == 0
    out = capsys.readouterr().out
    assert f"left out    2026-03-08 evaluation ({empty}): " in out
    assert f"left out    2026-03-02 hdf5 ({unsupported}): " in out
    assert {*job.published()} == {("2026-03-01", good)}
    assert job.run(None, "--experiment_name=mixed", "--all_runs") == 0  # Started again, it has nothing left to do.
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == "done        nothing to do: 1 runs are published already, and 2 have no model"
    model = damaged("longer")
    data = next((model.folder / "variables").glob("*.data-*"))
    data.write_bytes(bytes([data.read_bytes()[0] ^ 1]) + data.read_bytes()[1:])
    store.log(model, "damaged", week(2), experiment="mixed")
    store.log(models("longer"), "after it", week(3), experiment="mixed")
    assert "do not match the checkpoint's crc32c" in refused(job, capsys, None, "--experiment_name=mixed", "--all_runs")
    assert {*job.published()} == {("2026-03-01", good)}


def test_a_date_older_than_the_partition_expiration(job, store, models, capsys):
    old = datetime.now(UTC) - timedelta(days=100)
    young = datetime.now(UTC) - timedelta(days=1)
    runs = [store.log(models("longer"), str(start.date()), start, experiment="ages") for start in (old, young)]
    flags = ["--experiment_name=ages", "--all_runs", "--partition_expiration_days=30"]
    line = refused(job, capsys, None, *flags)
    assert f"keeps partitions for 30 days, and {old.date()} was 100 days ago" in line
    assert line.endswith("lengthen that expiration, or leave the date out with --since")
    # One run has no --since.
    line = refused(job, capsys, runs[0], "--partition_expiration_days=30")
    assert line.endswith("BigQuery would delete its rows at once; lengthen that expiration")
    assert job.run(None, *flags, f"--since={young.date()}") == 0
    assert [day for day, _ in job.published()] == [str(young.date())]


def test_a_plan_of_all(job, store, models, capsys):
    runs = log_weeks(store, models("longer"), "planned", 3)
    assert job.run(None, "--experiment_name=planned", "--all_runs", "--plan=json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert [(t["train_date"], t["run_id"]) for t in plan["trainings"]] == [*runs.items()]
    assert plan["sql"].count("BEGIN TRANSACTION") == 3
    assert job.tables() == set()


RUN = Run("", "", "1", "e", date(2026, 3, 1), "")


@given(st.lists(st.tuples(st.integers(1, 5), st.booleans()), max_size=8), st.sampled_from(["fail", "replace", "keep"]))
def test_what_is_chosen(days, how):
    runs = [
        dataclasses.replace(RUN, run_id=str(number), train_date=date(2026, 3, day))
        for number, (day, _) in enumerate(sorted(days))
    ]
    published = {str(number) for number, (_, there) in enumerate(sorted(days)) if there}
    try:
        left, superseded = choose(runs, published, how)
    except PartitionTakenError:
        assert how == "fail"
        assert len({run.train_date for run in runs}) < len(runs)
        return
    assert not {run.run_id for run in left} & published
    if how == "keep":
        assert {run.run_id for run in left} | published == {run.run_id for run in runs}
    else:
        assert len({run.train_date for run in left}) == len(left)
    for earlier, later in superseded:
        assert earlier.train_date == later.train_date
        assert int(earlier.run_id) < int(later.run_id)
        assert earlier not in left
