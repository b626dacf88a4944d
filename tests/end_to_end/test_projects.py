"""The two projects of a job, where it runs and is billed and where its tables are, as the real clients ask for them.

The emulator takes no project like `example.com:project`, so the whole job runs against the benchmark's BigQuery, which
takes anything and does nothing; here every request is kept.
"""

import importlib.util
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
from apache_beam.io.gcp.internal.clients.bigquery import BigqueryV2
from job import MARCH_1

from beam_pipeline.launch.launcher import launch
from beam_pipeline.launch.options import parse

_spec = importlib.util.spec_from_file_location(
    "benchmark_bigquery", Path(__file__).parents[2] / "benchmarks" / "fake_bigquery.py"
)
benchmark_bigquery = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(benchmark_bigquery)


class Service(benchmark_bigquery.Service):
    """Keeps what it is asked.

    Attributes:
        jobs: (project that it was asked in, configuration) of every job.
        tables: (method, project) of every request about datasets and tables.
    """

    def __init__(self):
        super().__init__("")
        self.jobs, self.tables = [], []

    def answer(self, method, path, body):
        path = unquote(path)
        project, kind = path.split("/projects/", 1)[1].split("/")[:2]
        if kind == "datasets":
            self.tables.append((method, project))
        elif method == "POST":
            self.jobs.append((project, body.get("configuration") or {"query": body}))
        return super().answer(method, path, body)

    def _insert(self, project, job_id, configuration):
        if "load" in configuration:  # Its files are elsewhere.
            configuration = {**configuration, "load": {**configuration["load"], "sourceUris": []}}
        return super()._insert(project, job_id, configuration)


@pytest.fixture
def service(warehouse, monkeypatch):
    running = Service()

    class Handler(BaseHTTPRequestHandler):
        def _serve(self):
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, body = running.answer(self.command, urlparse(self.path).path, json.loads(data) if data else {})
            answer = b"" if body is None else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_POST = do_DELETE = _serve

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("BIGQUERY_EMULATOR_HOST", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(BigqueryV2, "BASE_URL", BigqueryV2.BASE_URL)  # emulators.connect() changes it
        yield running
        server.shutdown()


def run(service, warehouse, store, models, *flags):
    """Publishes 50 users and 50 items; returns the run."""
    run_id = store.log(models("longer"), "projects", MARCH_1)
    service.reset({"user": 50, "item": 50}, run_id)
    found = [f"--run_id={run_id}", f"--tracking_uri={store.uri}", f"--temp_location={warehouse.temp_location}/projects"]
    assert launch(parse([*found, *flags])) == 0


@pytest.mark.parametrize(
    ("project", "writer"),
    [("tables-project", "columnar"), ("example.com:tables", "columnar"), ("example.com:tables", "rows")],
)
def test_jobs_run_in_one_project_and_tables_are_in_another(service, warehouse, store, models, capsys, project, writer):
    flags = ["--project=example.org:payer", f"--dataset={project}.raw", f"--writer={writer}"]
    run(service, warehouse, store, models, *flags)
    assert {asked_in for asked_in, _ in service.jobs} == {"example.org:payer"}
    assert {asked_in for _, asked_in in service.tables} == {project}
    kinds = [kind for _, job in service.jobs for kind in ("load", "copy", "query") if kind in job]
    assert kinds.count("load") == 2
    assert kinds.count("copy") == (2 if writer == "rows" else 0)
    for _, job in service.jobs:
        for kind in {"load", "copy"} & {*job}:
            target = job[kind]["destinationTable"]
            assert (target["projectId"], target["datasetId"]) == (project, "raw")
            assert target["tableId"].startswith(("two_tower_user", "two_tower_item", "beam_bq_job_LOAD"))
    scripts = [job["query"]["query"] for _, job in service.jobs if "BEGIN TRANSACTION" in str(job)]
    assert f"INSERT INTO `{project}.raw.two_tower_user_embedding` " in scripts[0]
    out = capsys.readouterr().out
    assert re.search(r"^ok +jobs +run in project example\.org:payer, which is billed$", out, re.MULTILINE)


def test_without_a_project_the_datasets_is_billed_and_that_is_reported(service, warehouse, store, models, capsys):
    run(service, warehouse, store, models, "--dataset=tables-project.raw")
    assert {asked_in for asked_in, _ in service.jobs} == {"tables-project"}
    assert {asked_in for _, asked_in in service.tables} == {"tables-project"}
    out = capsys.readouterr().out
    assert "project     no --project: jobs run in tables-project, the dataset's, which is billed\n" in out


def test_a_plain_dataset_is_in_the_project_that_is_billed(service, warehouse, store, models, capsys):
    run(service, warehouse, store, models, "--project=my-project", "--dataset=raw")
    assert {asked_in for asked_in, _ in service.jobs} == {"my-project"} == {asked_in for _, asked_in in service.tables}
    assert "billed" not in capsys.readouterr().out
