"""Every source of vectors by every way of starting: `--all_runs`, `--plan`, `--inspect`, and the graph for Dataflow.

| source | `--all_runs` | `--plan` | `--inspect` | Dataflow's graph |
|---|---|---|---|---|
| embedding | test_backfill.py | test_vectors.py | test_inspection.py | test_dataflow.py |
| index | here | here | here | here |
| ids beside the model | here | here | test_files.py | test_files.py |
| vector files | test_files.py | test_files.py | test_files.py | test_files.py |
| a model per tower | here | test_a_model_per_tower.py | test_a_model_per_tower.py | here |
| computed | test_computed.py | test_computed.py | test_computed.py | test_computed.py |
"""

import json
import shutil
from datetime import timedelta

import pytest
from job import MARCH_1
from models import Model, made_by

DAYS = ["2026-03-01", "2026-03-02", "2026-03-03"]


@pytest.fixture(scope="module")
def indexes():
    return made_by("make_indexes.py")


@pytest.fixture(scope="module")
def keras_indexes():
    return made_by("make_keras_indexes.py")


@pytest.fixture(scope="module")
def label_encoded():
    return made_by("make_label_encoded.py")


@pytest.fixture
def pair(indexes):
    """A tower of users, and an index of items, as models of their own."""
    return {"query_model": indexes("alone_users"), "candidate_model": indexes("tfrs")}


def test_all_runs_each_as_its_model_is(job, store, indexes, keras_indexes, pair):
    experiment = f"sources {job.dataset}"

    def logged(number, model):
        return store.log(model, f"run {number}", MARCH_1 + timedelta(days=number), experiment=experiment)

    models = [pair, indexes("beside"), keras_indexes("tfrs")]
    keys = [(DAYS[number], logged(number, model)) for number, model in enumerate(models)]
    assert job.run(None, f"--experiment_name={experiment}", "--all_runs") == 0
    users, items = job.rows("user"), job.rows("item")
    assert users.keys() == items.keys() == set(keys)
    assert [items[key] for key in keys] == [each.rows("item") for each in (indexes("tfrs"), *models[1:])]
    assert users[keys[0]] == indexes("alone_users").rows("item")
    assert users[keys[2]] == models[2].rows("user")


def test_all_runs_with_ids_beside_each_model(job, store, label_encoded, tmp_path, capsys):
    """Each run has files of its own: the second numbers its ids the other way round."""
    model, experiment, runs = label_encoded("keras3_functional"), f"ids {job.dataset}", []
    for number in range(2):
        folder = tmp_path / str(number)
        shutil.copytree(model.folder, folder / "model")
        for tower in ("user", "item"):
            ids = model.ids(tower)[:: -1 if number else 1]
            (folder / f"{tower}.json").write_text(json.dumps(ids), encoding="utf-8")
        day = MARCH_1 + timedelta(days=number)
        runs.append(store.log({"": Model(folder)}, f"run {number}", day, experiment=experiment))
    flags = [f"--experiment_name={experiment}", "--all_runs", "--ids=user=user.json,item=item.json"]
    assert job.run(None, *flags, "--plan") == 0
    assert f"{runs[1]}/artifacts/user.json, beside the vectors" in capsys.readouterr().out
    assert job.tables() == set()
    assert job.run(None, *flags) == 0
    for tower in ("user", "item"):
        rows = model.rows(tower)
        reversed_ids = dict(zip(rows, [*rows.values()][::-1], strict=True))
        assert job.rows(tower) == {(DAYS[0], runs[0]): rows, (DAYS[1], runs[1]): reversed_ids}


@pytest.mark.parametrize("kind", ["saved", "keras"])
def test_plan_and_inspection_of_an_index(job, store, indexes, keras_indexes, capsys, kind):
    run = store.log((indexes if kind == "saved" else keras_indexes)("tfrs"), kind, MARCH_1)
    assert job.run(run, "--plan=json") == 0
    (training,) = json.loads(capsys.readouterr().out)["trainings"]
    assert [tower["layer"] for tower in training["towers"]] == ["query_model", "candidates"]
    assert job.tables() == set()
    assert job.run(run, "--inspect") == 0
    shown = capsys.readouterr().out.splitlines()
    at = shown.index("layer       candidates")
    assert shown[at + 1].startswith("  index     20 rows × 8 float32, 640 bytes in ")
    assert "  such as   'ítem 0 ü', 'item-1', 'item-2', …" in shown


def test_dataflows_graph_of_a_model_per_tower(job, store, indexes, pair):
    graph = job.dataflow_graph(store.log(pair, f"pair {job.dataset}", MARCH_1, bucket=True))
    for step in (b"Cut user", b"Cut item", b"Publish", b"Clean"):
        assert step in graph
    # Neither model travels in the job, only where it is.
    assert len(graph) < 1_000_000
    assert "ítem 0 ü".encode() not in graph
    assert indexes("tfrs").vectors("item").tobytes()[:32] not in graph
