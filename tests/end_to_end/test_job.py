"""The whole job against emulators: models by real tf-keras, a real MLflow store, compared with Keras row by row."""

import functools
import json
import os
import re
import subprocess
import sys
from datetime import UTC, datetime

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.io.gcp.internal.clients.bigquery import BigqueryV2
from apache_beam.metrics.metric import Lineage
from google.cloud import bigquery
from job import DESTINATION_TABLES, MARCH_1, MARCH_2

from beam_pipeline import __version__
from beam_pipeline.bigquery import staging, tables


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
            staging.WriteStaging, "_sink_options", lambda self: {**options(self), "max_partition_size": 40_000}
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
    done = job.cold(run, env={**os.environ, "PYTHONPATH": path})
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
    done = job.cold(run)
    table = f"{job.client.project}.{job.dataset}.two_tower"
    out = done.stdout.splitlines()
    assert out[:-4] == [
        f"experiment  {store.experiment}",
        f"run         spring ({run}), trained 2026-03-01 UTC",
        f"model       {store.artifacts(run)}",
        f"user        3,016 rows × 8 float32 of user_layer → {table}_user_embedding",
        f"item        2,015 rows × 8 float32 of item_layer → {table}_item_embedding",
        f"ok    dataset      local.{job.dataset} in US",
        f"ok    table user   {table}_user_embedding will be created, partitions kept forever",
        f"ok    table item   {table}_item_embedding will be created, partitions kept forever",
        "ok    bucket       gs://warehouse in US",
        "note  permissions  not checked: emulators have none",
        "ok    size         at most 5,031 rows, 161 kB of vectors to read, 719 kB in BigQuery",
        "ok    cost         publishing reads 452 kB: about $0.00 at $6.25/TiB; loading is free",
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


@pytest.mark.parametrize(("writer", "partition_bytes"), [("columnar", None), ("columnar", 40_000), ("rows", None)])
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
    assert f"-- run {run};" in out
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
