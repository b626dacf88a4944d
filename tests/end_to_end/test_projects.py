"""Where jobs run and are billed, and where the tables are: two projects, old ids with a domain among them."""

import io
import re
from contextlib import contextmanager

import pytest
from google.cloud import bigquery
from job import MARCH_1, Job
from tracking import Gate, serving

from beam_pipeline.comparison import command as comparison
from beam_pipeline.errors import ConfigError
from beam_pipeline.launch import options, session

TABLES = "tables-project"


class Recorder(Gate):
    """A proxy before the emulated BigQuery; `server.projects` maps a kind of request to the projects it was sent to.

    `server.alias` is another id of the tables' project, in requests and answers: the emulator takes none with a domain.
    """

    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if match := re.match(r"(?:/upload)?/bigquery/v2/projects/([^/]+)/(jobs|queries|datasets)", self.path):
            project, kind = match.groups()
            # Only what starts a job, or asks for one, is billed.
            self.server.projects.setdefault(kind.replace("queries", "jobs"), set()).add(project.replace("%3A", ":"))
        self.path = self.path.replace("%3A", ":").replace(self.server.alias, TABLES)
        body = body.replace(self.server.alias.encode(), TABLES.encode())
        if self.headers.get("Content-Length"):
            self.headers.replace_header("Content-Length", str(len(body)))
        stream, self.rfile = self.rfile, io.BytesIO(body)
        super().do_GET()
        self.rfile = stream

    def _answer(self, status, headers, body):
        super()._answer(status, headers, body.replace(TABLES.encode(), self.server.alias.encode()))

    do_POST = do_PUT = do_PATCH = do_DELETE = do_GET


@contextmanager
def recorded(warehouse, monkeypatch, alias):
    """Yields kind → projects of every request to BigQuery meanwhile, Beam's own included."""
    gate = {"target": warehouse.bigquery_url, "admits": lambda _: True, "seen": [], "before": lambda _: None}
    with serving(Recorder, **gate, projects={}, alias=alias) as server:
        monkeypatch.setenv("BIGQUERY_EMULATOR_HOST", server.url)
        yield server.projects


@pytest.fixture
def job(warehouse, store, commands):
    """A job whose dataset is in a project of its own."""
    client = bigquery.Client(project=TABLES)
    client.create_dataset("history")
    yield Job(client, f"{TABLES}.history", store, f"{warehouse.temp_location}/projects", commands)
    client.delete_dataset("history", delete_contents=True)


@pytest.mark.parametrize(
    ("writer", "billing", "tables"),
    [
        ("columnar", "billing-project", TABLES),
        ("rows", "billing-project", TABLES),
        ("columnar", "example.com:billing", "example.com:tables"),
        ("rows", "example.com:billing", "example.com:tables"),
    ],
)
def test_jobs_run_in_one_project_and_tables_are_in_another(
    job, store, models, warehouse, monkeypatch, writer, billing, tables
):
    run = store.log(models("longer"), f"two projects {writer}", MARCH_1)
    with recorded(warehouse, monkeypatch, tables) as projects:
        assert job.run(run, f"--project={billing}", f"--dataset={tables}.history", f"--writer={writer}") == 0
    assert projects == {"jobs": {billing}, "datasets": {tables}}
    rows = job.client.query_and_wait(f"SELECT COUNT(*) FROM `{job.dataset}.two_tower_user_embedding`")
    assert [row.values() for row in rows] == [(len(models("longer").ids("user")),)]


@pytest.mark.parametrize("module", [options, comparison])
def test_the_datasets_project_is_not_the_jobs(module):
    model = ["--run_id=1"] if module is options else []
    config = module.parse([*model, "--project=billing-project", "--dataset=tables-project.history"])
    assert (config.project, config.dataset_project, config.dataset) == ("billing-project", "tables-project", "history")
    assert config.beam_args == ("--project=billing-project",)
    assert module.parse([*model, "--dataset=tables-project.history"]).project is None


@pytest.mark.parametrize(
    ("billing", "of_dataset", "found"),
    [("b", "t", ("b", "t")), (None, "t", ("t", "t")), ("b", None, ("b", "b"))],
)
def test_a_project_that_is_not_named_is_the_other(billing, of_dataset, found):
    assert session.find_projects(billing, of_dataset) == found


def test_a_project_is_needed(monkeypatch):
    monkeypatch.delenv("BIGQUERY_EMULATOR_HOST", raising=False)
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    with pytest.raises(ConfigError, match="which project"):
        session.find_projects(None, None)
