"""Where jobs run and are billed, and where the tables are."""

import re
from contextlib import contextmanager

import pytest
from google.cloud import bigquery
from job import MARCH_1, Job
from tracking import Gate, serving

from beam_pipeline.comparison import command as comparison
from beam_pipeline.errors import ConfigError
from beam_pipeline.launch import options, preflight


class Recorder(Gate):
    """A proxy before the emulated BigQuery; `server.projects` maps a kind of request to the projects it was sent to."""

    def do_GET(self):
        if match := re.match(r"(?:/upload)?/bigquery/v2/projects/([^/]+)/(jobs|queries|datasets)", self.path):
            project, kind = match.groups()
            # Only what starts a job, or asks for one, is billed.
            self.server.projects.setdefault(kind.replace("queries", "jobs"), set()).add(project)
        return super().do_GET()

    do_POST = do_PUT = do_PATCH = do_DELETE = do_GET


@contextmanager
def recorded(warehouse, monkeypatch):
    """Yields kind → projects of every request to BigQuery meanwhile, Beam's own included."""
    with serving(
        Recorder, target=warehouse.bigquery_url, admits=lambda _: True, seen=[], before=lambda _: None, projects={}
    ) as server:
        monkeypatch.setenv("BIGQUERY_EMULATOR_HOST", server.url)
        yield server.projects


@pytest.fixture
def job(warehouse, store):
    """A job whose dataset is in a project of its own."""
    client = bigquery.Client(project="tables-project")
    client.create_dataset("history")
    yield Job(client, "tables-project.history", store, f"{warehouse.temp_location}/projects")
    client.delete_dataset("history", delete_contents=True)


@pytest.mark.parametrize("writer", ["columnar", "rows"])
def test_jobs_run_in_one_project_and_tables_are_in_another(job, store, models, warehouse, monkeypatch, writer):
    run = store.log(models("longer"), f"two projects {writer}", MARCH_1)
    with recorded(warehouse, monkeypatch) as projects:
        flags = ["--project=billing-project", f"--writer={writer}"]
        assert job.run(run, *flags) == 0
    assert projects == {"jobs": {"billing-project"}, "datasets": {job.client.project}}
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
    assert preflight.find_projects(billing, of_dataset) == found


def test_a_project_is_needed(monkeypatch):
    monkeypatch.delenv("BIGQUERY_EMULATOR_HOST", raising=False)
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    with pytest.raises(ConfigError, match="which project"):
        preflight.find_projects(None, None)
