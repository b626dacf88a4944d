"""What only the real services can prove; each test says what the emulators could not show.

A job here takes a minute or two, most of it in load jobs that Beam asks about every ten seconds, and on Dataflow some
ten minutes.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
import threading
import time
import uuid
from datetime import UTC, date, datetime, timedelta

import edges
import numpy as np
import pytest
from google.api_core.exceptions import Conflict
from google.cloud import bigquery, dataflow_v1beta3
from towers import described

from beam_pipeline.bigquery import indexes, publication, tables
from beam_pipeline.bigquery.publication import Publication
from beam_pipeline.launch import preflight, session
from beam_pipeline.reading.tally import Tally
from beam_pipeline.retrieval.command import main as search
from beam_pipeline.rollback import main as rollback
from beam_pipeline.training import Run, Training, by_name

DAY = datetime(2026, 3, 1, 23, 30, tzinfo=UTC)
DATAFLOW_SECONDS = 1800
"""How long a job on Dataflow may take: workers need minutes to start."""

pytestmark = pytest.mark.timeout(900)


def command(warehouse, store, run, *flags):
    return [
        sys.executable,
        "-m",
        "beam_pipeline",
        f"--run_id={run}",
        f"--tracking_uri={store.uri}",
        f"--dataset={warehouse.project}.{warehouse.dataset}",
        f"--table_prefix={warehouse.prefix}",
        f"--temp_location={warehouse.temp_location}",
        "--allow_dimension_change",  # Tests share the tables, and some publish short vectors.
        *flags,
    ]


def rows_of(client, destination, tower, run):
    sql = (
        f"SELECT {tower}_id, {tower}_embedding FROM `{destination.table(tower)}` "
        "WHERE train_date = '2026-03-01' AND mlflow_run_id = @run"
    )
    config = bigquery.QueryJobConfig(query_parameters=[bigquery.ScalarQueryParameter("run", "STRING", run)])
    return {row[0]: row[1] for row in client.query_and_wait(sql, job_config=config)}


@pytest.mark.parametrize("writer", ["columnar", "rows"])
def test_the_job_with_real_load_jobs(warehouse, destination, client, store, models, writer):
    """That BigQuery takes the Avro files, the staging tables' expirations and the publish script."""
    run = store.log(models("plain"), writer, DAY)
    flags = ["--if_partition_taken=keep", f"--writer={writer}", f"--project={warehouse.project}"]
    subprocess.run(command(warehouse, store, run, *flags), check=True)
    for tower in ("user", "item"):
        assert rows_of(client, destination, tower, run) == models("plain").rows(tower)
    left = [t.table_id for t in client.list_tables(warehouse.dataset) if "_staging_" in t.table_id]
    assert not [name for name in left if name.startswith(warehouse.prefix)]


def test_floats_are_widened_exactly(warehouse, destination, client):
    """That BigQuery loads Avro floats into FLOAT64 to the bit, where the schema says FLOAT64, and copies the table."""
    table = f"{destination.project}.{destination.dataset}.{warehouse.prefix}_edges"
    loaded = edges.load(client, table, f"{warehouse.temp_location}/{uuid.uuid4().hex}")
    assert loaded.tobytes() == edges.VECTORS.astype(np.float64).tobytes()


# One load job takes few and small files here, so that Beam loads temporary tables and copies them, as above 10,000.
MANY_FILES = """
from beam_pipeline.bigquery import staging
from beam_pipeline.reading import pieces
options = staging.WriteStaging._sink_options
staging.MAX_FILE_BYTES, pieces.PIECE_BYTES = 20_000, 10_000
staging.WriteStaging._sink_options = lambda self: {**options(self), "max_partition_size": 40_000}
"""


def test_the_job_with_temporary_tables(warehouse, destination, client, store, models, tmp_path):
    """That BigQuery copies what it loaded into Beam's temporary tables to the staging tables."""
    (tmp_path / "sitecustomize.py").write_text(MANY_FILES)
    run = store.log(models("plain"), "many files", DAY)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    flags = ["--if_partition_taken=keep", f"--project={warehouse.project}"]
    subprocess.run(command(warehouse, store, run, *flags), check=True, env={**os.environ, "PYTHONPATH": path})
    for tower in ("user", "item"):
        assert rows_of(client, destination, tower, run) == models("plain").rows(tower)


def wait_for_dataflow(project, region, job_id):
    """Waits for a job on Dataflow to end; fails if it does not succeed."""
    jobs = dataflow_v1beta3.JobsV1Beta3Client()
    request = dataflow_v1beta3.GetJobRequest(project_id=project, location=region, job_id=job_id)
    states = dataflow_v1beta3.JobState
    ended = {states.JOB_STATE_DONE, states.JOB_STATE_FAILED, states.JOB_STATE_CANCELLED, states.JOB_STATE_UPDATED}
    deadline = time.monotonic() + DATAFLOW_SECONDS
    while (state := jobs.get_job(request).current_state) not in ended:
        assert time.monotonic() < deadline, f"{job_id} is {state.name} after {DATAFLOW_SECONDS} s"
        time.sleep(15)
    assert state == states.JOB_STATE_DONE, f"{job_id} ended as {state.name}: gcloud dataflow jobs show {job_id}"


@pytest.mark.timeout(DATAFLOW_SECONDS + 600)
@pytest.mark.skipif("BEAM_PIPELINE_GCP_REGION" not in os.environ, reason="set BEAM_PIPELINE_GCP_REGION for Dataflow")
def test_the_job_on_dataflow(warehouse, destination, client, store, models):
    """That the graph runs on workers that share nothing with the launcher."""
    run = store.log(models("plain"), "dataflow", DAY, bucket=True)
    region = os.environ["BEAM_PIPELINE_GCP_REGION"]
    flags = [
        "--runner=DataflowRunner",
        f"--project={warehouse.project}",
        f"--region={region}",
        "--setup_file=./setup.py",
        "--if_partition_taken=keep",
    ]
    done = subprocess.run(command(warehouse, store, run, *flags), check=True, stdout=subprocess.PIPE, text=True)
    (job_id,) = re.findall(r"submitted +to DataflowRunner, job (\S+)", done.stdout)
    wait_for_dataflow(warehouse.project, region, job_id)
    for tower in ("user", "item"):
        assert rows_of(client, destination, tower, run) == models("plain").rows(tower)


@pytest.fixture
def staged(warehouse, destination, client):
    """A function that stages two rows of a run and returns (Publication, launch id, tallies), ready to be published."""

    def stage(run_id, how):
        run = Run(run_id, "n", "1", "e", date(2026, 3, 2), "gs://b/a")
        towers = tuple(described(name, rows=3, dimension=2) for name in ("user", "item"))
        what = Publication(
            destination, (Training(run, "gs://b/a", by_name(towers)),), warehouse.temp_location, how, "token"
        )
        tallies = {(run_id, name): Tally(2, 16, 1.4, 1.8, 2.3, 0) for name in what.towers}
        launch = uuid.uuid4().hex[:24]
        publication.prepare(client, what, launch)
        publication.shape(client, what, launch)
        for name in what.towers:
            rows = ", ".join(f"(DATE '2026-03-02', 0, 'id{i}', [1.0, {i}.0])" for i in (1, 2))
            client.query_and_wait(f"INSERT INTO `{destination.staging(name, launch)}` VALUES {rows}")
        return what, launch, tallies

    return stage


def test_publications_at_once_end_as_if_one_after_the_other(staged, client, destination):
    """That two transactions conflict on the lock table, and that the cancelled one is recognised and starts over."""
    ready = [staged(f"run{n}", "replace") for n in range(4)]
    threads = [threading.Thread(target=publication.publish, args=(client, *each)) for each in ready]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for tower in ("user", "item"):
        sql = f"SELECT mlflow_run_id, COUNT(*) FROM `{destination.table(tower)}` WHERE train_date = '2026-03-02' GROUP BY 1"
        ((_, count),) = [row.values() for row in client.query_and_wait(sql)]
        assert count == 2


def test_a_taken_partition_stops_the_transaction(staged, client):
    """That ERROR() aborts the script, with a message in which it is recognised."""
    publication.publish(client, *staged("first", "replace"))
    with pytest.raises(publication.PartitionTakenError):
        publication.publish(client, *staged("second", "fail"))


def test_a_job_id_is_used_once(client):
    """That BigQuery answers 409 to a job id that exists."""
    job_id = f"beam_pipeline_test_{uuid.uuid4().hex}"
    client.query("SELECT 1", job_id=job_id, job_retry=None).result()
    with pytest.raises(Conflict):
        client.query("SELECT 1", job_id=job_id, job_retry=None)


def test_readers_see_a_transaction_whole(staged, client, destination):
    """That one query over both tables never sees one tower without the other."""
    publication.publish(client, *staged("before", "replace"))
    what, launch, tallies = staged("after", "replace")
    sql = " UNION ALL ".join(
        f"SELECT '{tower}', mlflow_run_id, COUNT(*) FROM `{destination.table(tower)}` WHERE train_date = '2026-03-02' GROUP BY 2"
        for tower in ("user", "item")
    )
    thread = threading.Thread(target=publication.publish, args=(client, what, launch, tallies))
    thread.start()
    while thread.is_alive():
        seen = {row.values() for row in client.query_and_wait(sql)}
        assert len(seen) == 2
        assert len({run for _, run, _ in seen}) == 1


def test_no_expiration_is_inherited(warehouse, destination, client):
    """That a table made in a dataset with default expirations keeps its partitions."""
    dataset = bigquery.Dataset(f"{warehouse.project}.{warehouse.prefix}_defaults")
    dataset.location = destination.location
    dataset.default_table_expiration_ms = 3600 * 1000
    dataset.default_partition_expiration_ms = 3600 * 1000
    client.create_dataset(dataset)
    try:
        there = dataclasses.replace(destination, dataset=dataset.dataset_id)
        run = Run("r", "n", "1", "e", date(2020, 1, 1), "gs://b/a")
        training = Training(run, "gs://b/a", {"user": described("user", rows=3, dimension=2)})
        what = Publication(there, (training,), warehouse.temp_location, "fail", "token")
        publication.prepare(client, what, "launch")
        row = "(DATE '2020-01-01', 0, 'id', [1.0])"
        client.query_and_wait(f"INSERT INTO `{there.staging('user', 'launch')}` VALUES {row}")
        publication.audit(client, what, "launch", {("r", "user"): Tally(1, 8, 1.0, 1.0, 1.0, 0)})
        publication.shape(client, what, "launch")
        table = client.get_table(there.table("user"))
        assert table.expires is None
        assert table.time_partitioning.expiration_ms is None
    finally:
        client.delete_dataset(dataset, delete_contents=True)


def test_the_first_version_is_extended(warehouse, destination, client):
    """That BigQuery takes the ALTER TABLE."""
    name = f"{destination.table('old')}"
    schema = [field for field in tables.schema_fields("old") if field.name != "mlflow_experiment_id"]
    table = bigquery.Table(name, schema=schema)
    table.time_partitioning = bigquery.TimePartitioning(field="train_date")
    client.create_table(table)
    for statement in tables.add_columns_sql(name, client.get_table(name), tables.schema_fields("old")):
        client.query_and_wait(statement)
    assert tables.missing_columns(client.get_table(name), tables.schema_fields("old")) == []


def test_the_log_is_written_with_the_publication(staged, client, destination):
    """That BigQuery takes the log's INSERT in the transaction, and text from hexadecimal literals."""
    publication.publish(client, *staged("logged", "replace"))
    sql = f"SELECT tower, row_count, norm_max, mlflow_run_name FROM `{destination.log}` WHERE mlflow_run_id = 'logged'"
    assert {row.values() for row in client.query_and_wait(sql)} == {("user", 2, 2.3, "n"), ("item", 2, 2.3, "n")}


def test_a_plan_asks_for_permissions_and_locations(warehouse, destination, store, models):
    """That Resource Manager, Cloud Storage and BigQuery answer the report's questions as expected."""
    run = store.log(models("plain"), "plan", DAY)
    done = subprocess.run(
        command(warehouse, store, run, "--plan=json", "--if_partition_taken=keep", f"--project={warehouse.project}"),
        capture_output=True,
        text=True,
        check=True,
    )
    found = {line["check"]: line for line in json.loads(done.stdout)["findings"]}
    assert found["permissions"]["status"] == "ok", found["permissions"]
    assert "a query (dry run)" in found["permissions"]["text"]
    assert found["bucket"]["status"] == "ok", found["bucket"]


def test_tables_that_require_a_partition_filter(warehouse, destination, store, models):
    """That every query of the job names a partition: the second run reads and replaces what the first has made."""
    flags = ["--require_partition_filter", "--table_prefix", f"{warehouse.prefix}_filter"]
    for name in ("plain", "retrained"):
        run = store.log(models(name), f"{name} filter", DAY)
        flags_of_run = [*flags, f"--project={warehouse.project}", "--if_partition_taken=replace"]
        subprocess.run(command(warehouse, store, run, *flags_of_run), check=True)


@pytest.mark.skipif("BEAM_PIPELINE_GCP_KMS_KEY" not in os.environ, reason="set BEAM_PIPELINE_GCP_KMS_KEY to a key")
@pytest.mark.parametrize("writer", ["columnar", "rows"])
def test_every_table_has_the_key(warehouse, destination, client, store, models, writer):
    """That tables, load jobs and, with the writer of rows, copy jobs take --kms_key."""
    key, prefix = os.environ["BEAM_PIPELINE_GCP_KMS_KEY"], f"{warehouse.prefix}_key_{writer}"
    run = store.log(models("plain"), f"key {writer}", DAY)
    flags = [f"--kms_key={key}", f"--table_prefix={prefix}", f"--project={warehouse.project}", f"--writer={writer}"]
    subprocess.run(command(warehouse, store, run, *flags), check=True)
    made = [t.table_id for t in client.list_tables(warehouse.dataset) if t.table_id.startswith(prefix)]
    assert len(made) == 4
    for name in made:
        assert client.get_table(f"{warehouse.dataset}.{name}").encryption_configuration.kms_key_name == key


def test_the_latest_partition_is_found_in_the_metadata(staged, client, destination):
    """That INFORMATION_SCHEMA.PARTITIONS and a partition's rows answer as the preflight expects."""
    publication.publish(client, *staged("latest", "replace"))
    ((latest,),) = client.query_and_wait(tables.latest_partition_sql(destination.table("user")))
    assert latest == "20260302"
    assert preflight._length(client, destination.table("user"), "user", date(2026, 3, 2)) == 2


def test_vector_search(staged, client, destination):
    """That the column is one that VECTOR_SEARCH takes."""
    publication.publish(client, *staged("search", "replace"))
    table = destination.table("item")
    sql = (
        f"SELECT base.item_id FROM VECTOR_SEARCH((SELECT item_id, item_embedding FROM `{table}` WHERE train_date = "
        f"'2026-03-02'), 'item_embedding', (SELECT [1.0, 1.0] AS item_embedding), top_k => 1, distance_type => 'COSINE')"
    )
    assert [row.values() for row in client.query_and_wait(sql)] == [("id1",)]


def searched(warehouse, prefix, capfd, *flags):
    """Returns what the command finds: {id: distance or score}, nearest first."""
    place = [f"--dataset={warehouse.project}.{warehouse.dataset}", f"--table_prefix={prefix}"]
    capfd.readouterr()
    assert search([*place, "--json", *flags]) == 0
    found = json.loads(capfd.readouterr().out)["neighbours"]
    return {one["id"]: one.get("score", one.get("distance")) for one in found}


def test_an_index_the_latest_tables_and_searches(warehouse, client, store, models, capfd):
    """That BigQuery takes both indexes and the latest tables' script, what VECTOR_SEARCH returns, and in which order.

    An index of so little data is not built: that it is refused, disabled or used is for BigQuery to say.
    """
    prefix = f"{warehouse.prefix}_search"
    of_us = [f"--table_prefix={prefix}", f"--project={warehouse.project}", "--latest_tables"]
    runs = {}
    for day, name in ((DAY, "plain"), (DAY + timedelta(days=7), "retrained")):
        runs[name] = store.log(models(name), f"{name} searched", day)
        # Of the flags one excludes the other.
        flags = [flag for flag in command(warehouse, store, runs[name], *of_us) if flag != "--allow_dimension_change"]
        subprocess.run([*flags, "--vector_index=COSINE"], check=True)
    destination = session.find_destination(warehouse.project, warehouse.dataset, prefix)
    for tower in ("user", "item"):
        for table in (destination.table(tower), destination.latest(tower)):
            (index,) = indexes.find_indexes(client, table)
            assert (index.name, index.distance) == (indexes.index_name(table), "COSINE")
        rows = client.query_and_wait(
            f"SELECT mlflow_run_id, {tower}_id, {tower}_embedding FROM `{destination.latest(tower)}`"
        )
        held = {(run, name): vector for run, name, vector in (row.values() for row in rows)}
        assert held == {(runs["retrained"], name): vector for name, vector in models("retrained").rows(tower).items()}
    users, items = models("retrained").rows("user"), models("retrained").rows("item")
    user, item = next(iter(users)), next(iter(items))
    scores = {name: float(np.dot(vector, users[user])) for name, vector in items.items()}
    found = searched(warehouse, prefix, capfd, f"--user={user}")
    assert [*found] == sorted(scores, key=scores.get, reverse=True)[:10]  # `distance` is the negative dot product
    assert found == pytest.approx({name: scores[name] for name in found}, rel=1e-6)
    distances = {name: float(np.linalg.norm(np.subtract(v, items[item]))) for name, v in items.items() if name != item}
    found = searched(warehouse, prefix, capfd, f"--item={item}", "--distance=EUCLIDEAN")
    assert [*found] == sorted(distances, key=distances.get)[:10]
    assert found == pytest.approx({name: distances[name] for name in found}, rel=1e-6)
    place = [f"--dataset={warehouse.project}.{warehouse.dataset}", f"--table_prefix={prefix}"]
    assert search([*place, f"--item={item}", "--plan"]) == 0
    assert re.search(r"reads +\d+\.\d+ GB: about \$", capfd.readouterr().out)
    assert rollback([*place, f"--run_id={runs['plain']}"]) == 0
    rows = client.query_and_wait(f"SELECT DISTINCT mlflow_run_id FROM `{destination.latest('item')}`")
    assert [row.values() for row in rows] == [(runs["plain"],)]


def test_a_comparison(warehouse, client, store, models, tmp_path):
    """That BigQuery takes the join, its expiration and clustering, Storage Read sessions, loads of Parquet and JSON."""
    prefix = f"{warehouse.prefix}_compare"
    of_us = [
        f"--dataset={warehouse.project}.{warehouse.dataset}",
        f"--table_prefix={prefix}",
        f"--temp_location={warehouse.temp_location}",
        f"--project={warehouse.project}",
    ]
    key = os.environ.get("BEAM_PIPELINE_GCP_KMS_KEY")
    of_us += ["--require_partition_filter", *([f"--kms_key={key}"] if key else [])]
    for day, name in ((DAY, "plain"), (DAY + timedelta(days=7), "retrained")):
        run = store.log(models(name), f"{name} compared", day)
        subprocess.run(command(warehouse, store, run, *of_us), check=True)
    labels = "--labels=item=SELECT '1' AS id, 'one' AS label, 'ones' AS group_name"
    compare = [
        sys.executable,
        "-m",
        "beam_pipeline.compare",
        *of_us,
        "--ids=both",
        labels,
        f"--report={tmp_path}/page.html",
    ]
    for _ in range(2):
        subprocess.run(compare, check=True)
    table = f"`{warehouse.project}.{warehouse.dataset}.{prefix}_embedding_comparison`"
    ((rows, towers),) = client.query_and_wait(
        f"SELECT COUNT(*), COUNT(DISTINCT tower) FROM {table} WHERE train_date = '2026-03-08'"
    )
    assert (rows, towers) == (2, 2)
    assert (tmp_path / "page.html").exists()
    left = [t.table_id for t in client.list_tables(warehouse.dataset) if "_staging_" in t.table_id]
    assert not [name for name in left if name.startswith(prefix)]
