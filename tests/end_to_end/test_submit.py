"""The launch on Dataflow, up to the job's id, against a small Dataflow; what runs there is test_job.py's."""

import os
import sys
import uuid
from datetime import UTC, datetime

import pytest
from fake_dataflow import FakeDataflow
from google.cloud import bigquery, storage


@pytest.fixture
def dataflow(monkeypatch):
    monkeypatch.setenv("no_proxy", f"{os.environ.get('no_proxy', '')},localhost")
    with FakeDataflow() as running:
        yield running


@pytest.fixture
def submit(warehouse, store, models, commands, dataflow):
    """A function from flags to the ended launcher; always of the same run, `submit.run`."""
    client = bigquery.Client(project=warehouse.project)
    dataset = f"submit_{uuid.uuid4().hex}"
    client.create_dataset(dataset)
    run = store.log(models("longer"), f"submit {dataset}", datetime(2026, 3, 1, tzinfo=UTC), bucket=True)

    def start(*flags):
        command = [
            *(sys.executable, "-m", "beam_pipeline", f"--run_id={run}", f"--tracking_uri={store.uri}"),
            *(f"--dataset={dataset}", f"--project={warehouse.project}"),
            *(f"--temp_location={warehouse.temp_location}", f"--staging_location=gs://{warehouse.bucket}/{dataset}"),
            *("--runner=DataflowRunner", "--region=europe-west1", f"--dataflow_endpoint={dataflow.url}", "--no_auth"),
            *("--sdk_container_image=europe-docker.pkg.dev/local/images/beam_pipeline:1", *flags),
        ]
        return commands.run(command)

    start.run = run
    start.staged = lambda: [blob.name for blob in storage.Client().list_blobs(warehouse.bucket, prefix=f"{dataset}/")]
    start.tables = lambda: [table.table_id for table in client.list_tables(dataset)]
    yield start
    client.delete_dataset(dataset, delete_contents=True)


def test_a_job_is_submitted_once(submit, dataflow):
    done = submit("--labels=airflow-version=v3-1-0", "--labels=team=recommender")
    assert done.returncode == 0, done.stderr
    ((job_id, job),) = dataflow.jobs.items()
    assert done.stdout.splitlines()[-1] == f"submitted   to DataflowRunner, job {job_id}"
    # The line in which Airflow's operator looks for it.
    assert f"Created job with id: [{job_id}]" in done.stderr
    assert job["name"] == f"historize-{submit.run}"
    assert job["type"] == "JOB_TYPE_BATCH"
    assert job["labels"].items() >= {"airflow-version": "v3-1-0", "team": "recommender", "run_id": submit.run}.items()
    (pool,) = job["environment"]["workerPools"]
    (image,) = pool["sdkHarnessContainerImages"]
    assert image["containerImage"] == "europe-docker.pkg.dev/local/images/beam_pipeline:1"
    # Dataflow's limit is 10 MB (https://cloud.google.com/dataflow/quotas); the graph itself goes to the bucket.
    assert dataflow.sizes[0] < 100_000
    assert [name for name in submit.staged() if name.endswith("/pipeline.pb")]
    assert submit.tables() == []

    again = submit()
    assert again.returncode == 1
    assert len(dataflow.jobs) == 1
    assert again.stderr.splitlines()[-1] == (
        f"error: a job historize-{submit.run} is active on Dataflow already; wait until it has ended, or cancel it, "
        "and start again"
    )
    assert "Created job with id" not in again.stderr

    for _ in dataflow.states:
        dataflow.answer("GET", f"/v1b3/projects/local/locations/europe-west1/jobs/{job_id}", {})
    assert submit().returncode == 0
    assert [other["name"] for other in dataflow.jobs.values()] == [job["name"]] * 2


def test_a_key_for_bigquery_and_one_for_dataflow(submit, dataflow):
    """BigQuery's is where the dataset is, a multi-region here, and Dataflow's in the job's region."""
    keys = {place: f"projects/p/locations/{place}/keyRings/r/cryptoKeys/k" for place in ("us", "europe-west1")}
    done = submit(f"--kms_key={keys['us']}")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "error: --kms_key is in us, and Dataflow in europe-west1 takes keys of that region alone: name one with "
        "--dataflow_kms_key, and leave --kms_key to BigQuery"
    )
    assert dataflow.jobs == {}
    done = submit(f"--kms_key={keys['us']}", f"--dataflow_kms_key={keys['europe-west1']}")
    assert done.returncode == 0, done.stderr
    (job,) = dataflow.jobs.values()
    assert job["environment"]["serviceKmsKeyName"] == keys["europe-west1"]
