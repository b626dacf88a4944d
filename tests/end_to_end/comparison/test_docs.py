"""What docs/comparison.md tells people to do with the results."""

import re
from pathlib import Path

import numpy as np
import pytest
from worlds import rotation, towers, turned

from beam_pipeline.comparison.command import parser
from beam_pipeline.comparison.tables import COMPARISON_SCHEMA

TEXT = (Path(__file__).parents[3] / "docs/comparison.md").read_text(encoding="utf-8")


def test_recipes(history):
    before = towers(users=200, items=80)
    history.publish("2026-03-01", "r1", before)
    history.publish("2026-03-08", "r2", turned(before, rotation(1)))
    assert history.compare() == 0
    history.query("CREATE TABLE {d}.songs AS SELECT item_id AS id, 'jazz' AS genre FROM {d}.two_tower_item_embedding")
    (recipes,) = re.findall(r"```sql\n(.*?)```", TEXT, re.DOTALL)
    texts = recipes.replace("raw_prod.", f"{history.dataset}.").replace("catalogue.", f"{history.dataset}.")
    genres, item, aligned = (history.query(text.replace("item-jazz-007", "item-00007")) for text in texts.split("\n\n"))
    assert genres[0][:2] == ("jazz", 160)  # the table of songs has both dates
    assert genres[0][2] == pytest.approx(0, abs=1e-6)
    assert len(item) == 1
    vectors = dict(aligned)
    for number in range(80):
        assert np.abs(np.array(vectors[f"item-{number:05}"]) - before["item"][number]).max() < 1e-9


def test_flags_and_columns_that_are_named_exist():
    flags = {flag for action in parser()._actions for flag in action.option_strings}
    assert {*re.findall(r"`(--[a-z_]+)", TEXT)} <= flags
    assert {"by_group", "rotation"} <= {column.name for column in COMPARISON_SCHEMA}
