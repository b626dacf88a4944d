"""Readers see both towers or none, while a job runs and wherever it is killed."""

import signal
import subprocess

import pytest
from job import MARCH_1, MARCH_2


def watch(job, process):
    """Polls both tables with one query until the process ends; returns all that was seen."""
    sql = (
        f"SELECT (SELECT COUNT(*) FROM {job.dataset}.two_tower_user_embedding), "
        f"(SELECT COUNT(*) FROM {job.dataset}.two_tower_item_embedding)"
    )
    seen = set()
    while process.poll() is None:
        seen.update(row.values() for row in job.client.query_and_wait(sql))
    return seen


def test_a_reader_never_sees_one_tower_without_the_other(job, store, models):
    first = store.log(models("longer"), "first", MARCH_1)
    assert job.run(first) == 0
    second = store.log(models("plain"), "second", MARCH_2)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    seen = watch(job, job.start(second, "--allow_dimension_change", **quiet))
    seen.update(job.query("SELECT (SELECT COUNT(*) FROM {user}), (SELECT COUNT(*) FROM {item})"))
    assert seen == {(50, 50), (50 + 3015, 50 + 2014)}


def test_that_reader_notices_a_publication_in_two_jobs(job, store, models, tmp_path):
    """The same reader against the publish script split in two: it must see the half."""
    first = store.log(models("longer"), "first", MARCH_1)
    assert job.run(first) == 0
    second = store.log(models("plain"), "second", MARCH_2)
    hook = """
import dataclasses, time
from beam_pipeline.bigquery import publication, tables
def publish(client, what, launch, tallies):
    (training,) = what.trainings
    for tower in training.towers.values():
        half = dataclasses.replace(training, towers={tower.name: tower})
        of_run = {tower.name: tallies[training.run.run_id, tower.name]}
        client.query_and_wait(tables.publish_script(what.destination, 0, half, launch, "fail", of_run, "job"))
        time.sleep(1)
publication.publish = publish
"""
    process = job.hooked(tmp_path, hook, second, "--allow_dimension_change")
    seen = watch(job, process)
    assert process.returncode == 0, process.communicate()[0]
    assert (50 + 3015, 50) in seen


# A process that is killed at any step. After a step that is not the last, all is as before the next.


@pytest.mark.parametrize(
    ("step", "when"),
    [*((step, "before") for step in ("prepare", "write", "audit", "shape", "publish", "clean")), ("clean", "after")],
)
def test_a_killed_job_leaves_nothing_half_and_runs_again(job, store, models, tmp_path, step, when):
    first = store.log(models("longer"), "first", MARCH_1)
    assert job.run(first) == 0
    second = store.log(models("plain"), "second", MARCH_2)
    hook = f"""
import time
from beam_pipeline.bigquery import avro, publication
owner, name = (avro, "encode") if {step!r} == "write" else (publication, {step!r})
original = getattr(owner, name)
def stopped(*args, **options):
    if {when!r} == "after":
        original(*args, **options)
    print("HERE", flush=True)
    time.sleep(600)
setattr(owner, name, stopped)
"""
    process = job.hooked(tmp_path, hook, second, "--allow_dimension_change")
    assert any(line == "HERE\n" for line in process.stdout)
    process.kill()
    process.wait()
    there = {("2026-03-01", first): (50, 50), **({("2026-03-02", second): (3015, 2014)} if step == "clean" else {})}
    assert job.published() == there
    assert job.run(second, "--allow_dimension_change") == 0
    assert job.published() == {("2026-03-01", first): (50, 50), ("2026-03-02", second): (3015, 2014)}
    assert job.rows("user")[("2026-03-02", second)] == models("plain").rows("user")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_job_cleans_up(job, store, models, tmp_path, number):
    run = store.log(models("plain"), "plain", MARCH_1)
    hook = """
import time
from beam_pipeline.bigquery import publication
publication.audit = lambda *args: (print("HERE", flush=True), time.sleep(60))
"""
    process = job.hooked(tmp_path, hook, run)
    assert any(line == "HERE\n" for line in process.stdout)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1].startswith("error: interrupted; the tables hold this training whole or not at all")
    assert job.tables() == set()
    assert store.load_files(job.dataset) == []
