"""Tagging MLflow runs with what the log says, after real jobs."""

from job import MARCH_1, MARCH_2
from mlflow.tracking import MlflowClient

from beam_pipeline import tag


def tags(store, run):
    found = MlflowClient(store.uri).get_run(run).data.tags
    return {name: value for name, value in found.items() if name.startswith("embedding.")}


def expected(job, day, rows):
    return {
        f"embedding.{tower}.{name}": value
        for tower, count in rows.items()
        for name, value in (
            ("table", job.destination.table(tower)),
            ("partition", day),
            ("rows", str(count)),
        )
    }


def test_the_launcher_tags_the_run_it_waited_for(job, store, models):
    run = store.log(models("longer"), "tagged", MARCH_1)
    assert job.run(run) == 0
    assert tags(store, run) == {}
    assert job.run(run, "--tag_run") == 0
    assert tags(store, run) == expected(job, "2026-03-01", {"user": 50, "item": 50})


def test_the_command_tags_by_the_log(job, store, models, capsys):
    flags = [f"--tracking_uri={store.uri}", f"--dataset={job.dataset}", f"--project={job.client.project}"]
    run = store.log(models("longer"), "tagged later", MARCH_2)
    assert tag.main([f"--run_id={run}", *flags]) == 1
    assert f"error: run {run} is not in local.{job.dataset}.two_tower_embedding_log" in capsys.readouterr().err
    assert job.run(run) == 0
    assert tag.main([f"--run_id={run}", *flags]) == 0
    assert tags(store, run) == expected(job, "2026-03-02", {"user": 50, "item": 50})
    assert "embedding.user.rows      50" in capsys.readouterr().out


def test_a_run_that_cannot_be_tagged_stays_published(job, store, models, capsys, monkeypatch):
    run = store.log(models("longer"), "no tags", MARCH_1)
    monkeypatch.setattr(MlflowClient, "set_tag", lambda *_: MlflowClient(store.uri).get_run("0" * 32))
    assert job.run(run, "--tag_run") == 0
    assert "warning: published, but the run has no tags" in capsys.readouterr().err
    assert [*job.published()] == [("2026-03-01", run)]
