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
        ("user_id", lambda ids: [*ids[:-1], ids[0]], "users.parquet; an id has one embedding: remove the duplicates ["),
        ("user_id", lambda ids: [*ids[:-1], None], "user_id is NULL in 1 of"),
        (
            "time",
            lambda times: [*times[:-1], None],
            "user-059', time is NULL, and the tower has nothing to take instead; l",
        ),
        ("time", lambda times: [*times[:-1], float("nan")], "the vector of id 'user-059' holds NaN"),
        ("last", lambda lists: [*lists[:-1], ["a"]], "for id 'user-059', last has 1 values, and the tower takes 3"),
        ("age", lambda ages: [*ages[:-1], 1 << 40], "for id 'user-059', age is 1,099,511,627,776, and the tower takes"),
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


TAKES = "takes user_id, age (int32), history (string[]), last (string[3]), member (bool), time (float32)"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.drop_columns(["age"]), f"lack the column 'age'; the tower {TAKES}"),
        (lambda table: table.append_column("shoe", [[1] * 60]), "have the column 'shoe', which is no"),
        (lambda table: table.rename_columns(["uid", *table.column_names[1:]]), "have no column 'user_id', which names"),
        (
            lambda table: replaced(table, "age", ["1"] * 60),
            "column 'age' is string, and the tower takes int32: CAST it",
        ),
        (lambda table: replaced(table, "time", [True] * 60), "column 'time' is bool, and the tower takes float32"),
        (lambda table: replaced(table, "history", ["a"] * 60), "column 'history' is no"),
        (
            lambda table: replaced(table, "user_id", [0.5] * 60),
            "column 'user_id' is double, and the tower takes string",
        ),
        (lambda table: table.slice(0, 0), "tower 'user' has no ids: "),
    ],
)
def test_features_that_do_not_fit_publish_nothing(job, store, deep, capsys, tmp_path, change, message):
    import pyarrow.parquet as pq

    pq.write_table(change(pq.read_table(features(deep("features")))), tmp_path / "users.parquet")
    run = store.log(deep("features"), "features", MARCH_1)
    source = f"--features=user={tmp_path}/users.parquet"
    flags = ["--tower=user=query_model,item=candidate_model", "--compute=user,item"]
    line = refused(job, capsys, run, *flags, source)
    assert message in line.replace("is not an input", "is no input").replace("is not a list", "is no list")
    assert f"{tmp_path}/users.parquet" in line


def replaced(table, name, values):
    return table.set_column(table.column_names.index(name), name, [values])


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("deep", ["--tower=user=two,item=item_layer"], "returns 2 outputs (norm, vector) instead of one vector; parts"),
        ("deep", ["--tower=user=fixed,item=item_layer"], "takes 'user_id' of exactly 2 row(s), not of any number"),
        (
            "exported",
            ["--tower=user=serve,item=serve"],
            "returns one number for each row, not a vector; parts that comp",
        ),
        (
            "exported",
            [],
            "none; log the model with the tower as a layer, or a signature, of its own (model.export() alone",
        ),
        (
            "features",
            ["--tower=user=query_model,item=candidate_model"],
            "not an id alone; give the columns user_id, age",
        ),
    ],
)
def test_parts_that_are_no_tower_publish_nothing(job, store, deep, capsys, name, flags, message):
    run = store.log(deep(name), name, MARCH_1)
    assert message in refused(job, capsys, run, "--compute=user", "--embedding_rows", *flags)


def test_without_tensorflow_nothing_is_published(job, store, deep, capsys, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "tensorflow" else find(name, *more)
    )
    line = refused(job, capsys, store.log(deep("deep"), "deep", MARCH_1), "--compute=user,item")
    assert line.startswith(
        "error: --compute needs TensorFlow, which is not installed here: pip install 'beam-pipeline[com"
    )


def test_an_id_that_the_model_does_not_know_gets_what_the_model_serves(job, store, deep, capsys, tmp_path):
    """Keras's own answer for it is that of any other unknown id, and is in no vocabulary."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = pq.read_table(features(deep("keras3"))).to_pylist()
    new = [{"user_id": f"new {number}", "age": 3.0} for number in range(2)]
    pq.write_table(pa.Table.from_pylist(rows + new), tmp_path / "users.parquet")
    run = store.log(deep("keras3"), "keras3", MARCH_1)
    flags = ["--tower=user=user_tower,item=item_tower", "--compute=user,item"]
    assert job.run(run, *flags, f"--features=user={tmp_path}/users.parquet") == 0
    assert "an id that the model does not know gets its vector of unknown ids" in " ".join(
        capsys.readouterr().out.split()
    )
    found = job.rows("user")[("2026-03-01", run)]
    assert found.keys() - set(deep("keras3").ids("user")) == {"new 0", "new 1"}
    assert found["new 0"] == found["new 1"] != found["user-003"]


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


def test_the_forms_of_the_example_give_the_same_tables(job, tmp_path):
    forms = {
        "packed": ("embedding", []),
        "vectors": ("file", ["--vectors=user=vectors/user.parquet,item=vectors/item.parquet"]),
        "model": ("computed", ["--compute=user,item"]),
    }
    uri, runs = example_runs("deep", tmp_path / "store")
    found = []
    for run, (source, flags) in zip(runs, forms.values(), strict=True):
        assert job.run(run, f"--tracking_uri={uri}", "--if_partition_taken=replace", *flags) == 0
        found.append([job.rows(tower)[("2026-03-01", run)] for tower in ("user", "item")])
        sources = f"SELECT DISTINCT vector_source FROM {{log}} WHERE mlflow_run_id = '{run}'"
        assert job.query(sources) == [(source,)]
    for packed, *others in zip(*found, strict=True):
        for other in others:
            assert other.keys() == packed.keys()
            for name, vector in packed.items():
                np.testing.assert_allclose(other[name], vector, rtol=0, atol=1e-6)


def test_dataflows_graph_computes_and_holds_no_model(job, store, deep):
    run = store.log(deep("deep"), "deep", MARCH_1, bucket=True)
    image = ("--sdk_container_image=gcr.io/p/compute", "--sdk_location=container")
    graph = job.dataflow_graph(run, "--compute=user,item", *image)
    assert b"Compute user/Compute/BeamML_RunInference" in graph
    assert len(graph) < 1_000_000
