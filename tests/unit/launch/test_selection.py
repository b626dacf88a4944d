"""Which layers are taken for the towers when none is named."""

import pytest

from beam_pipeline.launch.selection import discover


@pytest.mark.parametrize(
    ("layers", "towers"),
    [
        (["item_layer", "user_layer"], {"user": "user_layer", "item": "item_layer"}),
        (["city", "item_layer", "user_layer"], {"user": "user_layer", "item": "item_layer"}),
        (["ItemTower", "UserTower"], {"user": "UserTower", "item": "ItemTower"}),
        (["candidate", "query"], {"user": "query", "item": "candidate"}),
        (["user_a", "user_b"], None),
        (["user_item", "item"], None),
        (["a", "b"], None),
        (["user", "item", "city"], None),
        (["user"], None),
        ([], None),
    ],
)
def test_what_is_taken_for_the_towers(layers, towers):
    assert discover(layers) == towers


@pytest.mark.parametrize(
    ("layers", "indexes", "towers"),
    [
        (["index", "query_model"], ["index"], {"user": "query_model", "item": "index"}),
        (["encoder", "retrieval"], ["retrieval"], {"user": "encoder", "item": "retrieval"}),
        # Towers that are in the model themselves come first.
        (["candidate_model", "index", "query_model"], ["index"], {"user": "query_model", "item": "candidate_model"}),
        (["index", "item_model"], ["index"], None),
        (["item_model", "user_index"], ["user_index"], None),
        (["a", "b", "index"], ["index"], None),
        (["index"], ["index"], None),
    ],
)
def test_a_search_index_is_taken_for_what_its_queries_find(layers, indexes, towers):
    assert discover(layers, indexes) == towers
