"""The whole comparison against emulators: histories that are made, every number known."""

import dataclasses
import random
import subprocess
import time

import numpy as np
import pytest
import worlds
from google.cloud import bigquery, storage
from history import RESULT_TABLES
from worlds import rotation, towers, turned

from beam_pipeline.comparison import measures, measuring, publishing, tables
from beam_pipeline.comparison.pipeline import _StepFn
from beam_pipeline.comparison.tables import Pair, Trained
from beam_pipeline.comparison.work import Comparison
from beam_pipeline.launch import execution


def noisy(seed=1, noise=0.3, **sizes):
    """Returns a training like any other: a little noise, and rotated."""
    random = np.random.default_rng(seed)
    made = {t: v + noise * random.normal(size=v.shape) for t, v in towers(**sizes).items()}
    return turned(made, rotation(seed, made["item"].shape[1]))


@pytest.fixture
def two(history):
    history.publish("2026-03-01", "r1", towers(users=300, items=90))
    history.publish("2026-03-08", "r2", noisy(users=300, items=90))
    return history


def whole(history):
    """Returns whether the results are there; fails if they are there in part."""
    if "two_tower_embedding_comparison" not in history.tables():
        return False
    found = history.results()
    if not found:
        return False
    assert {key[2] for key in found} == {"user", "item"}
    assert len(history.changes("item")["r1", "r2"]) == 90
    return True


# What is published.


def test_a_rotation_is_no_change(history, capsys):
    before = towers()
    history.publish("2026-03-01", "r1", before)
    history.publish("2026-03-08", "r2", turned(before, rotation(1)))
    tables_before = history.tables()
    assert history.compare("--ids=both") == 0
    found = history.results()
    assert {*found} == {("r1", "r2", "user"), ("r1", "r2", "item")}
    item = found["r1", "r2", "item"]
    assert (item["ids_common"], item["ids_added"], item["ids_removed"]) == (600, 0, 0)
    assert item["score_change_p99"] < 1e-6
    assert item["distance_p99"] < 1e-6
    assert item["neighbours_kept"] == item["recommendations_kept"] == 1
    assert item["score_correlation"] == pytest.approx(1)
    assert item["norm_ratio"] == pytest.approx(1)
    for tower, count in (("user", 1500), ("item", 600)):
        changes = history.changes(tower)["r1", "r2"]
        assert len(changes) == count
        assert max(max(one[:2]) for one in changes.values()) < 1e-6
    aligned = np.reshape(item["rotation"], (16, 16))
    assert np.abs(turned(before, rotation(1))["item"] @ aligned - before["item"]).max() < 1e-9
    assert history.tables() == tables_before | RESULT_TABLES | {"two_tower_user_embedding_change"}
    assert history.files() == []
    out = capsys.readouterr().out
    assert "items       600 of 600 common; score change median 0.00, 99th percentile 0.00" in out
    assert "Too few trainings to say whether this is usual (0 of 5)." in out


def test_what_is_published_is_what_the_measures_say(history):
    """Ids in another order, some added, some removed; blocks of the job equal brute force over everything."""
    before, after = towers(users=700), noisy(users=700)
    ids = [f"é {n:04}" for n in range(600)]
    order = np.random.default_rng(1).permutation(595)
    later_ids = [*(ids[n] for n in order), *(f"new {n}" for n in range(8))]
    later = {
        "user": after["user"],
        "item": np.concatenate([after["item"][order], np.random.default_rng(2).normal(size=(8, 16))]),
    }
    history.publish("2026-03-01", "r1", before, ids={"item": ids})
    history.publish("2026-03-08", "r2", later, ids={"item": later_ids})
    assert history.compare("--k=7", "--top=9") == 0
    item = history.results()["r1", "r2", "item"]
    assert (item["ids_common"], item["ids_added"], item["ids_removed"]) == (595, 8, 5)
    assert item["added_examples"] == [f"new {n}" for n in range(8)]
    assert item["removed_examples"] == ids[595:]
    common = {"user": before["user"], "item": before["item"][:595]}
    common_after = {"user": after["user"], "item": after["item"][:595]}
    fitted = worlds.fit(common, common_after)
    change, totals = measures.measure(worlds.rows(common["item"], common_after["item"], ids[:595]), "item", fitted, 9)
    rows = history.changes("item")["r1", "r2"]
    assert len(rows) == 608
    for place, name in enumerate(ids[:595]):
        assert rows[name] == pytest.approx(
            (change.score_change[place], change.distance[place], change.norm_before[place], change.norm_after[place]),
            abs=1e-9,
        )
    assert rows["new 3"][:3] == (None, None, None)
    assert rows[ids[599]][3] is None
    assert item["score_change_p99"] == pytest.approx(np.nanquantile(change.score_change, 0.99), abs=0.01)
    assert item["score_change_mean"] == pytest.approx(change.score_change.mean())
    assert [mover["id"] for mover in item["most_moved"]] == [mover.id for mover in totals.movers]
    lists = [
        worlds.brute_force(model["user"], model["item"], names, 7)
        for model, names in ((before, ids), (later, later_ids))
    ]
    expected = measures.kept(*lists, 7, 700)
    assert item["recommendations_kept"] == pytest.approx(expected.share)
    assert (item["recommendations_queries"], item["recommendations_k"]) == (700, 7)
    assert (item["distinct_items_before"], item["distinct_items_after"]) == (
        expected.distinct_before,
        expected.distinct_after,
    )
    lists = []
    for model, names in ((before, ids), (later, later_ids)):
        units = measures.unit(model["item"])
        asked = [names.index(name) for name in ids[:595]]
        near = worlds.brute_force(units[asked], units, names, 8)
        lists.append([[n for n in one if n != own][:7] for own, one in zip(ids[:595], near, strict=True)])
    assert item["neighbours_kept"] == pytest.approx(measures.kept(*lists, 7, 595).share)
    for mover in item["most_moved"]:
        place = ids.index(mover["id"])
        assert [near["id"] for near in mover["nearest_before"]] == lists[0][place][:5]
        assert [near["id"] for near in mover["nearest_after"]] == lists[1][place][:5]
    assert sum(item["score_change_histogram"]) == 595
    assert sum(square["ids"] for square in item["distance_and_score_change"]) == 595
    assert sum(one["ids"] for one in item["norms"]) == 595


def test_every_column_is_described(history):
    history.publish("2026-03-01", "r1", towers(users=90, items=80))
    history.publish("2026-03-08", "r2", towers(users=90, items=80))
    assert history.compare() == 0
    names = [tables.comparison_table(history.destination), tables.change_table(history.destination, "item")]
    for name, fields in zip(names, [tables.COMPARISON_SCHEMA, tables.change_schema("item")], strict=True):
        table = history.client.get_table(name)
        assert [column.name for column in table.schema] == [column.name for column in fields]
        for column in fields:
            assert column.description
            assert all(inner.description for inner in column.fields)
        assert (table.time_partitioning.type_, table.time_partitioning.field) == ("DAY", "train_date")
    assert history.client.get_table(names[1]).clustering_fields == ["item_id"]


def test_a_plan_says_what_would_run_and_does_nothing(two, capsys):
    before = two.tables()
    assert two.compare("--plan") == 0
    out = capsys.readouterr().out
    assert "FULL OUTER JOIN" in out
    assert "BEGIN TRANSACTION" in out
    assert (
        f"comparing   2026-03-01 weekly r1 → 2026-03-08 weekly r2 (r1 → r2)\nresults     local.{two.dataset}.two" in out
    )
    assert two.tables() == before
    assert two.files() == []


def test_staging_in_another_dataset_a_key_and_a_filter(two, monkeypatch):
    """Emulators keep no key: what is asked for is looked at on its way."""
    made, loads, scripts = [], [], []
    client = bigquery.Client
    create, insert, query = client.create_table, client.load_table_from_uri, client.query
    monkeypatch.setattr(client, "create_table", lambda self, t, **o: made.append(t) or create(self, t, **o))
    monkeypatch.setattr(client, "load_table_from_uri", lambda self, *a, **o: loads.append(o) or insert(self, *a, **o))
    monkeypatch.setattr(client, "query", lambda self, sql, **o: scripts.append(sql) or query(self, sql, **o))
    key = "projects/p/locations/eu/keyRings/r/cryptoKeys/k"
    scratch = f"{two.dataset}_scratch"
    two.client.create_dataset(scratch)
    assert two.compare(f"--staging_dataset={scratch}", f"--kms_key={key}", "--require_partition_filter") == 0
    assert whole(two)
    assert len(made) == 5
    for table in made:
        assert table.encryption_configuration.kms_key_name == key
        assert table.labels == {"managed_by": "beam_pipeline"}
        assert (table.dataset_id == scratch) == ("_staging_" in table.table_id)
        assert (table.expires is not None) == ("_staging_" in table.table_id)
        assert bool(table.require_partition_filter) == table.table_id.endswith(("comparison", "change"))
    assert len(loads) == 2
    for load in loads:
        assert load["job_config"].destination_encryption_configuration.kms_key_name == key
        assert load["job_config"].labels == {"managed_by": "beam_pipeline"}
    joins = [sql for sql in scripts if sql.startswith("CREATE OR REPLACE TABLE")]
    assert len(joins) == 2
    for sql in joins:
        assert sql.startswith(f"CREATE OR REPLACE TABLE `local.{scratch}.two_tower_")
        assert f"kms_key_name = '{key}'" in sql
    assert [*two.client.list_tables(scratch)] == []
    two.client.delete_dataset(scratch)


def test_a_history_with_a_suffix_is_compared_with_itself(history):
    history.destination = dataclasses.replace(history.destination, suffix="_history")
    history.publish("2026-03-01", "r1", towers(users=300, items=90))
    history.publish("2026-03-08", "r2", noisy(users=300, items=90))
    before = history.tables()
    assert history.compare() == 1  # There is none without the suffix.
    assert history.compare("--table_suffix=_history") == 0
    results = {"two_tower_embedding_history_comparison", "two_tower_item_embedding_history_change"}
    assert results <= history.tables() - before


# Pairs of models that lack something.


def test_dimensions_16_and_32_and_zero_vectors(history):
    before = towers()
    after = turned(before, rotation(1, 32)[:16])
    after["item"][4], before["item"][7], before["user"][9] = 0, 0, 0
    history.publish("2026-03-01", "r1", before)
    history.publish("2026-03-08", "r2", after)
    assert history.compare() == 0
    item = history.results()["r1", "r2", "item"]
    assert (item["previous_dimension"], item["dimension"], len(item["rotation"])) == (16, 32, 32 * 32)
    assert (item["zero_vectors_before"], item["zero_vectors_after"]) == (1, 1)
    rows = history.changes("item")["r1", "r2"]
    assert rows["item-00004"][:2] == rows["item-00007"][:2] == (None, None)
    # The user whose vector was zero before weighs in: its scores were all zero.
    assert item["score_change_p50"] < 1e-3
    assert item["distance_p99"] < 1e-6


def test_one_tower_alone(history, capsys):
    before = {"item": towers()["item"]}
    after = {"item": before["item"] @ rotation(1)}
    after["item"][7] = before["item"][8]
    history.publish("2026-03-01", "r1", before)
    history.publish("2026-03-08", "r2", after)
    assert history.compare() == 0
    item = history.results()["r1", "r2", "item"]
    assert item["score_change_p50"] is item["recommendations_kept"] is item["score_correlation"] is None
    assert item["note"] == "no score change: there is no other tower to have scores with"
    assert item["distance_p50"] < measures.WIDTH
    assert item["most_moved"][0]["id"] == "item-00007"
    assert item["neighbours_kept"] > 0.9
    assert "distance median 0.00, 99th percentile" in capsys.readouterr().out


def test_few_ids_and_more_neighbours_than_items(history):
    history.publish("2026-03-01", "r1", towers(users=100, items=7))
    history.publish("2026-03-08", "r2", noisy(users=100, items=7))
    assert history.compare("--k=50") == 0
    item = history.results()["r1", "r2", "item"]
    assert item["distance_p50"] is item["distance_unrelated"] is None
    assert item["note"] == ("no distance: it takes 160 common ids that are not zero, ten per dimension; there are 107")
    assert item["score_change_p50"] > 0
    assert (item["recommendations_k"], item["recommendations_kept"]) == (7, 1)
    assert (item["neighbours_k"], item["neighbours_kept"]) == (6, 1)


def test_no_common_ids(history, capsys):
    history.publish("2026-03-01", "r1", towers(users=90, items=80))
    history.publish(
        "2026-03-08",
        "r2",
        towers(users=90, items=80),
        ids={tower: [f"other {tower} {n}" for n in range(count)] for tower, count in (("user", 90), ("item", 80))},
    )
    assert history.compare() == 0
    item = history.results()["r1", "r2", "item"]
    assert (item["ids_common"], item["ids_added"], item["ids_removed"]) == (0, 80, 80)
    assert item["score_change_p50"] is item["distance_p50"] is item["neighbours_kept"] is None
    assert item["note"] == "no common ids"
    assert len(history.changes("item")["r1", "r2"]) == 160
    assert "No verdict: no common ids" in capsys.readouterr().out


def test_towers_of_other_names(history):
    before = towers(users=200, items=80)
    after = noisy(users=200, items=80)
    for day, run, model in (("2026-03-01", "r1", before), ("2026-03-08", "r2", after)):
        history.publish(day, run, {"listener": model["user"], "song": model["item"]})
    assert history.compare("--towers=listener,song") == 0
    assert {key[2] for key in history.results()} == {"listener", "song"}
    assert len(history.changes("song")["r1", "r2"]) == 80
    assert history.results()["r1", "r2", "song"]["neighbours_kept"] is not None


def test_cosine_scores(history):
    before = towers(users=300)
    after = turned(before, rotation(1))
    after["item"] *= np.random.default_rng(1).uniform(0.2, 5, size=(600, 1))
    history.publish("2026-03-01", "r1", before)
    history.publish("2026-03-08", "r2", after)
    assert history.compare("--score=cosine") == 0
    item = history.results()["r1", "r2", "item"]
    assert (item["score"], item["recommendations_kept"]) == ("cosine", 1)
    assert item["score_change_p99"] < 1e-6
    assert history.compare() == 0
    item = history.results()["r1", "r2", "item"]
    assert item["score"] == "dot"
    assert item["recommendations_kept"] < 0.9


# Labels.


def test_labels_and_groups(history, tmp_path):
    before, after = towers(users=300, items=90), noisy(users=300, items=90)
    after["item"][::3] = np.random.default_rng(5).normal(size=(30, 16))
    history.publish("2026-03-01", "r1", before)
    history.publish("2026-03-08", "r2", after)
    history.query(
        "CREATE TABLE {d}.songs AS SELECT item_id AS id, CONCAT('Song <', item_id, '>') AS label, "
        "CONCAT('genre ', CAST(MOD(CAST(SUBSTR(item_id, 6) AS INT64), 3) AS STRING)) AS group_name "
        "FROM {d}.two_tower_item_embedding WHERE train_date = '2026-03-08' AND item_id != 'item-00002'"
    )
    page = tmp_path / "page.html"
    query = f"SELECT * FROM {history.dataset}.songs"
    assert history.compare(f"--labels=item={query}", "--labels=team=recommender", f"--report={page}") == 0
    item = history.results()["r1", "r2", "item"]
    groups = {group["group_name"]: group for group in item["by_group"]}
    assert {name: group["ids"] for name, group in groups.items()} == {"genre 0": 30, "genre 1": 30, "genre 2": 29}
    rows = history.changes("item")["r1", "r2"]
    own = [rows[f"item-{n:05}"][0] for n in range(0, 90, 3)]
    assert groups["genre 0"]["score_change_mean"] == pytest.approx(np.mean(own))
    assert groups["genre 0"]["score_change_p50"] == pytest.approx(np.median(own), abs=0.02)
    assert groups["genre 0"]["score_change_max"] == pytest.approx(max(own))
    mover = item["most_moved"][0]
    assert (mover["label"], mover["group_name"]) == (f"Song <{mover['id']}>", "genre 0")
    assert all(near["label"] == f"Song <{near['id']}>" for near in mover["nearest_after"] if near["id"] != "item-00002")
    html = page.read_text()
    assert "Song &lt;item-" in html
    assert "Song <item" not in html
    assert "genre 0" in html


# Several pairs, and the same again.


def test_all_pairs_in_one_job(history, capsys):
    for number in range(8):
        model = noisy(number, users=300, items=100)
        if number == 7:
            model["item"][:5] = np.random.default_rng(9).normal(size=(5, 16))
        history.publish(f"2026-03-0{number + 1}", f"r{number}", model)
    assert history.compare("--from=2026-03-01", "--to=2026-03-02") == 0
    assert history.compare("--all", "--fail_if_unusual") == 3
    out, err = capsys.readouterr()
    assert "r0 → r1)" not in out.split("results")[2]
    assert "are published" in err.splitlines()[-1]
    found = history.results("tower = 'item'")
    assert [*sorted(found)] == [(f"r{n}", f"r{n + 1}", "item") for n in range(7)]
    for number in range(7):
        row = found[f"r{number}", f"r{number + 1}", "item"]
        if not number:
            assert row["unusual_above"] is row["unusual_share"] is None
            continue
        assert row["unusual_above"] == found[f"r{number - 1}", f"r{number}", "item"]["score_change_p99"]
        values = [one[0] for one in history.changes("item")[f"r{number}", f"r{number + 1}"].values()]
        assert row["unusual_share"] == pytest.approx(np.mean(np.array(values) > row["unusual_above"]), abs=0.011)
    assert found["r6", "r7", "item"]["unusual_share"] >= 0.05
    assert "Unusual: the 99th percentile" in out
    assert "(its own usual 0." in out
    assert history.compare("--all") == 0
    assert "every pair of successive trainings has a result" in capsys.readouterr().out


def test_the_same_pair_again_replaces_itself(history):
    history.publish("2026-03-01", "r1", towers(users=100, items=90))
    history.publish("2026-03-08", "r2", noisy(users=100, items=90))
    history.publish("2026-03-15", "r3", noisy(2, users=100, items=90))
    assert history.compare("--from=r1", "--to=r2") == 0
    first = history.results()
    assert history.compare("--all", "--ids=both") == 0
    assert history.compare("--from=2026-03-01", "--to=2026-03-08", "--top=3") == 0
    found = history.results()
    assert {key[:2] for key in found} == {("r1", "r2"), ("r2", "r3")}
    again = found["r1", "r2", "item"]
    assert len(again["most_moved"]) == 3
    changed = {"published_at", "launch", "job_name", "most_moved", "added_examples", "removed_examples"}
    for name, value in first["r1", "r2", "item"].items():
        assert name in changed or again[name] == value
    assert len(history.changes("item")["r1", "r2"]) == 90
    assert history.compare("--from=r1", "--to=r2", "--ids=none") == 0
    assert [*history.changes("item")] == [("r2", "r3")]
    assert len(history.changes("user")["r2", "r3"]) == 100


def test_a_first_training_has_nothing_to_compare(history, capsys):
    history.publish("2026-03-01", "r1", towers(users=10, items=10))
    before = history.tables()
    assert history.compare() == 0
    assert "there is no training before 2026-03-01 weekly r1; nothing to compare" in capsys.readouterr().out
    assert history.tables() == before


def test_a_template_with_nothing_to_compare_writes_an_empty_job(history, warehouse):
    """Without a job file the service reports the template as FAILED."""
    history.publish("2026-03-01", "r1", towers(users=10, items=10))
    folder = f"{history.dataset}/nothing"
    done = history.subprocess(
        *("--all", "--runner=DataflowRunner", "--region=europe-west1", "--no_auth", "--sdk_container_image=image:1"),
        *(f"--template_location=gs://{warehouse.bucket}/{folder}/job.json",),
        *(f"--staging_location=gs://{warehouse.bucket}/{folder}",),
    )
    assert done.returncode == 0, done.stderr
    blobs = {blob.name.rsplit("/", 1)[1]: blob for blob in storage.Client().list_blobs(warehouse.bucket, prefix=folder)}
    assert blobs["job.json"].size
    assert b"Nothing to do" in blobs["pipeline.pb"].download_as_bytes()


# Whatever happens.


STEPS = ("prepare", "join", "fit", "measure", "ask", "look", "finish", "load", "shape", "publish", "clean")


def test_every_step_can_be_retried(two, monkeypatch):
    """Each step is done twice for each element, as by a worker that died before it could say so."""
    assert two.compare() == 0
    expected, tables_before = two.results(), two.tables()
    changes = two.changes("item")
    done = []

    def twice(self, element, *inputs):
        done.append(self._step.__name__)
        list(self._step(self._client, self._comparison, element, *inputs))
        yield from self._step(self._client, self._comparison, element, *inputs)

    monkeypatch.setattr(_StepFn, "process", twice)
    assert two.compare() == 0
    assert {*STEPS} <= {*done}
    again = two.results()
    for key, row in expected.items():
        for name, value in row.items():
            assert name in ("published_at", "launch", "job_name") or again[key][name] == value, name
    assert two.changes("item") == changes
    assert two.tables() == tables_before
    assert two.files() == []


HOOK = """
from beam_pipeline.comparison import measuring, publishing, values
(module,) = [one for one in (measuring, publishing, values) if hasattr(one, "{step}")]
original = module.{step}
def killed(*arguments):
    import os, time
    found = list(original(*arguments))
    {when}
module.{step} = killed
"""


@pytest.mark.timeout(400)
def test_killed_after_every_step(two, tmp_path):
    """The process dies when a step has done its work and before anybody knows."""
    for step in STEPS:
        hook = HOOK.format(step=step, when="os._exit(9)")
        process = two.hooked(tmp_path, hook)
        _, error = process.communicate(timeout=120)
        assert process.returncode == 9, error[-2000:]
        assert whole(two) == (step in ("publish", "clean"))
        if step == "publish":
            two.query("DELETE FROM {d}.two_tower_embedding_comparison WHERE TRUE")
    assert two.compare() == 0
    assert whole(two)
    # What dead launches have left expires; in an embedded warehouse, where nothing does, the next launch removes it.
    assert [name for name in two.tables() if "staging" in name]
    pair = Pair(*(Trained(None, run, "", "", {}) for run in ("r1", "r2")))
    comparison = Comparison(two.destination, (pair,), "user", "item", "gs://warehouse/tmp/none", "t", ids=("item",))
    publishing.discard(two.client, comparison, "")
    assert not [name for name in two.tables() if "staging" in name]
    assert whole(two)


@pytest.mark.timeout(400)
def test_killed_at_random(two, tmp_path):
    random.seed(3)
    for _ in range(3):
        process = two.start(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(random.uniform(0.3, 3))
        process.kill()
        process.wait()
        whole(two)
    assert two.compare() == 0
    assert whole(two)


def test_a_step_that_fails_leaves_nothing(two, monkeypatch, capsys):
    before = two.tables()
    monkeypatch.setattr(publishing, "shape", fail)
    assert two.compare() == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: the results are wrong")
    assert two.tables() == before
    assert two.files() == []


def fail(*_):
    from beam_pipeline.errors import AuditError

    raise AuditError("the results are wrong")


def test_interrupted(two, tmp_path):
    before = two.tables()
    hook = HOOK.format(step="join", when="print('here', flush=True); time.sleep(60)")
    process = two.hooked(tmp_path, hook)
    while process.stdout.readline() != "here\n":
        assert process.poll() is None
    process.terminate()
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "error: interrupted" in error
    assert two.tables() == before


def test_two_at_once(two):
    processes = [two.start() for _ in range(2)]
    for process in processes:
        _, error = process.communicate(timeout=150)
        assert process.returncode == 0, error[-2000:]
    assert whole(two)
    assert two.tables() >= RESULT_TABLES
    assert not [name for name in two.tables() if "staging" in name]


def test_in_several_processes(two):
    assert two.compare() == 0
    expected = two.results()
    done = two.subprocess("--direct_num_workers=2", "--direct_running_mode=multi_processing")
    assert done.returncode == 0, done.stderr[-3000:]
    again = two.results()
    for key, row in expected.items():
        assert {n: v for n, v in again[key].items() if n not in ("published_at", "launch", "job_name")} == {
            n: v for n, v in row.items() if n not in ("published_at", "launch", "job_name")
        }
    assert two.files() == []


def test_a_run_that_is_replaced_meanwhile(two, monkeypatch, capsys):
    """The tables no longer hold what the job was launched for."""
    run = execution.run

    def replaced(*arguments, **options):
        two.query("DELETE FROM {d}.two_tower_item_embedding WHERE train_date = '2026-03-08' AND item_id < 'item-00050'")
        return run(*arguments, **options)

    monkeypatch.setattr(execution, "run", replaced)
    before = two.tables()
    assert two.compare() == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: tower 'item': 40 rows of run r2 in partition 2026-03-08 where there were 90")
    assert two.tables() == before


def test_a_stream_that_loses_rows_is_noticed(two, monkeypatch, capsys):
    measure = measuring.measure

    def lossy(client, comparison, stream):
        found = [*measure(client, comparison, stream)]
        found[0][1].common -= 1
        yield from found

    monkeypatch.setattr(measuring, "measure", lossy)
    assert two.compare() == 1
    assert "ids were read of" in capsys.readouterr().err.splitlines()[-1]
