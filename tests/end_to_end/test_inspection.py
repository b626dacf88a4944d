"""Choosing towers: --inspect, and models whose towers have other names."""

import re

from job import MARCH_1, refused

from beam_pipeline.launch.launcher import launch
from beam_pipeline.launch.options import parse


def test_inspect_prints_every_tower_and_needs_no_destination(store, models, capsys, monkeypatch):
    for name in ("BIGQUERY_EMULATOR_HOST", "STORAGE_EMULATOR_HOST", "GOOGLE_CLOUD_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    run = store.log(models("special"), "special", MARCH_1)
    assert launch(parse([f"--run_id={run}", f"--tracking_uri={store.uri}", "--inspect"])) == 0
    out = capsys.readouterr().out
    assert out.splitlines() == [
        f"experiment  {store.experiment}",
        f"run         special ({run}), trained 2026-03-01 UTC",
        f"model       {store.artifacts(run)}",
        "layer       item_layer",
        "  embedding 137 rows × 4 float32, 2,192 bytes in variables/variables.data-00000-of-00001",
        "  ids       100, 689 bytes in assets/few.txt",
        "  such as   'few 0', 'few 1', 'few 2', …",
        "  no ids    37 rows, 2 of them before the first id",
        "  then      ends at the embedding",
        "layer       user_layer",
        "  embedding 150 rows × 4 float32, 2,400 bytes in variables/variables.data-00000-of-00001",
        "  ids       100, 790 bytes in saved_model.pb",
        "  such as   'few 0', 'few 1', 'few 2', …",
        "  no ids    50 rows, 4 of them before the first id",
        "  then      ends at the embedding",
    ]


def test_the_only_two_towers_are_found_by_their_names(job, store, models, capsys):
    run = store.log(models("queries"), "queries", MARCH_1)
    assert job.run(run) == 0
    out = capsys.readouterr().out
    assert (
        "towers      found by the names of the model's only two: --tower=user=query_tower --tower=item=Candidates"
        in out
    )
    for tower in ("user", "item"):
        assert job.rows(tower) == {("2026-03-01", run): models("queries").rows(tower)}


def test_three_towers_are_listed_and_none_is_taken(job, store, models, capsys):
    run = store.log(models("three"), "three", MARCH_1)
    line = refused(job, capsys, run)
    assert "layer 'user_layer' does not exist" in line
    assert re.search("layers that are towers: city_tower, item_tower, user_tower; choose with --tower", line)
    assert job.run(run, "--tower=user=user_tower", "--tower=item=item_tower") == 0
    assert job.rows("item") == {("2026-03-01", run): models("three").rows("item")}
