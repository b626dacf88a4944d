"""The whole job against emulators: models by real tf-keras, a real MLflow store, compared with Keras row by row."""

import dataclasses
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.io.gcp.gcsio import GcsIO
from apache_beam.io.gcp.internal.clients.bigquery import BigqueryV2
from apache_beam.metrics.metric import Lineage
from google.cloud import bigquery
from job import DESTINATION_TABLES, MARCH_1, MARCH_2, refused

from beam_pipeline import __version__, tag
from beam_pipeline.bigquery import publication, staging, tables
from beam_pipeline.launch.launcher import launch
from beam_pipeline.launch.options import parse
from beam_pipeline.tracking import runs

# What is published.


@pytest.mark.parametrize("writer", ["columnar", "rows"])
def test_every_row_is_what_keras_says(job, store, models, writer):
    run = store.log(models("plain"), "plain", MARCH_1)
    done = job.subprocess(run, f"--writer={writer}", env={**os.environ, "TZ": "Pacific/Auckland"})
    assert done.returncode == 0, done.stderr
    assert job.rows("user") == {("2026-03-01", run): models("plain").rows("user")}
    assert job.rows("item") == {("2026-03-01", run): models("plain").rows("item")}
    constants = "mlflow_experiment_id, mlflow_experiment_name, mlflow_run_id, mlflow_run_name"
    for tower in ("user", "item"):
        assert job.query(f"SELECT DISTINCT {constants} FROM {{{tower}}}") == [
            (store.experiment_id, store.experiment, run, "plain")
        ]
    assert job.tables() == DESTINATION_TABLES
    assert store.load_files(job.dataset) == []


def test_both_writers_write_the_same(job, store, models):
    run = store.log(models("plain"), "plain", MARCH_1)
    assert job.run(run, "--writer=rows", "--table_prefix=a") == 0
    assert job.run(run, "--writer=columnar", "--table_prefix=b") == 0
    for tower in ("user", "item"):
        columns = f"train_date, mlflow_experiment_name, mlflow_run_name, {tower}_id, {tower}_embedding"
        by_rows, columnar = (
            job.query(f"SELECT {columns} FROM {job.dataset}.{p}_{tower}_embedding ORDER BY {tower}_id") for p in "ab"
        )
        assert by_rows == columnar
        assert len(by_rows) == len(models("plain").ids(tower))


def test_the_tables(job, store, models):
    assert job.run(store.log(models("longer"), "longer", MARCH_1)) == 0
    for tower in ("user", "item"):
        table = job.client.get_table(job.destination.table(tower))
        assert [(c.name, c.field_type, c.mode) for c in table.schema] == [
            (c.name, c.field_type, c.mode) for c in tables.schema_fields(tower)
        ]
        assert (table.time_partitioning.type_, table.time_partitioning.field) == ("DAY", "train_date")
        assert table.time_partitioning.expiration_ms is None
        assert table.clustering_fields == [f"{tower}_id"]


def test_special_rows_and_other_layouts(job, store, models):
    run = store.log(models("special"), "special", MARCH_1)
    assert job.run(run) == 0
    assert job.rows("user")[("2026-03-01", run)] == models("special").rows("user")
    assert job.run(run, "--include_oov") == 0
    with_oov = job.rows("user")[("2026-03-01", run)]
    assert {*with_oov} - {*models("special").ids("user")} == {"nothing", "[UNK]", "[UNK]:1", "[UNK]:2"}


def test_one_tower_alone_and_a_name_of_ones_own(job, store, models):
    run = store.log(models("longer"), "longer", MARCH_1)
    assert job.run(run, "--tower=movie=item_layer", "--table_prefix=films") == 0
    ((rows,),) = job.query(f"SELECT COUNT(DISTINCT movie_id) FROM {job.dataset}.films_movie_embedding")
    assert rows == 50


def test_the_latest_finished_run_of_an_experiment(job, store, models):
    old = store.log(models("longer"), "weekly", MARCH_1)
    new = store.log(models("longer"), "weekly", MARCH_2)
    store.log(models("longer"), "other", datetime(2026, 3, 3, tzinfo=UTC))
    store.log(models("longer"), "weekly", datetime(2026, 3, 4, tzinfo=UTC), status="FAILED")
    assert job.run(None, f"--experiment_name={store.experiment}", "--run_name=weekly") == 0
    assert [*job.published()] == [("2026-03-02", new)]
    assert old != new


def test_artifacts_on_cloud_storage(job, store, models):
    run = store.log(models("plain"), "on gs", MARCH_1, bucket=True)
    assert job.run(run) == 0
    assert job.rows("item") == {("2026-03-01", run): models("plain").rows("item")}


def test_the_multi_load_path(job, store, models, monkeypatch):
    """Above 15 TB or 10,000 files Beam loads temporary tables and copies them; here above a few kilobytes."""
    run = store.log(models("plain"), "plain", MARCH_1)
    options = staging.WriteStaging._sink_options
    for writer in ("columnar", "rows"):
        monkeypatch.setattr(staging, "MAX_FILE_BYTES", 20_000)
        monkeypatch.setattr(
            staging.WriteStaging, "_sink_options", lambda self: {**options(self), "max_partition_size": 100_000}
        )
        monkeypatch.setattr("beam_pipeline.reading.pieces.PIECE_BYTES", 10_000)
        assert job.run(run, f"--writer={writer}") == 0
        assert job.rows("user") == {("2026-03-01", run): models("plain").rows("user")}
        assert job.tables() == DESTINATION_TABLES


def test_no_tensorflow_in_a_whole_run(job, store, models, tmp_path):
    run = store.log(models("longer"), "longer", MARCH_1)
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, sys\n"
        "atexit.register(lambda: print('IMPORTED', 'tensorflow' in sys.modules, 'keras' in sys.modules))\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = job.subprocess(run, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "IMPORTED False False"


def test_help_imports_neither_tensorflow_nor_beam():
    command = [sys.executable, "-X", "importtime", "-m", "beam_pipeline", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--if_partition_taken" in done.stdout
    imported = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert not imported & {"tensorflow", "keras", "apache_beam", "mlflow"}


def test_what_a_person_sees(job, store, models):
    run = store.log(models("plain"), "spring", MARCH_1)
    done = job.subprocess(run)
    table = f"{job.client.project}.{job.dataset}.two_tower"
    out = done.stdout.splitlines()
    assert out[:-4] == [
        f"experiment  {store.experiment}",
        f"run         spring ({run}), trained 2026-03-01 UTC",
        f"model       {store.artifacts(run)}",
        f"user        3,016 rows × 8 float32 of user_layer → {table}_user_embedding",
        f"item        2,015 rows × 8 float32 of item_layer → {table}_item_embedding",
        f"ok    dataset      local.{job.dataset} in US",
        f"ok    table user   {table}_user_embedding will be made, partitions kept forever",
        f"ok    table item   {table}_item_embedding will be made, partitions kept forever",
        "ok    bucket       gs://warehouse in US",
        "note  permissions  not asked: emulators have none",
        "ok    size         at most 5,031 rows, 161 kB of vectors to read, 719 kB in BigQuery",
        "ok    cost         publishing reads 719 kB: about $0.00 at $6.25/TiB; loading is free",
    ]
    assert re.fullmatch(r"rows        5,031 of 5,031 \(100%\), [\d,]+ rows/s", out[-4])
    assert out[-3] == f"published   {table}_user_embedding, partition 2026-03-01: 3,015 rows"
    assert out[-2] == f"published   {table}_item_embedding, partition 2026-03-01: 2,014 rows"
    assert re.fullmatch(r"done        in \d+\.\d s, the first vectors read after \d+\.\d s", out[-1])
    assert "INFO:apache_beam" in done.stderr


def test_the_log(job, store, models):
    run = store.log(models("plain"), 'it\'s "é"', MARCH_1)
    assert job.run(run, "--job_name=nightly") == 0
    assert job.run(run) == 0
    columns = (
        "train_date, mlflow_experiment_id, mlflow_experiment_name, mlflow_run_id, mlflow_run_name, model_uri, tower, "
        "table_name, row_count, dimension, zero_vectors, bytes_read, pipeline_version"
    )
    log = f"{job.dataset}.two_tower_embedding_log"
    constants = (MARCH_1.date(), store.experiment_id, store.experiment, run, 'it\'s "é"', str(store.artifacts(run)))
    assert job.query(f"SELECT {columns} FROM {log} ORDER BY tower, published_at") == [
        (*constants, tower, job.destination.table(tower), rows, 8, 0, (rows + 1) * 32, __version__)
        for tower, rows in (("item", 2014), ("item", 2014), ("user", 3015), ("user", 3015))
    ]
    for tower in ("user", "item"):
        norms = np.linalg.norm(models("plain").vectors(tower), axis=1)
        sql = f"SELECT norm_min, norm_mean, norm_max FROM {log} WHERE tower = '{tower}'"
        for found in job.query(sql):
            assert found == pytest.approx((norms.min(), norms.mean(), norms.max()), rel=1e-12)
    ((jobs, launches, times),) = job.query(
        f"SELECT COUNT(DISTINCT job_name), COUNT(DISTINCT launch), COUNT(DISTINCT published_at) FROM {log}"
    )
    assert (jobs, launches, times) == (2, 2, 2)
    assert job.query(f"SELECT DISTINCT tower FROM {log} WHERE STARTS_WITH(checksum, 'crc32c:')  ORDER BY 1") == [
        ("item",),
        ("user",),
    ]


def test_a_publication_that_fails_is_not_in_the_log(job, store, models):
    first, second = (store.log(models("plain"), name, MARCH_1) for name in ("first", "second"))
    assert job.run(first) == 0
    assert job.run(second) == 1
    assert job.query(f"SELECT DISTINCT mlflow_run_id FROM {job.dataset}.two_tower_embedding_log") == [(first,)]


@pytest.mark.parametrize(("writer", "partition_bytes"), [("columnar", None), ("columnar", 100_000), ("rows", None)])
def test_staging_in_another_dataset_and_a_key(job, store, models, monkeypatch, writer, partition_bytes):
    """Emulators keep no key: what is asked for is looked at on its way.

    Beam copies from temporary tables where one load job does not suffice, and for the stock writer always.
    """
    made, jobs = [], []
    create = bigquery.Client.create_table
    monkeypatch.setattr(bigquery.Client, "create_table", lambda self, t, **o: made.append(t) or create(self, t, **o))
    insert = BigqueryV2.JobsService.Insert

    @functools.wraps(insert)
    def insert_and_note(self, request, *args, **options):
        jobs.append(request.job.configuration)
        return insert(self, request, *args, **options)

    monkeypatch.setattr(BigqueryV2.JobsService, "Insert", insert_and_note)
    if partition_bytes:
        options = staging.WriteStaging._sink_options
        monkeypatch.setattr(staging, "MAX_FILE_BYTES", 20_000)
        monkeypatch.setattr(
            staging.WriteStaging, "_sink_options", lambda self: {**options(self), "max_partition_size": partition_bytes}
        )
        monkeypatch.setattr("beam_pipeline.reading.pieces.PIECE_BYTES", 10_000)
    key = "projects/p/locations/us/keyRings/r/cryptoKeys/k"
    scratch = f"{job.dataset}_scratch"
    job.client.create_dataset(scratch)
    run = store.log(models("plain"), "plain", MARCH_1)
    flags = [f"--staging_dataset={scratch}", f"--kms_key={key}", "--require_partition_filter", f"--writer={writer}"]
    assert job.run(run, *flags) == 0
    assert job.rows("user") == {("2026-03-01", run): models("plain").rows("user")}
    assert len(made) == 6
    for table in made:
        assert table.encryption_configuration.kms_key_name == key
        assert table.labels == {"managed_by": "beam_pipeline"}
        assert (table.dataset_id == scratch) == ("_staging_" in table.table_id)
        assert bool(table.require_partition_filter) == table.table_id.endswith(("user_embedding", "item_embedding"))
    loads = [configuration.load for configuration in jobs if configuration.load]
    copies = [configuration.copy for configuration in jobs if configuration.copy]
    assert len(loads) == 2 if not copies else len(loads) == len(copies)
    assert bool(copies) == (writer == "rows" or partition_bytes is not None)
    assert {each.destinationEncryptionConfiguration.kmsKeyName for each in (*loads, *copies)} == {key}
    assert [*job.client.list_tables(scratch)] == []


def test_plan(job, store, models, capsys):
    run = store.log(models("plain"), "plain", MARCH_1)
    assert job.run(run, "--plan") == 0
    out = capsys.readouterr().out
    assert "ok    table user   " in out
    assert "BEGIN TRANSACTION;" in out
    assert f"mlflow_run_id = '{run}'" in out
    assert job.tables() == set()
    assert store.load_files(job.dataset) == []
    other = store.log(models("longer"), "other", MARCH_1)
    assert job.run(run) == 0
    capsys.readouterr()
    assert job.run(other, "--plan=json") == 1
    out, err = capsys.readouterr()
    plan = json.loads(out)
    assert not plan["go"]
    stops = [line["text"] for line in plan["findings"] if line["status"] == "stop"]
    assert len(stops) == 4  # the partition and the vector length, of both towers
    assert f"holds 3,015 rows of run {run}" in stops[0]
    assert err.splitlines()[-1] == f"error: {stops[0]}"
    assert job.run(other, "--plan", "--if_partition_taken=replace", "--allow_dimension_change") == 0
    assert "3,015 rows of run" in capsys.readouterr().out
    assert [*job.published()] == [("2026-03-01", run)]


def test_lineage_names_the_real_tables(job, store, models, monkeypatch):
    results = []
    run_pipeline = beam.Pipeline.run
    monkeypatch.setattr(
        beam.Pipeline, "run", lambda self, *a, **o: results.append(run_pipeline(self, *a, **o)) or results[-1]
    )
    run = store.log(models("plain"), "lineage", MARCH_1, bucket=True)
    assert job.run(run) == 0
    metrics = results[0].metrics()
    sinks, sources = Lineage.query(metrics, Lineage.SINK), Lineage.query(metrics, Lineage.SOURCE)
    for tower in ("user", "item"):
        assert f"bigquery:{job.destination.table(tower)}" in sinks
    assert any(source.startswith("gcs:warehouse.") and "variables.data" in source for source in sources)


# Reruns and neighbours.


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
import subprocess
from beam_pipeline.bigquery import publication
original = publication.shape
def shape(*args):
    original(*args)
    subprocess.run({job.command(first)!r}, check=True, capture_output=True)
publication.shape = shape
"""
    process = job.hooked(tmp_path, hook, second)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 1
    assert "was taken by another run while this job ran" in err.splitlines()[-1]
    assert [*job.published()] == [("2026-03-01", first)]
    assert job.tables() == DESTINATION_TABLES


def test_several_runs_at_once(job, store, models):
    runs = [store.log(models("plain"), "a", MARCH_1), store.log(models("retrained"), "b", MARCH_1)]
    commands = [job.command(run, "--if_partition_taken=replace") for run in [*runs, runs[0]]]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for command in commands]
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


# Tables that exist already.


def first_version(job, tower, **changes):
    fields = {
        "train_date": "DATE",
        "mlflow_run_id": "STRING",
        "mlflow_experiment_name": "STRING",
        "mlflow_run_name": "STRING",
        f"{tower}_id": "STRING",
    } | changes
    schema = [bigquery.SchemaField(name, type_) for name, type_ in fields.items()]
    schema.append(bigquery.SchemaField(f"{tower}_embedding", "FLOAT64", "REPEATED"))
    table = bigquery.Table(job.destination.table(tower), schema=schema)
    table.time_partitioning = bigquery.TimePartitioning(field="train_date")
    return table


def test_a_table_of_the_first_version_is_extended(job, store, models):
    for tower in ("user", "item"):
        job.client.create_table(first_version(job, tower))
    job.client.create_table(bigquery.Table(job.destination.log, schema=tables.LOG_SCHEMA[:5]))  # an early log
    job.query("INSERT INTO {user} VALUES (DATE '2026-02-01', 'old', 'two_tower', 'n', 'u1', [1.0,2,3,4,5,6,7,8])")
    run = store.log(models("plain"), "plain", MARCH_1)
    assert job.run(run) == 0
    assert job.rows("user", "train_date > DATE '2026-02-01'") == {("2026-03-01", run): models("plain").rows("user")}
    assert job.query("SELECT DISTINCT mlflow_experiment_id FROM {user} ORDER BY 1") == [
        (None,),
        (store.experiment_id,),
    ]
    ((old,),) = job.query("SELECT user_embedding FROM {user} WHERE mlflow_run_id = 'old'")
    assert old == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    log = f"SELECT tower, row_count, pipeline_version FROM {job.dataset}.two_tower_embedding_log ORDER BY tower"
    assert job.query(log) == [("item", 2014, __version__), ("user", 3015, __version__)]


def test_a_history_with_names_of_its_own_goes_on(job, store, models, capsys):
    """The job that this one replaces wrote tables whose names end in `_history`; --table_suffix continues them."""
    flags = ["--table_suffix=_history"]
    job.destination = dataclasses.replace(job.destination, suffix="_history")
    for tower in ("user", "item"):
        job.client.create_table(first_version(job, tower))
    run = store.log(models("longer"), "longer", MARCH_1)
    assert job.run(run, *flags) == 0
    assert job.tables() == {
        *(f"two_tower_{tower}_embedding_history" for tower in ("user", "item")),
        *(f"two_tower_embedding_history_{which}" for which in ("lock", "log")),
    }
    tagged = [f"--tracking_uri={store.uri}", f"--dataset={job.dataset}", f"--project={job.client.project}"]
    capsys.readouterr()
    assert tag.main([f"--run_id={run}", *tagged, *flags]) == 0
    assert f"{job.dataset}.two_tower_user_embedding_history" in capsys.readouterr().out


def test_an_incompatible_table_is_refused(job, store, models, capsys):
    job.client.create_table(first_version(job, "item", item_id="INT64"))
    assert job.run(store.log(models("plain"), "plain", MARCH_1)) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "two_tower_item_embedding cannot be used: column item_id is INT" in error
    assert "not STRING; rename it" in error
    assert job.tables() == {"two_tower_item_embedding"}


def test_another_vector_length(job, store, models, capsys):
    assert job.run(store.log(models("plain"), "plain", MARCH_1)) == 0
    longer = store.log(models("longer"), "longer", MARCH_2)
    assert job.run(longer) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "vectors of 12 values, but the latest partition of" in error
    assert "(2026-03-01) holds vectors of 8" in error
    assert job.run(longer, "--allow_dimension_change") == 0
    assert {len(v) for v in job.rows("user")[("2026-03-02", longer)].values()} == {12}


# Bad input: one line, exit 1, nothing published, nothing left.


def test_unknown_runs(job, store, capsys):
    assert "no run 'feedbeef" in refused(job, capsys, "feedbeef" * 4)
    assert "no experiment 'nope' in" in refused(job, capsys, None, "--experiment_name=nope")
    line = refused(job, capsys, None, f"--experiment_name={store.experiment}", "--run_name=nope")
    assert "has no FINISHED run named 'nope'" in line


def test_an_experiment_without_a_finished_run(job, store, models, capsys):
    store.log(models("longer"), "running", MARCH_1, experiment="unfinished", status="RUNNING")
    assert "has no FINISHED run;" in refused(job, capsys, None, "--experiment_name=unfinished")


@pytest.mark.parametrize(
    ("status", "note"),
    [
        ("FINISHED", []),
        ("RUNNING", ["{run} is RUNNING: start the job again if it logs its model again before it ends"]),
        ("FAILED", ["{run} is FAILED: make sure that its model is the one to publish"]),
    ],
)
def test_a_named_run_that_has_not_finished_is_noted(job, store, models, capsys, status, note):
    run = store.log(models("longer"), "named", MARCH_1, status=status)
    assert job.run(run, "--plan=json") == 0
    findings = json.loads(capsys.readouterr().out)["findings"]
    notes = [(line["status"], line["text"]) for line in findings if line["check"] == "run"]
    assert notes == [("note", text.format(run=run)) for text in note]


def test_a_tracking_server_that_is_not_there(job, capsys):
    begin = datetime.now(UTC)
    line = refused(job, capsys, "0" * 32, "--tracking_uri=http://127.0.0.1:9")
    assert "MLflow at http://127.0.0.1:9 does not answer" in line
    assert (datetime.now(UTC) - begin).total_seconds() < 30
    assert "no MLflow store at sqlite:////no/such.db" in refused(
        job, capsys, "0" * 32, "--tracking_uri=sqlite:////no/such.db"
    )


def test_a_tracking_server_that_never_answers(job, capsys, monkeypatch):
    import socket

    assert runs._PATIENCE <= 10
    monkeypatch.setattr(runs, "_PATIENCE", 2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        begin = datetime.now(UTC)
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert "does not answer" in refused(job, capsys, "0" * 32, f"--tracking_uri={uri}")
    assert (datetime.now(UTC) - begin).total_seconds() < 3 * 2


def test_no_model_in_the_run(job, store, models, capsys):
    run = store.log(models("longer"), "longer", MARCH_1)
    line = refused(job, capsys, run, "--artifact_path=other")
    assert "/other does not hold a model" in line
    assert "--artifact_path" in line
    shutil.rmtree(store.artifacts(run))
    assert "does not hold a model" in refused(job, capsys, run)


def test_a_tower_that_is_not_there(job, store, models, capsys):
    run = store.log(models("longer"), "longer", MARCH_1)
    line = refused(job, capsys, run, "--tower=user=user_layer", "--tower=item=film_layer")
    assert "tower 'item': layer 'film_layer' does not exist" in line
    assert "item_layer, user_layer" in line


def data_file(model):
    return next((model.folder / "variables").glob("*.data-*"))


def test_truncated_weights(job, store, damaged, capsys):
    model = damaged("plain")
    with data_file(model).open("r+b") as file:
        file.truncate(1000)
    assert "has 1,000 bytes, but bytes" in refused(job, capsys, store.log(model, "cut", MARCH_1))


def test_weights_cut_while_the_job_runs(job, store, models, tmp_path):
    run = store.log(models("plain"), "cut", MARCH_1)
    hook = """
from beam_pipeline.reading import transforms
original = transforms.read_piece
def read_piece(run_id, piece, tower, open_file, *rest):
    open(tower.matrix.path, "r+b").truncate(1000)
    return original(run_id, piece, tower, open_file, *rest)
transforms.read_piece = read_piece
"""
    process = job.hooked(tmp_path, hook, run)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 1
    assert "has 1,000 bytes" in err.splitlines()[-1]
    assert job.tables() == set()


@pytest.mark.parametrize("what", ["missing", "corrupt"])
def test_a_bad_index(job, store, damaged, capsys, what):
    model = damaged("plain")
    index = model.folder / "variables" / "variables.index"
    if what == "missing":
        index.unlink()
    else:
        index.write_bytes(index.read_bytes()[:-1] + b"\0")
    line = refused(job, capsys, store.log(model, what, MARCH_1))
    assert "variables.index " + ("does not exist" if what == "missing" else "is not a checkpoint index") in line


@pytest.mark.parametrize("at", [0, 5_000, 60_000, 160_000])
@pytest.mark.parametrize("piece_bytes", [16 << 20, 1000])
def test_weights_that_do_not_match_their_checksum(job, store, damaged, capsys, monkeypatch, at, piece_bytes):
    monkeypatch.setattr("beam_pipeline.reading.pieces.PIECE_BYTES", piece_bytes)
    model = damaged("plain")
    data = bytearray(data_file(model).read_bytes())
    data[at] ^= 1
    data_file(model).write_bytes(data)
    line = refused(job, capsys, store.log(model, "flipped", MARCH_1))
    assert "do not match the checkpoint's crc32c" in line


def overwrite_vector(model, row, value):
    """Writes a value into the item matrix, the second of the file, checksum and all left as they are."""
    import numpy as np

    data = bytearray(data_file(model).read_bytes())
    start = 3016 * 8 * 4 + row * 8 * 4 + 12
    data[start : start + 4] = np.float32(value).tobytes()
    data_file(model).write_bytes(data)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite(job, store, damaged, capsys, value):
    model = damaged("plain")
    overwrite_vector(model, 8, value)
    line = refused(job, capsys, store.log(model, "diverged", MARCH_1))
    assert "tower 'item': the vector of id 'item 7' (row 8) holds NaN or infinity" in line


def rewrite_items(model, change):
    path = model.folder / "assets" / "items.txt"
    path.write_bytes(b"\n".join(change(path.read_bytes().split(b"\n")[:-1])) + b"\n")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda ids: [*ids, b"one more"], "id 'one more' has row 2,015, but the matrix has only 2,015 rows"),
        (lambda ids: [*ids[:9], b"", *ids[10:]], "the id of row 10 is empty"),
        (lambda ids: [*ids[:9], ids[3], *ids[10:]], "id 'item 3' appears 2 times in the vocabulary"),
        (lambda ids: [*ids[:9], b"\xff\xfe", *ids[10:]], "id '\\\\xff\\\\xfe' (row 10) is not UTF-8"),
    ],
)
def test_bad_ids(job, store, damaged, capsys, change, words):
    model = damaged("plain")
    rewrite_items(model, change)
    line = refused(job, capsys, store.log(model, "bad ids", MARCH_1))
    assert f"tower 'item': {words}" in line


def test_fewer_ids_than_rows_is_fine(job, store, damaged):
    model = damaged("plain")
    rewrite_items(model, lambda ids: ids[:-10])
    run = store.log(model, "fewer", MARCH_1)
    assert job.run(run) == 0
    assert job.published() == {("2026-03-01", run): (3015, 2004)}


def test_a_missing_dataset(job, store, models, capsys):
    run = store.log(models("longer"), "longer", MARCH_1)
    line = refused(job, capsys, run, "--dataset=raw_nowhere")
    assert "raw_nowhere does not exist; make it where the bucket is: bq --location=EU mk --dataset" in line
    assert "raw_nowhere" not in {dataset.dataset_id for dataset in job.client.list_datasets()}


def test_a_local_artifact_on_a_distributed_runner(job, store, models, capsys):
    run = store.log(models("longer"), "longer", MARCH_1)
    line = refused(job, capsys, run, "--runner=DataflowRunner", "--region=europe-west1")
    assert "DataflowRunner cannot read the local folder" in line


def test_no_destination(store, models, capsys, monkeypatch):
    for name in ("BIGQUERY_EMULATOR_HOST", "STORAGE_EMULATOR_HOST", "GOOGLE_CLOUD_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    run = store.log(models("longer"), "longer", MARCH_1)
    assert launch(parse([f"--run_id={run}", f"--tracking_uri={store.uri}"])) == 1
    assert "--warehouse=DIR" in capsys.readouterr().err.splitlines()[-1]


def test_ids_are_data_in_every_query(job, store, damaged, capsys):
    """Ids with quotes and backslashes survive the audit's own queries too."""
    model = damaged("plain")
    rewrite_items(model, lambda ids: [*ids[:8], b"it's `x` \\", b"it's `x` \\", *ids[10:]])
    line = refused(job, capsys, store.log(model, "quotes", MARCH_1))
    assert 'id "it\'s `x` \\\\" appears 2 times' in line


# Readers see both towers or none.


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
    command = job.command(second, "--allow_dimension_change")
    seen = watch(job, subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
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
    for tower in training.towers:
        half = dataclasses.replace(training, towers=(tower,))
        of_run = {tower.name: tallies[training.run.run_id, tower.name]}
        client.query_and_wait(tables.publish_script(what.destination, half, launch, "fail", of_run, "job"))
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
