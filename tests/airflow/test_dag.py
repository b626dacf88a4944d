"""The DAG of examples/airflow in real Airflow: each test is a DAG run whose tasks execute."""

import asyncio
import contextlib
import os
import subprocess

import pytest
from airflow.providers.google.cloud.hooks.dataflow import AsyncDataflowHook
from fake_dataflow import STATES, FakeDataflow
from google.auth.credentials import AnonymousCredentials
from google.cloud.dataflow_v1beta3 import JobsV1Beta3Client

PYTHON = os.environ["BEAM_PIPELINE_PYTHON"]


def states(run):
    return {task.task_id: str(task.state) for task in run.get_task_instances()}


def test_the_dag(dag):
    assert {task.task_id: task.upstream_task_ids for task in dag.tasks} == {
        "evaluate": set(),
        "historize": {"evaluate"},
        "compare": {"evaluate", "historize"},
    }
    for name, module in (("historize", "beam_pipeline"), ("compare", "beam_pipeline.compare")):
        found = dag.get_task(name)
        assert (found.py_interpreter, found.py_options, found.py_file) == (PYTHON, ["-m"], module)


# DirectRunner, against emulators.


@pytest.fixture
def here(cloud):
    """DAG parameters for a run in the worker."""
    return {
        "run_id": cloud.local,
        "runner": "DirectRunner",
        "project": cloud.project,
        "temp_location": cloud.temp_location,
    }


def test_rows_are_what_keras_says(dag, cloud, here, capfd):
    wanted = {"evaluate": "success", "historize": "success", "compare": "success"}
    assert states(dag.test(run_conf=here)) == wanted, capfd.readouterr().out
    assert f"there is no training before {cloud.local}; nothing to compare" in capfd.readouterr().out
    for tower, rows in cloud.rows.items():
        found = cloud.client.query_and_wait(
            f"SELECT train_date, mlflow_run_id, {tower}_id, {tower}_embedding FROM raw_dev.two_tower_{tower}_embedding"
        )
        found = [row.values() for row in found]
        assert {(str(day), run) for day, run, _, _ in found} == {("2026-03-01", cloud.local)}
        assert len(found) == len(rows)
        assert {name: vector for _, _, name, vector in found} == rows


def test_the_next_training_is_compared_with_it(dag, cloud, here, capfd):
    """The same model twice: nothing has changed."""
    wanted = {"evaluate": "success", "historize": "success", "compare": "success"}
    run = dag.test(run_conf={**here, "run_id": cloud.later, "fail_if_unusual": True})
    assert states(run) == wanted, capfd.readouterr().out
    found = cloud.client.query_and_wait(
        "SELECT tower, previous_mlflow_run_id, mlflow_run_id, score_change_p99 FROM raw_dev.two_tower_embedding_comparison"
    )
    found = {row[0]: row.values()[1:] for row in found}
    assert found.keys() == {"user", "item"}
    for earlier, later, changed in found.values():
        assert (earlier, later) == (cloud.local, cloud.later)
        assert changed < 1e-6


def test_a_model_below_the_threshold_is_not_historized(dag, here):
    assert states(dag.test(run_conf={**here, "at_least": 0.9, "env": "prod"})) == {
        "evaluate": "skipped",
        "historize": "skipped",
        "compare": "skipped",
    }


def test_what_stops_the_job_fails_the_task_and_is_in_its_log(dag, here, capfd):
    run = dag.test(run_conf={**here, "env": "prod"})
    assert states(run) == {"evaluate": "success", "historize": "failed", "compare": "upstream_failed"}
    assert "error: dataset local.raw_prod does not exist; create it where the bucket is" in capfd.readouterr().out


# Dataflow, a small one.


class AsyncJobs:
    """Google's asynchronous client speaks gRPC only: the synchronous one, which speaks REST, in a thread."""

    def __init__(self, url):
        options = {"api_endpoint": url}
        self._client = JobsV1Beta3Client(credentials=AnonymousCredentials(), client_options=options, transport="rest")

    async def get_job(self, request):
        return await asyncio.to_thread(self._client.get_job, request=request)


@pytest.fixture
def on_dataflow(dag, cloud, monkeypatch):
    """A function from states to a Dataflow whose jobs take them, and a function that runs the DAG on it."""
    with contextlib.ExitStack() as stack:

        def start(states=STATES):
            dataflow = stack.enter_context(FakeDataflow(states))

            async def client(_hook, _client_class):
                return AsyncJobs(dataflow.url)

            # Airflow has no setting for where Dataflow is.
            monkeypatch.setattr(AsyncDataflowHook, "initialize_client", client)
            for name in ("historize", "compare"):
                found = dag.get_task(name)
                found.pipeline_options.update(dataflow_endpoint=dataflow.url, no_auth=True)
                found.dataflow_config["poll_sleep"] = 0.1
            params = {"env": "stg", "project": cloud.project, "temp_location": cloud.temp_location}
            return dataflow, lambda run_id=cloud.on_a_bucket: dag.test(run_conf={**params, "run_id": run_id})

        yield start


def publish(cloud, run_id):
    """The small Dataflow runs nothing: what it would have published is published here."""
    flags = [f"--run_id={run_id}", "--env=stg", f"--project={cloud.project}", f"--temp_location={cloud.temp_location}"]
    subprocess.run([PYTHON, "-m", "beam_pipeline", *flags], check=True, capture_output=True)


def test_the_operator_waits_for_the_job_it_started(on_dataflow, cloud, capfd):
    publish(cloud, cloud.on_a_bucket)
    dataflow, run = on_dataflow()
    # A first training has nothing to be compared with: there is no job to wait for.
    wanted = {"evaluate": "success", "historize": "success", "compare": "skipped"}
    assert states(run()) == wanted, capfd.readouterr().out
    ((job_id, job),) = dataflow.jobs.items()
    out = capfd.readouterr().out
    assert f"Job with id '{job_id}' has reached successful final state: JOB_STATE_DONE" in out
    # The name that the launcher would have given; nothing is appended.
    assert job["name"] == f"historize-{cloud.on_a_bucket}"
    assert job["labels"].keys() == {"airflow-version", "dag", "run_id", "experiment", "dataset", "pipeline_version"}
    assert job["labels"]["run_id"] == cloud.on_a_bucket
    assert job["location"] == "europe-west1"


def test_the_comparison_is_a_job_of_its_own(on_dataflow, cloud, capfd):
    for run_id in (cloud.on_a_bucket, cloud.later):
        publish(cloud, run_id)
    dataflow, run = on_dataflow()
    wanted = {"evaluate": "success", "historize": "success", "compare": "success"}
    assert states(run(cloud.later)) == wanted, capfd.readouterr().out
    historize, compare = dataflow.jobs.values()
    assert (historize["name"], compare["name"]) == (f"historize-{cloud.later}", f"compare-{cloud.later}")
    assert compare["labels"].keys() == historize["labels"].keys()
    assert compare["currentState"] == "JOB_STATE_DONE"


def test_a_job_that_fails_on_dataflow_fails_the_task(on_dataflow):
    dataflow, run = on_dataflow(["JOB_STATE_PENDING", "JOB_STATE_RUNNING", "JOB_STATE_FAILED"])
    assert states(run()) == {"evaluate": "success", "historize": "failed", "compare": "upstream_failed"}
    assert len(dataflow.jobs) == 1


def test_a_second_launch_of_an_active_run_is_refused(on_dataflow, cloud, capfd):
    dataflow, run = on_dataflow()
    first = {"name": f"historize-{cloud.on_a_bucket}", "clientRequestId": "another launch", "type": "JOB_TYPE_BATCH"}
    dataflow.answer("POST", f"/v1b3/projects/{cloud.project}/locations/europe-west1/jobs", first)
    assert states(run()) == {"evaluate": "success", "historize": "failed", "compare": "upstream_failed"}
    assert len(dataflow.jobs) == 1
    assert f"error: a job historize-{cloud.on_a_bucket} is active on Dataflow already" in capfd.readouterr().out
