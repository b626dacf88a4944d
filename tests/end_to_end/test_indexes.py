"""The vector index of a job: in the step that creates the tables, once per tower."""

import re
from types import SimpleNamespace

from job import DESTINATION_TABLES, MARCH_1

from beam_pipeline.bigquery import indexes


def test_emulators_have_no_index_and_publish_all_the_same(job, store, models, capsys):
    run = store.log(models("plain"), "weekly", MARCH_1)
    assert job.run(run, "--vector_index=COSINE") == 0
    assert re.search(r"note +index +none is created: emulators know no vector index", capsys.readouterr().out)
    assert job.tables() == DESTINATION_TABLES


def test_the_index_of_each_tower_is_created_before_the_publication(job, store, models, monkeypatch):
    """Emulators accept the statement; that it has an effect is shown by tests/gcp."""
    monkeypatch.setattr(indexes, "emulators", SimpleNamespace(emulated=lambda: False))
    run = store.log(models("plain"), "weekly", MARCH_1)
    since = max((found.created for found in job.client.list_jobs(max_results=1)), default=None)
    assert job.run(run, "--vector_index=DOT_PRODUCT") == 0
    statements = [found.query for found in job.client.list_jobs(min_creation_time=since) if hasattr(found, "query")]
    statements = [sql for sql in reversed(statements) if job.dataset in sql]
    created = [n for n, sql in enumerate(statements) if sql.startswith("CREATE VECTOR INDEX")]
    (published,) = (n for n, sql in enumerate(statements) if sql.startswith("BEGIN TRANSACTION"))
    assert [statements[n] for n in created] == [
        indexes.create_index_sql(job.destination.table(tower), tower, "DOT_PRODUCT") for tower in ("user", "item")
    ]
    assert max(created) < published
