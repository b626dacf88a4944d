"""The DAG of examples/airflow in real Airflow: each test is a DAG run whose tasks execute."""

import asyncio
import contextlib

import pytest
from airflow.providers.google.cloud.hooks.dataflow import AsyncDataflowHook
from conftest import PYTHON
from fake_dataflow import STATES, FakeDataflow
from google.auth.credentials import AnonymousCredentials
from google.cloud.dataflow_v1beta3 import JobsV1Beta3Client


def states(run):
    return {task.task_id: str(task.state) for task in run.get_task_instances()}


def test_the_dag(dag):
    assert {task.task_id: task.upstream_task_ids for task in dag.tasks} == {
        "evaluate": set(),
        "historize": {"evaluate"},
    }
    historize = dag.get_task("historize")
    assert (historize.py_interpreter, historize.py_options, historize.py_file) == (PYTHON, ["-m"], "beam_pipeline")


# DirectRunner, against emulators.


@pytest.fixture
def here(cloud):
    """DAG parameters for a run in the worker."""
    return {
        "experiment_name": cloud.experiment,
        "runner": "DirectRunner",
        "project": cloud.project,
        "temp_location": cloud.temp_location,
    }


def test_rows_are_what_keras_says(dag, cloud, here, capfd):
    assert states(dag.test(run_conf=here)) == {"evaluate": "success", "historize": "success"}, capfd.readouterr().out
    for tower, rows in cloud.rows.items():
        found = cloud.client.query_and_wait(
            f"SELECT train_date, mlflow_run_id, {tower}_id, {tower}_embedding FROM raw_dev.two_tower_{tower}_embedding"
        )
        found = [row.values() for row in found]
        assert {(str(day), run) for day, run, _, _ in found} == {("2026-03-01", cloud.local)}
        assert len(found) == len(rows)
        assert {name: vector for _, _, name, vector in found} == rows


def test_a_model_below_the_threshold_is_not_historized(dag, here):
    assert states(dag.test(run_conf={**here, "at_least": 0.9, "env": "prod"})) == {
        "evaluate": "skipped",
        "historize": "skipped",
    }


def test_what_stops_the_job_fails_the_task_and_is_in_its_log(dag, here, capfd):
    run = dag.test(run_conf={**here, "env": "prod"})
    assert states(run) == {"evaluate": "success", "historize": "failed"}
    assert "error: dataset local.raw_prod does not exist; make it where the bucket is" in capfd.readouterr().out


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
            historize = dag.get_task("historize")
            historize.pipeline_options.update(dataflow_endpoint=dataflow.url, no_auth=True)
            historize.dataflow_config["poll_sleep"] = 0.1
            params = {
                "run_id": cloud.on_a_bucket,
                "env": "stg",
                "project": cloud.project,
                "temp_location": cloud.temp_location,
            }
            return dataflow, lambda: dag.test(run_conf=params)

        yield start


def test_the_operator_waits_for_the_job_it_started(on_dataflow, cloud, capfd):
    dataflow, run = on_dataflow()
    assert states(run()) == {"evaluate": "success", "historize": "success"}, capfd.readouterr().out
    ((job_id, job),) = dataflow.jobs.items()
    out = capfd.readouterr().out
    assert f"Job with id '{job_id}' has reached successful final state: JOB_STATE_DONE" in out
    # The name that the launcher would have given; nothing is appended.
    assert job["name"] == f"historize-{cloud.on_a_bucket}"
    assert job["labels"].keys() == {"airflow-version", "dag", "run_id", "experiment", "dataset", "pipeline_version"}
    assert job["labels"]["run_id"] == cloud.on_a_bucket
    assert job["location"] == "europe-west1"


def test_a_job_that_fails_on_dataflow_fails_the_task(on_dataflow):
    dataflow, run = on_dataflow(["JOB_STATE_PENDING", "JOB_STATE_RUNNING", "JOB_STATE_FAILED"])
    assert states(run()) == {"evaluate": "success", "historize": "failed"}
    assert len(dataflow.jobs) == 1


def test_a_second_launch_of_an_active_run_is_refused(on_dataflow, cloud, capfd):
    dataflow, run = on_dataflow()
    first = {"name": f"historize-{cloud.on_a_bucket}", "clientRequestId": "another launch", "type": "JOB_TYPE_BATCH"}
    dataflow.answer("POST", f"/v1b3/projects/{cloud.project}/locations/europe-west1/jobs", first)
    assert states(run()) == {"evaluate": "success", "historize": "failed"}
    assert len(dataflow.jobs) == 1
    assert f"error: a job historize-{cloud.on_a_bucket} is active on Dataflow already" in capfd.readouterr().out
