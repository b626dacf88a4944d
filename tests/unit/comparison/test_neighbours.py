"""The best candidates, block by block, against sorting everything; and how many of them were kept."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import brute_force, nearest, recommendations, towers

from beam_pipeline.comparison import measures, neighbours
from beam_pipeline.comparison.neighbours import Nearest, kept


@given(
    st.integers(0, 10_000),
    st.integers(1, 60),
    st.integers(1, 12),
    st.integers(1, 5),
    st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_blocks_equal_brute_force_ties_included(seed, candidates, k, parts, whole_numbers):
    """Whole numbers tie all the time, and exactly."""
    random = np.random.default_rng(seed)
    shape = [(7, 3), (candidates, 3)]
    queries, vectors = (
        random.integers(-2, 3, size=size).astype(float) if whole_numbers else random.normal(size=size) for size in shape
    )
    ids = np.array([f"i{n}" for n in random.permutation(candidates)], object)
    found = Nearest.none(7, k)
    for places in np.array_split(np.arange(candidates), parts):
        part = Nearest.none(7, k)
        if len(places):
            part.see(queries, vectors[places], ids[places])
        found.add(part)
    assert found.lists(k) == brute_force(queries, vectors, ids, k)


def test_several_blocks_equal_brute_force(monkeypatch):
    monkeypatch.setattr(neighbours, "_CANDIDATE_ROWS", 100)
    monkeypatch.setattr(neighbours, "_QUERY_ROWS", 64)
    model = towers(users=300)
    ids = [f"id {n:05}" for n in range(600)]
    assert nearest(model["user"], model["item"], ids, 10).lists(10) == brute_force(
        model["user"], model["item"], ids, 10
    )


def test_scores_closer_than_float32_can_tell():
    random = np.random.default_rng(1)
    base = random.normal(size=8)
    vectors = base + 1e-9 * random.normal(size=(5000, 8))
    ids = [f"id {n:05}" for n in range(5000)]
    assert nearest(base[None], vectors, ids, 10).lists(10) == brute_force(base[None], vectors, ids, 10)


def test_an_id_is_not_its_own_neighbour():
    vectors = measures.unit(towers()["item"])
    ids = np.array([f"id {n:05}" for n in range(600)], object)
    vectors[1] = vectors[0]  # two that are the same: each is the other's neighbour
    found = nearest(vectors[:40], vectors, ids, 11).lists(10, leave_out=ids[:40])
    assert all(len(names) == 10 and own not in names for own, names in zip(ids, found, strict=False))
    assert (found[0][0], found[1][0]) == ("id 00001", "id 00000")


def test_k_above_the_number_of_items():
    found = nearest(np.eye(3), np.eye(3)[:2], ["a", "b"], 10).lists(10)
    assert found == [["a", "b"], ["b", "a"], ["a", "b"]]
    result = kept(found, [["a", "b", "c"]] * 3, 10, 3)
    assert (result.k, result.share, result.error, result.queries) == (2, 1, 0, 3)
    assert kept([[]], [["a"]], 10, 1) is None
    assert kept([], [], 10, 0) is None


def test_a_sample_keeps_what_all_keep_within_its_error():
    before, random = towers(users=6000), np.random.default_rng(2)
    after = {t: v + 0.3 * random.normal(size=v.shape) for t, v in before.items()}
    lists = recommendations(before), recommendations(after)
    everybody = kept(*lists, 10, 6000)
    assert everybody.error == 0
    outside = 0
    for seed in range(20):
        asked = np.random.default_rng(seed).choice(6000, 500, replace=False)
        sample = kept(*([those[n] for n in asked] for those in lists), 10, 6000)
        assert 0 < sample.error < 0.02
        outside += abs(sample.share - everybody.share) > 3 * sample.error
    assert outside <= 1
    assert everybody.distinct_before == len({name for names in lists[0] for name in names})
