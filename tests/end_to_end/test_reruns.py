"""The same run again, other runs beside it and at the same time, and what dead launches leave behind."""

import subprocess
from datetime import timedelta

from apache_beam.io.gcp.gcsio import GcsIO
from job import DESTINATION_TABLES, MARCH_1, MARCH_2

from beam_pipeline.bigquery import publication


def test_the_same_run_again(job, store, models):
    run = store.log(models("plain"), "plain", MARCH_1)
    for _ in range(2):
        assert job.run(run) == 0
        assert job.published() == {("2026-03-01", run): (3015, 2014)}


def test_partitions_beside_it_stay(job, store, models):
    first = store.log(models("plain"), "first", MARCH_1)
    second = store.log(models("retrained"), "second", MARCH_2)
    assert job.run(first) == 0
    assert job.run(second) == 0
    assert job.run(second, "--if_partition_taken=replace") == 0
    assert job.rows("user") == {
        ("2026-03-01", first): models("plain").rows("user"),
        ("2026-03-02", second): models("retrained").rows("user"),
    }


def test_a_taken_partition(job, store, models, capsys):
    first = store.log(models("plain"), "first", MARCH_1)
    second = store.log(models("retrained"), "second", MARCH_1)
    assert job.run(first) == 0
    assert job.run(second) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: partition 2026-03-01 of ")
    assert f"holds 3,015 rows of run {first}; --if_partition_taken=replace" in error
    assert [*job.published()] == [("2026-03-01", first)]
    assert job.run(second, "--if_partition_taken=keep") == 0
    assert {*job.published()} == {("2026-03-01", first), ("2026-03-01", second)}
    # Now the partition holds another run, whichever of the two comes again.
    assert job.run(first) == 1
    assert job.run(first, "--if_partition_taken=keep") == 0
    assert {*job.published()} == {("2026-03-01", first), ("2026-03-01", second)}
    assert job.run(second, "--if_partition_taken=replace") == 0
    assert [*job.published()] == [("2026-03-01", second)]
    assert job.rows("item") == {("2026-03-01", second): models("retrained").rows("item")}


def test_a_partition_taken_while_the_job_runs(job, store, models, tmp_path):
    first = store.log(models("plain"), "first", MARCH_1)
    second = store.log(models("retrained"), "second", MARCH_1)
    hook = f"""
import os, time
from beam_pipeline.bigquery import publication
original = publication.shape
def shape(*args):
    original(*args)
    print("HERE", flush=True)
    while not os.path.exists({str(tmp_path / "taken")!r}):
        time.sleep(0.05)
publication.shape = shape
"""
    process = job.hooked(tmp_path, hook, second)
    assert any(line == "HERE\n" for line in process.stdout)
    assert job.run(first) == 0
    (tmp_path / "taken").touch()
    _, err = process.communicate(timeout=100)
    assert process.returncode == 1
    assert "was taken by another run while this job ran" in err.splitlines()[-1]
    assert [*job.published()] == [("2026-03-01", first)]
    assert job.tables() == DESTINATION_TABLES


def test_several_runs_at_once(job, store, models):
    runs = [store.log(models("plain"), "a", MARCH_1), store.log(models("retrained"), "b", MARCH_1)]
    started = [job.start(run, "--if_partition_taken=replace", stderr=subprocess.STDOUT) for run in [*runs, runs[0]]]
    outputs = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], outputs
    ((key, counts),) = job.published().items()
    assert key[1] in runs
    assert counts == (3015, 2014)
    assert job.tables() == DESTINATION_TABLES


def test_load_files_of_dead_launches_are_swept(job, store, models, monkeypatch):
    from google.cloud import storage

    bucket = storage.Client().bucket("warehouse")
    folder = f"tmp/{job.dataset}"
    bucket.blob(f"{folder}/embedding_loads/dead/bq_load/1/t/file").upload_from_string(b"x")
    bucket.blob(f"{folder}/other").upload_from_string(b"x")
    run = store.log(models("longer"), "longer", MARCH_1)
    assert job.run(run) == 0
    assert len(store.load_files(job.dataset)) == 2  # too young to be swept
    monkeypatch.setattr(publication, "STAGING_LIFE", timedelta(0))
    assert job.run(run) == 0
    assert store.load_files(job.dataset) == [f"{folder}/other"]


def test_a_bucket_that_deletes_nothing_fails_no_job(job, store, models, monkeypatch, caplog):
    """As with retention or holds: a failed job would be started again, and publish, for ever."""
    monkeypatch.setattr(GcsIO, "delete_batch", lambda self, paths: [(path, 403) for path in paths])
    run = store.log(models("longer"), "held", MARCH_1)
    assert job.run(run) == 0
    assert job.published() == {("2026-03-01", run): (50, 50)}
    assert job.tables() == DESTINATION_TABLES
    assert len(store.load_files(job.dataset)) == 2
    assert "not all is deleted: gs://warehouse/tmp/" in caplog.text
