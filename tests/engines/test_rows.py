"""The whole job on every engine, each row compared with what Keras, TensorFlow or the trainer's own file says.

Another kind of model, or another pipeline, is another function of CASES.
"""

import json
import shutil
from datetime import timedelta
from inspect import signature

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from google.cloud import bigquery, storage
from job import DESTINATION_TABLES, MARCH_1
from models import Model

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


def search_index(job, store, indexes, run):
    """Items from a search index, users from the embedding of its query tower."""
    run_id = store.log(indexes("tfrs"), "tfrs", MARCH_1, bucket=True)
    run(run_id)
    assert_published(job, {("2026-03-01", run_id): indexes("tfrs")})


def ids_files(job, store, label_encoded, tmp_path, run):
    """Embeddings without a lookup, whose ids are in files beside the model, in no order of rows."""
    model = label_encoded("saved_functional")
    for tower in ("user", "item"):
        rows = {name: row for row, name in enumerate(model.ids(tower))}
        (tmp_path / f"{tower}.json").write_text(json.dumps(dict(reversed(rows.items()))))
    shutil.copytree(model.folder, tmp_path / "model")
    run_id = store.log({"": Model(tmp_path)}, "ids", MARCH_1, bucket=True)
    run(run_id, "--ids=user=user.json,item=item.json")
    assert_published(job, {("2026-03-01", run_id): model})


def vector_files(job, store, models, tmp_path, run):
    """Vectors that the trainer logged: Parquet files of several row groups, and an array whose ids are in another."""
    model = models("plain")
    for part, rows in enumerate((slice(0, 900), slice(900, None))):
        columns = {"user_id": model.ids("user")[rows], "vector": [*model.vectors("user")[rows]]}
        (tmp_path / "users").mkdir(exist_ok=True)
        pq.write_table(pa.table(columns), tmp_path / f"users/{part}.parquet", row_group_size=400)
    np.save(tmp_path / "item.npy", model.vectors("item")[::-1])
    order = {"id": model.ids("item"), "row": [*reversed(range(len(model.ids("item"))))]}
    pq.write_table(pa.table(order), tmp_path / "rows.parquet", row_group_size=300)
    run_id = store.log({"": Model(tmp_path)}, "files", MARCH_1, bucket=True)
    run(run_id, "--vectors=user=users,item=item.npy", "--ids=item=rows.parquet")
    assert_published(job, {("2026-03-01", run_id): model})


FEATURES_TABLE = "users"
COMPUTED = ("--tower=user=query_model,item=candidate_model", "--compute=user,item")


def user_features(model):
    return model.folder.parent / f"{model.folder.name}.user.parquet"


def computed_from_parquet(job, store, deep, warehouse, run):
    """Users computed from features in Parquet files on the bucket, items from the vocabulary of their lookup."""
    run_id = store.log(deep("features"), "features", MARCH_1, bucket=True)
    place = f"features-{job.dataset}/users.parquet"
    storage.Client().bucket(warehouse.bucket).blob(place).upload_from_filename(user_features(deep("features")))
    run(run_id, *COMPUTED, f"--features=user=gs://{warehouse.bucket}/{place}")
    assert_published(job, {("2026-03-01", run_id): deep("features")}, tolerance=1e-6)


def computed_backfill_from_a_query(job, store, deep, run):
    """Two runs, each computed by its own model from the result of one query."""
    experiment = job.dataset
    expected = {}
    for week in (0, 1):
        day = MARCH_1 + timedelta(weeks=week)
        run_id = store.log(deep("features"), f"features {week}", day, experiment=experiment, bucket=True)
        expected[str(day.date()), run_id] = deep("features")
    source = f"{job.dataset}.{FEATURES_TABLE}"
    kinds = {"user_id": "STRING", "age": "INTEGER", "time": "FLOAT", "member": "BOOLEAN"}
    schema = [bigquery.SchemaField(name, kind) for name, kind in kinds.items()]
    schema += [bigquery.SchemaField(name, "STRING", "REPEATED") for name in ("last", "history")]
    job.client.create_table(bigquery.Table(f"{job.client.project}.{source}", schema=schema))
    assert not job.client.insert_rows_json(source, pq.read_table(user_features(deep("features"))).to_pylist())
    run(None, f"--experiment_name={experiment}", "--all_runs", *COMPUTED, f"--features=user=SELECT * FROM {source}")
    assert_published(job, expected, tolerance=1e-6)


CASES = (
    lists_and_files,
    not_in_row_order,
    keras_file,
    backfill_by_rows,
    backfill_of_many_files,
    search_index,
    ids_files,
    vector_files,
    computed_from_parquet,
    computed_backfill_from_a_query,
)


def assert_published(job, expected, tolerance=0):
    """Every row of every run, once, and nothing left."""
    for tower in ("user", "item"):
        found = job.rows(tower)
        assert found.keys() == expected.keys()
        for key, model in expected.items():
            rows = model.rows(tower)
            assert found[key].keys() == rows.keys()
            np.testing.assert_allclose([found[key][name] for name in rows], [*rows.values()], rtol=0, atol=tolerance)
    assert job.tables() - {FEATURES_TABLE} == DESTINATION_TABLES


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_every_row_is_what_the_library_says(engine, case, job, store, run, request, traffic):
    others = [name for name in signature(case).parameters if name not in ("job", "store", "run")]
    fixtures = {name: request.getfixturevalue(name) for name in others}
    portable = "--environment_type=EXTERNAL" in engine
    traffic.forget()

    def on_the_engine(run_id, *flags, shared=False, **options):
        done = run(run_id, *engine, *flags, *(["--shared_files"] if shared and portable else []), **options)
        assert done.returncode == 0, done.stderr[-5000:]

    case(job, store, run=on_the_engine, **fixtures)
    assert store.load_files(f"{job.dataset}/embedding_loads") == []
    # Workers of DirectRunner's are not behind the proxy that counts.
    assert bool(traffic.loaded) is portable
    assert len(traffic.loaded) == len({*traffic.loaded})
