"""Destination tables that exist already: extended where that adds columns only, refused otherwise."""

import dataclasses

from google.cloud import bigquery
from job import MARCH_1, MARCH_2

from beam_pipeline import __version__, tag
from beam_pipeline.bigquery import tables


def first_version(job, tower, **changes):
    fields = {
        "train_date": "DATE",
        "mlflow_run_id": "STRING",
        "mlflow_experiment_name": "STRING",
        "mlflow_run_name": "STRING",
        f"{tower}_id": "STRING",
    } | changes
    schema = [bigquery.SchemaField(name, type_) for name, type_ in fields.items()]
    schema.append(bigquery.SchemaField(f"{tower}_embedding", "FLOAT64", "REPEATED"))
    table = bigquery.Table(job.destination.table(tower), schema=schema)
    table.time_partitioning = bigquery.TimePartitioning(field="train_date")
    return table


def test_a_table_of_the_first_version_is_extended(job, store, models):
    for tower in ("user", "item"):
        job.client.create_table(first_version(job, tower))
    job.client.create_table(bigquery.Table(job.destination.log, schema=tables.LOG_SCHEMA[:5]))  # an early log
    job.query("INSERT INTO {user} VALUES (DATE '2026-02-01', 'old', 'two_tower', 'n', 'u1', [1.0,2,3,4,5,6,7,8])")
    run = store.log(models("plain"), "plain", MARCH_1)
    assert job.run(run) == 0
    assert job.rows("user", "train_date > DATE '2026-02-01'") == {("2026-03-01", run): models("plain").rows("user")}
    assert job.query("SELECT DISTINCT mlflow_experiment_id FROM {user} ORDER BY 1") == [
        (None,),
        (store.experiment_id,),
    ]
    ((old,),) = job.query("SELECT user_embedding FROM {user} WHERE mlflow_run_id = 'old'")
    assert old == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    log = f"SELECT tower, row_count, pipeline_version FROM {job.dataset}.two_tower_embedding_log ORDER BY tower"
    assert job.query(log) == [("item", 2014, __version__), ("user", 3015, __version__)]


def test_a_history_with_names_of_its_own_goes_on(job, store, models, capsys):
    """The job that this one replaces wrote tables whose names end in `_history`; --table_suffix continues them."""
    flags = ["--table_suffix=_history"]
    job.destination = dataclasses.replace(job.destination, suffix="_history")
    for tower in ("user", "item"):
        job.client.create_table(first_version(job, tower))
    run = store.log(models("longer"), "longer", MARCH_1)
    assert job.run(run, *flags) == 0
    assert job.tables() == {
        *(f"two_tower_{tower}_embedding_history" for tower in ("user", "item")),
        *(f"two_tower_embedding_history_{which}" for which in ("lock", "log")),
    }
    tagged = [f"--tracking_uri={store.uri}", f"--dataset={job.dataset}", f"--project={job.client.project}"]
    capsys.readouterr()
    assert tag.main([f"--run_id={run}", *tagged, *flags]) == 0
    assert f"{job.dataset}.two_tower_user_embedding_history" in capsys.readouterr().out


def test_an_incompatible_table_is_refused(job, store, models, capsys):
    job.client.create_table(first_version(job, "item", item_id="INT64"))
    assert job.run(store.log(models("plain"), "plain", MARCH_1)) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "two_tower_item_embedding cannot be used: column item_id is INT" in error
    assert "not STRING; rename it" in error
    assert job.tables() == {"two_tower_item_embedding"}


def test_another_vector_length(job, store, models, capsys):
    assert job.run(store.log(models("plain"), "plain", MARCH_1)) == 0
    longer = store.log(models("longer"), "longer", MARCH_2)
    assert job.run(longer) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "vectors of 12 values, but the latest partition of" in error
    assert "(2026-03-01) holds vectors of 8" in error
    assert job.run(longer, "--allow_dimension_change") == 0
    assert {len(v) for v in job.rows("user")[("2026-03-02", longer)].values()} == {12}
