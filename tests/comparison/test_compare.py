"""The whole comparison against emulators: histories that are made, every number known."""

import numpy as np
import pytest
from history import RESULT_TABLES
from worlds import rotation, towers, turned


def test_a_rotation_is_no_change(history, capsys):
    before = towers()
    history.publish("2026-03-01", "r1", before)
    history.publish("2026-03-08", "r2", turned(before, rotation(1)))
    tables = history.tables()
    assert history.compare("--ids=both") == 0
    found = history.results()
    assert [*found] == [("r1", "r2", "user"), ("r1", "r2", "item")] or len(found) == 2
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
    assert history.tables() == tables | RESULT_TABLES | {"two_tower_user_embedding_change"}
    assert history.files() == []
    out = capsys.readouterr().out
    assert "items       600 of 600 common; score change median 0.00, 99th percentile 0.00" in out
    assert "Too few trainings to say whether this is usual (0 of 5)." in out
