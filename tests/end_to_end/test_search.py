"""Searches in real tables of an emulator: as VECTOR_SEARCH would answer, and what cannot be answered."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from worlds import towers

from beam_pipeline.retrieval.command import main

DAY = "2026-03-08"
NASTY = 'é"; DROP \\ --`'


@pytest.fixture
def model():
    return towers(users=30, items=200, dimension=8)


@pytest.fixture
def ids():
    return {"user": [f"user-{n:05}" for n in range(30)], "item": [f"item-{n:05}" for n in range(199)] + [NASTY]}


@pytest.fixture
def search(history, model, ids):
    """Runs a search in a history with two trainings; returns the exit code."""
    history.publish("2026-03-01", "r1", {tower: -vectors for tower, vectors in model.items()}, ids=ids)
    history.publish(DAY, "r2", model, ids=ids)
    return lambda *flags: main([f"--dataset={history.dataset}", f"--project={history.client.project}", *flags])


def brute_force(model, ids, tower, name, among, distance):
    """Returns {id: value}, nearest first."""
    query = model[tower][ids[tower].index(name)]
    found = {}
    for other, vector in zip(ids[among], model[among], strict=True):
        if (tower, name) == (among, other):
            continue
        if distance == "DOT_PRODUCT":
            found[other] = np.dot(vector, query)
        elif distance == "EUCLIDEAN":
            found[other] = np.sqrt(np.sum((vector - query) ** 2))
        else:
            found[other] = 1 - np.dot(vector, query) / np.sqrt(np.dot(vector, vector) * np.dot(query, query))
    order = sorted(found, key=found.get, reverse=distance == "DOT_PRODUCT")
    return {one: found[one] for one in order}


def test_neighbours_are_those_of_brute_force(search, model, ids, history, capsys):
    history.query(
        f"CREATE TABLE {{d}}.songs AS SELECT item_id AS id, CONCAT('song ', item_id) AS label, 'jazz' AS group_name FROM {{d}}.two_tower_item_embedding WHERE train_date = '{DAY}'"
    )
    cases = [
        (["--item=item-00007"], "item", "item-00007", "item", "COSINE"),
        ([f"--item={NASTY}", "--distance=EUCLIDEAN"], "item", NASTY, "item", "EUCLIDEAN"),
        (["--user=user-00003"], "user", "user-00003", "item", "DOT_PRODUCT"),
        (["--user=user-00003", "--users", "--k=29"], "user", "user-00003", "user", "COSINE"),
    ]
    for flags, tower, name, among, distance in cases:
        assert search(*flags, "--json") == 0
        answer = json.loads(capsys.readouterr().out)
        near = brute_force(model, ids, tower, name, among, distance)
        measure = "score" if distance == "DOT_PRODUCT" else "distance"
        found = {one["id"]: one[measure] for one in answer.pop("neighbours")}
        assert [*found] == [*near][: len(found)]
        assert found == pytest.approx({one: near[one] for one in found}, abs=1e-12)
        assert len(found) == (29 if "--users" in flags else 10)
        assert answer == {
            "train_date": DAY,
            "mlflow_run_id": "r2",
            "tower": tower,
            "id": name,
            "among": among,
            "distance_type": distance,
        }
    labels = f"--labels=item=SELECT id, label, group_name FROM {history.dataset}.songs;"
    assert search("--user=user-00003", labels, "--k=2", "--date=2026-03-01") == 0
    training, subject, *lines = capsys.readouterr().out.splitlines()
    # All vectors of both towers are mirrored there: the scores are the same, not their opposites.
    assert training == "training    2026-03-01 weekly r1 (r1)"
    assert subject == "search      the 2 of 200 item ids nearest to user user-00003, by DOT_PRODUCT"
    best = [*brute_force(model, ids, "user", "user-00003", "item", "DOT_PRODUCT").items()][:2]
    for number, (line, (name, score)) in enumerate(zip(lines, best, strict=True), 1):
        assert line.split() == [str(number), f"{score:.4f}", name, "song", name, "jazz"]


def test_what_cannot_be_answered(search, history, capsys):
    for flags, message in [
        (["--item=none"], "there is no item 'none' in training 2026-03-08 weekly r2 (r2): "),
        (
            ["--item=item-00007", "--date=2026-03-02"],
            "--date=2026-03-02: the tables hold no training of that date; there are",
        ),
        (["--item=item-00007", "--run_id=r9"], "--run_id=r9: the tables hold no such run; there are"),
        (["--item=item-00007", "--k=200"], "--k=200: training 2026-03-08 weekly r2 has 199 item ids to find"),
        (["--item=item-00007", "--labels=song=SELECT 1"], "--labels=song=…: there is no tower 'song'"),
        (
            ["--item=item-00007", "--labels=user=SELECT 1"],
            "--labels=user=…: the answer has ids of item; name labels for",
        ),
        (
            ["--item=item-00007", "--labels=item=SELECT nothing"],
            "--labels=item=…: the query for id, label and group_name fails",
        ),
    ]:
        assert search(*flags) == 1
        (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert error.startswith(f"error: {message}"), error
    history.publish("2026-03-15", "r3", {"item": np.array([[0.0, 0.0], [1.0, 2.0], [2.0, 1.0]])}, ids={"item": "abc"})
    for name, message in (
        ("a", "the vector of item 'a' in "),
        ("b", "tower 'item' of training 2026-03-15 weekly r3 has "),
    ):
        assert search(f"--item={name}", "--k=1", "--date=2026-03-15") == 1
        assert message in capsys.readouterr().err
    assert search("--item=b", "--k=1", "--distance=EUCLIDEAN") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "   1  1.4142  c"


def test_two_runs_of_a_date_are_not_mixed(search, history, model, ids, capsys):
    history.publish(DAY, "again", {tower: vectors[::-1].copy() for tower, vectors in model.items()}, ids=ids)
    assert search("--item=item-00007", "--date=2026-03-08") == 1
    assert "2026-03-08 has 2 runs" in capsys.readouterr().err
    assert search("--item=item-00007", "--run_id=r2", "--json") == 0
    found = [one["id"] for one in json.loads(capsys.readouterr().out)["neighbours"]]
    assert found == [*brute_force(model, ids, "item", "item-00007", "item", "COSINE")][:10]


def test_the_query_and_its_cost_are_printed_without_a_search(search, history, capsys):
    assert search("--user=user-00003", "--sql") == 0
    sql = capsys.readouterr().out
    assert sql.startswith("SELECT base.item_id AS id, -distance AS score\nFROM VECTOR_SEARCH(")
    assert sql.endswith("LIMIT 10;\n")
    assert search("--user=user-00003", "--plan") == 0
    assert "reads       every vector of the partition" in capsys.readouterr().out
    assert search("--user=none", "--plan") == 1


def test_neighbours_in_the_last_five_trainings(search, history, model, ids, capsys):
    """The recipe of docs/search.md that an emulator can run."""
    for week in range(5):
        history.publish(f"2026-02-0{week + 1}", f"before{week}", model, ids=ids)
    page = (Path(__file__).parents[2] / "docs" / "search.md").read_text(encoding="utf-8")
    (recipe,) = [sql for sql in re.findall(r"```sql\n(.*?)```", page, re.DOTALL) if "COSINE_DISTANCE" in sql]
    assert recipe.count("2026-02-08") == 2
    for name, value in (
        ("raw_prod.", f"{history.dataset}."),
        ("2026-02-08", "2026-02-02"),
        ("item-jazz-007", "item-00007"),
    ):
        recipe = recipe.replace(name, value)
    found = {}
    for day, name, distance in history.query(recipe):
        found.setdefault(str(day), {})[name] = distance
    assert [*found] == ["2026-02-03", "2026-02-04", "2026-02-05", "2026-03-01", DAY]
    near = brute_force(model, ids, "item", "item-00007", "item", "COSINE")
    for neighbours in found.values():
        assert [*neighbours] == [*near][:10]
    assert found[DAY] == pytest.approx({name: near[name] for name in [*near][:10]})
