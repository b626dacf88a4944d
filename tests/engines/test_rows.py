"""The whole job on every engine, each row compared with Keras.

Another kind of model, or another pipeline, is another function of CASES.
"""

from datetime import timedelta

import pytest
from job import DESTINATION_TABLES, MARCH_1

# One load job takes few and small files here, so that Beam loads temporary tables and copies them, as above 10,000.
MANY_FILES = """
from apache_beam.io.gcp import bigquery_file_loads as loads
made = loads.BigQueryBatchFileLoads.__init__
loads.BigQueryBatchFileLoads.__init__ = lambda self, *args, **options: made(
    self, *args, **{**options, "max_file_size": 20_000, "max_files_per_partition": 1}
)
"""


def lists_and_files(job, store, models, run):
    """A vocabulary that is a list, and one in a file; on the bucket."""
    run_id = store.log(models("plain"), "plain", MARCH_1, bucket=True)
    run(run_id)
    assert_published(job, {("2026-03-01", run_id): models("plain")})


def not_in_row_order(job, store, tables, run):
    """Vocabularies that are in no order of rows, sorted in a shuffle."""
    run_id = store.log(tables("static"), "static", MARCH_1, bucket=True)
    run(run_id)
    assert_published(job, {("2026-03-01", run_id): tables("static")})


def keras_file(job, store, keras_files, run):
    """A .keras file in a local folder, which the workers share and are said to."""
    run_id = store.log(keras_files("functional"), "functional", MARCH_1)
    towers = ["--tower=user=user_embedding", "--tower=item=item_embedding", "--artifact_path=model/model.keras"]
    run(run_id, *towers, shared=True)
    assert_published(job, {("2026-03-01", run_id): keras_files("functional")})


def backfill_by_rows(job, store, models, run):
    """Three runs in one job, by the writer of Beam's own rows."""
    backfill(job, store, models, run, "--writer=rows")


def backfill_of_many_files(job, store, models, run):
    """Three runs in one job, and more files than a load job takes."""
    backfill(job, store, models, run, hook=MANY_FILES)


def backfill(job, store, models, run, *flags, **options):
    experiment = job.dataset
    expected = {}
    for week, name in enumerate(("plain", "retrained", "plain")):
        day = MARCH_1 + timedelta(weeks=week)
        run_id = store.log(models(name), name, day, experiment=experiment)
        expected[str(day.date()), run_id] = models(name)
    run(None, f"--experiment_name={experiment}", "--all_runs", *flags, shared=True, **options)
    assert_published(job, expected)


CASES = (lists_and_files, not_in_row_order, keras_file, backfill_by_rows, backfill_of_many_files)


def assert_published(job, expected):
    """Every row of every run, once, and nothing left."""
    for tower in ("user", "item"):
        found = job.rows(tower)
        assert found.keys() == expected.keys()
        for key, model in expected.items():
            assert found[key] == model.rows(tower)
    assert job.tables() == DESTINATION_TABLES


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_every_row_is_what_keras_says(engine, case, job, store, run, request, traffic):
    fixtures = {
        name: request.getfixturevalue(name) for name in ("models", "tables", "keras_files") if name in arguments(case)
    }
    portable = "--environment_type=EXTERNAL" in engine

    def on_the_engine(run_id, *flags, shared=False, **options):
        done = run(run_id, *engine, *flags, *(["--shared_files"] if shared and portable else []), **options)
        assert done.returncode == 0, done.stderr[-5000:]

    case(job, store, run=on_the_engine, **fixtures)
    assert store.load_files(f"{job.dataset}/embedding_loads") == []


def arguments(function):
    return function.__code__.co_varnames[: function.__code__.co_argcount]
