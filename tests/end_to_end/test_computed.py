"""Towers whose vectors are computed on the workers: the whole job against the emulators, compared with TensorFlow."""

import json
import shutil

import numpy as np
import pytest
from job import DESTINATION_TABLES, MARCH_1, MARCH_2, refused
from models import made_by
from store import example_runs


@pytest.fixture(scope="module")
def deep():
    return made_by("make_deep_towers.py")


def assert_computed(job, run, model, tower, day="2026-03-01"):
    """Every row is what the library itself answers, in another batch: to 1e-6."""
    found, expected = job.rows(tower)[(day, run)], model.rows(tower)
    assert found.keys() == expected.keys()
    for name, vector in expected.items():
        np.testing.assert_allclose(found[name], vector, atol=1e-6)


def features(model, tower="user"):
    return model.folder.parent / f"{model.folder.name}.{tower}.parquet"


def test_deep_towers_are_computed_from_their_vocabularies(job, store, deep, capsys):
    run = store.log(deep("deep"), "deep", MARCH_1)
    assert job.run(run, "--compute=user,item") == 0
    assert "code of the artifact runs there (tensorflow" in capsys.readouterr().out
    for tower in ("user", "item"):
        assert_computed(job, run, deep("deep"), tower)
    log = job.query(
        "SELECT tower, row_count, dimension, checksum, vector_source, computed_by FROM {log} ORDER BY tower"
    )
    assert [row[:5] for row in log] == [("item", 40, 16, None, "computed"), ("user", 60, 16, None, "computed")]
    assert log[0][5].startswith("tensorflow 2.")
    assert job.tables() == DESTINATION_TABLES


def test_features_come_from_a_query(job, store, deep, capsys):
    run = store.log(deep("features"), "features", MARCH_1)
    source = f"{job.dataset}.users"
    import pyarrow.parquet as pq
    from google.cloud import bigquery

    rows = pq.read_table(features(deep("features"))).to_pylist()
    names = {"user_id": "STRING", "age": "INTEGER", "time": "FLOAT", "member": "BOOLEAN"}
    schema = [bigquery.SchemaField(name, kind) for name, kind in names.items()]
    schema += [bigquery.SchemaField(name, "STRING", "REPEATED") for name in ("last", "history")]
    job.client.create_table(bigquery.Table(f"{job.client.project}.{source}", schema=schema))
    assert not job.client.insert_rows_json(source, rows)
    flags = [
        "--tower=user=query_model,item=candidate_model",
        "--compute=user,item",
        f"--features=user=SELECT * FROM {source} WHERE user_id IS NOT NULL",
    ]
    assert job.run(run, *flags) == 0, capsys.readouterr().err
    assert_computed(job, run, deep("features"), "user")
    assert_computed(job, run, deep("features"), "item")
    assert job.tables() == {*DESTINATION_TABLES, "users"}
    line = refused(job, capsys, run, *flags[:2], f"--features=user=SELECT user_id, age FROM {source}")
    assert line.startswith("error: the features of tower 'user' (SELECT user_id, age FROM")
    assert "lack the column 'history'; the tower takes user_id, age (int32), history (string[])" in line


def test_features_come_from_files_on_a_bucket(job, store, deep, warehouse, tmp_path):
    from google.cloud import storage

    bucket = storage.Client().bucket(warehouse.bucket)
    for part in ("a", "b"):  # The second has no rows of its own.
        name = f"features-{job.dataset}/{part}.parquet"
        if part == "a":
            bucket.blob(name).upload_from_filename(features(deep("keras3")))
        else:
            import pyarrow.parquet as pq

            pq.write_table(pq.read_table(features(deep("keras3"))).slice(0, 0), tmp_path / "empty.parquet")
            bucket.blob(name).upload_from_filename(tmp_path / "empty.parquet")
    run = store.log(deep("keras3"), "keras3", MARCH_1, bucket=True)
    flags = [
        "--tower=user=user_tower,item=item_tower",
        "--compute=user",
        f"--features=user=gs://{warehouse.bucket}/features-{job.dataset}/*.parquet",
    ]
    # The item tower goes on after its embedding too, and nobody asked to compute it.
    assert job.run(run, *flags) == 1
    assert job.run(run, *flags, "--compute=item") == 0
    assert_computed(job, run, deep("keras3"), "user")
    assert_computed(job, run, deep("keras3"), "item")


def test_all_runs_are_computed_each_by_its_model(job, store, deep):
    runs = [
        store.log(deep("deep"), name, start, experiment=f"deep {job.dataset}")
        for name, start in (("one", MARCH_1), ("two", MARCH_2))
    ]
    assert job.run(None, f"--experiment_name=deep {job.dataset}", "--all_runs", "--compute=user,item") == 0
    assert_computed(job, runs[0], deep("deep"), "user")
    assert_computed(job, runs[1], deep("deep"), "item", "2026-03-02")


def test_plan_and_inspect_name_inputs(job, store, deep, capsys):
    run = store.log(deep("deep"), "deep", MARCH_1)
    assert job.run(run, "--compute=user", "--embedding_rows", "--plan=json") == 0
    plan = json.loads(capsys.readouterr().out)
    (finding,) = [each for each in plan["findings"] if each["check"] == "vectors user"]
    assert "computed on the workers by user_layer (string_lookup_input (string) → 16 values)" in finding["text"]
    assert job.run(run, "--compute=user", "--inspect") == 0
    assert "computed    user by user_layer: string_lookup_input (string) → 16 values" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("column", "change", "message"),
    [
        ("user_id", lambda ids: [*ids[:-1], ids[0]], "id 'user-000' appears 2 times"),
        ("user_id", lambda ids: [*ids[:-1], None], "user_id is NULL in 1 of"),
        ("time", lambda times: [*times[:-1], None], "of id 'user-059', time is NULL"),
        ("time", lambda times: [*times[:-1], float("nan")], "the vector of id 'user-059' holds NaN"),
        ("last", lambda lists: [*lists[:-1], ["a"]], "of id 'user-059', last has 1 values, and the tower takes 3"),
        ("age", lambda ages: [*ages[:-1], 1 << 40], "of id 'user-059', age is 1,099,511,627,776, and the tower takes"),
    ],
)
def test_bad_features_publish_nothing(job, store, deep, capsys, tmp_path, column, change, message):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(features(deep("features")))
    values = change(table.column(column).to_pylist())
    kind = table.schema.field(column).type
    table = table.set_column(table.column_names.index(column), column, pa.array(values, kind))
    pq.write_table(table, tmp_path / "users.parquet")
    run = store.log(deep("features"), "features", MARCH_1)
    line = refused(
        job,
        capsys,
        run,
        "--tower=user=query_model,item=candidate_model",
        "--compute=user,item",
        f"--features=user={tmp_path}/*.parquet",
    )
    assert message in line


def test_a_damaged_model_publishes_nothing(job, store, deep, capsys, tmp_path):
    shutil.copytree(deep("deep").folder, tmp_path / "deep")
    data = next((tmp_path / "deep/variables").glob("variables.data*"))
    raw = bytearray(data.read_bytes())
    raw[1000] ^= 1
    data.write_bytes(raw)
    run = store.log(type(deep("deep"))(tmp_path / "deep"), "damaged", MARCH_1)
    assert "is damaged" in refused(job, capsys, run, "--compute=user,item")


def test_a_job_killed_while_it_computes_leaves_nothing_and_runs_again(job, store, deep, tmp_path):
    run = store.log(deep("deep"), "deep", MARCH_1)
    hook = """
import time
from beam_pipeline.computing import transforms
def stopped(*args):
    print("HERE", flush=True)
    time.sleep(600)
transforms.compute = stopped
"""
    process = job.hooked(tmp_path, hook, run, "--compute=user,item")
    assert any(line == "HERE\n" for line in process.stdout)
    process.kill()
    process.wait()
    assert not {name for name in job.tables() if name in ("two_tower_user_embedding", "two_tower_item_embedding")}
    assert job.run(run, "--compute=user,item") == 0
    assert_computed(job, run, deep("deep"), "user")


def test_the_examples_forms_give_the_same_tables(job, tmp_path):
    found = []
    uri, runs = example_runs("deep", tmp_path / "store")
    for run, day, flags in zip(runs, ("2026-03-01", "2026-03-02"), ([], ["--compute=user,item"]), strict=True):
        assert job.run(run, f"--tracking_uri={uri}", *flags) == 0
        found.append([job.rows(tower)[(day, run)] for tower in ("user", "item")])
    for packed, computed in zip(*found, strict=True):
        assert packed.keys() == computed.keys()
        for name, vector in packed.items():
            np.testing.assert_allclose(computed[name], vector, atol=1e-5)


def test_dataflows_graph_computes_and_holds_no_model(job, store, deep, tmp_path):
    from google.cloud import storage

    run = store.log(deep("deep"), "deep", MARCH_1, bucket=True)
    place = f"{job._flags[2].removeprefix('--temp_location=')}/template"
    done = job.subprocess(
        run,
        "--compute=user,item",
        "--runner=DataflowRunner",
        "--region=europe-west1",
        "--project=local",
        "--no_auth",
        f"--template_location={place}",
        "--sdk_container_image=gcr.io/p/compute",
        "--sdk_location=container",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    bucket, _, name = place.removeprefix("gs://").partition("/")
    assert storage.Client().bucket(bucket).blob(name).exists()
    graphs = [blob for blob in storage.Client().list_blobs(bucket) if blob.name.endswith("pipeline.pb")]
    graph = max(graphs, key=lambda blob: blob.updated).download_as_bytes()
    assert b"Compute user/Compute/BeamML_RunInference" in graph
    assert len(graph) < 1_000_000
