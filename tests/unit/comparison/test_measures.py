"""What a comparison says of models between which the difference is known."""

import numpy as np
import pytest
import worlds
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import orthogonal_procrustes
from worlds import brute_force, compare, nearest, recommendations, rotation, towers, turned

from beam_pipeline.comparison import measures
from beam_pipeline.comparison.measures import (
    Cloud,
    Distribution,
    Fit,
    Group,
    Nearest,
    Rows,
    Totals,
    kept,
    measure,
    usual,
)

# Nothing has changed.


def reflection():
    turn = rotation(5)
    turn[:, 0] *= -1
    return turn


SAME = {
    "identity": np.eye(16),
    **{f"rotation {seed}": rotation(seed) for seed in (1, 2, 3)},
    "reflection": reflection(),
    "another sign": -np.eye(16),
}


@pytest.mark.parametrize("turn", SAME.values(), ids=[*SAME])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_a_rotation_is_no_change(turn, dtype):
    before = {tower: vectors.astype(dtype) for tower, vectors in towers().items()}
    after = {tower: vectors.astype(dtype) for tower, vectors in turned(towers(), turn).items()}
    for change, totals in compare(before, after).values():
        assert change.score_change.max() < 1e-6
        assert change.distance.max() < 1e-6
        assert totals.score_change.quantile(0.5) < 1e-6
    assert kept(recommendations(before), recommendations(after), 10, 1500).share == 1


def test_permuted_rows_are_no_change():
    """The order of rows is the training's own; what is compared is joined by id."""
    before, order = towers(), np.random.default_rng(3).permutation(600)
    after = turned(before, rotation(4))
    shuffled = {"user": after["user"], "item": after["item"][order]}
    back = {"user": after["user"], "item": shuffled["item"][np.argsort(order)]}
    for change, _ in compare(before, back).values():
        assert max(change.score_change.max(), change.distance.max()) < 1e-6
    ids = np.array([f"id {n:05}" for n in range(600)], object)
    assert nearest(before["user"], before["item"], ids, 10).lists(10) == nearest(
        after["user"], shuffled["item"], ids[order], 10
    ).lists(10)


def test_scores_that_stay_are_no_change_though_vectors_and_neighbours_do():
    """A on users and its inverse transpose on items keep every dot product, and nothing else."""
    left, right = rotation(1), rotation(2)
    a = left @ np.diag(np.linspace(1, 5, 16)) @ right
    assert np.linalg.cond(a) == pytest.approx(5)
    before = towers()
    after = {"user": before["user"] @ a, "item": before["item"] @ np.linalg.inv(a).T}
    for change, _ in compare(before, after).values():
        assert change.score_change.max() < 1e-9
        assert np.median(change.distance) > 0.05
    assert kept(recommendations(before), recommendations(after), 10, 1500).share == 1


@pytest.mark.parametrize("factor", [1e-6, 3.0, 1e6])
def test_a_scale_is_no_change(factor):
    before = towers()
    for change, _ in compare(before, turned(before, factor * rotation(1))).values():
        assert change.score_change.max() < 1e-9


def test_another_dimension_is_no_change():
    before = towers()
    wider = rotation(7, 32)[:16]  # orthonormal rows: an embedding into 32 dimensions
    for one, other in ((before, turned(before, wider)), (turned(before, wider), before)):
        for change, _ in compare(one, other).values():
            assert change.score_change.max() < 1e-9
            assert change.distance.max() < 1e-9


# Something has.


def test_towers_rotated_apart_are_unrelated():
    before = towers()
    after = turned(before, rotation(1), user=rotation(2))
    for change, _ in compare(before, after).values():
        assert np.median(change.score_change) > 0.8
    assert kept(recommendations(before), recommendations(after), 10, 1500).share < 0.1


def test_a_reversed_tower_is_reversed():
    before = towers()
    for change, _ in compare(before, {"user": -before["user"], "item": before["item"]}).values():
        assert change.score_change == pytest.approx(2)


def test_swapped_ids_are_found_and_nothing_else():
    before = towers()
    after = turned(before, rotation(1))
    swapped = np.random.default_rng(9).choice(600, 50, replace=False)
    after["item"][swapped] = np.roll(after["item"][swapped], 1, axis=0)
    change, totals = compare(before, after, top=50)["item"]
    # The rotation is fitted on both towers, and ids that moved are weighed down.
    assert {*np.argsort(-change.score_change)[:50]} == {*swapped}
    assert {mover.id for mover in totals.movers} == {f"id {n:05}" for n in swapped}
    others = np.setdiff1d(np.arange(600), swapped)
    assert change.score_change[others].max() < 1e-6
    # Six rounds leave an error of the weights' own: all but 1 in 1,000 of it is gone.
    assert change.distance[others].max() < 1e-4
    assert change.distance[swapped].min() > 0.01


def test_planted_changes_are_found_in_noise():
    random = np.random.default_rng(11)
    before = towers(items=2000)
    after = {t: (v + 0.15 * random.normal(size=v.shape)) @ rotation(3) for t, v in before.items()}
    planted = random.choice(2000, 20, replace=False)
    after["item"][planted] = random.normal(size=(20, 16)) * np.linalg.norm(after["item"][planted], axis=1)[:, None] / 4
    gone = random.choice(np.setdiff1d(np.arange(2000), planted), 20, replace=False)
    has_after = np.ones(2020, bool)
    has_after[gone] = False
    has_before = np.arange(2020) < 2000
    new = random.normal(size=(20, 16))
    joined = Rows(
        np.array([f"id {n:05}" for n in range(2020)], object),
        np.concatenate([before["item"], np.zeros((20, 16))]),
        np.where(has_after[:, None], np.concatenate([after["item"], new]), 0),
        has_before,
        has_after,
    )
    common = joined.common
    fitted = worlds.fit(
        {"user": before["user"], "item": joined.before[common]}, {"user": after["user"], "item": joined.after[common]}
    )
    change, totals = measure(joined, "item", fitted, 20)
    assert (totals.common, totals.added, totals.removed) == (1980, 20, 20)
    assert len({mover.id for mover in totals.movers} & {f"id {n:05}" for n in planted}) >= 19
    assert np.isnan(change.score_change).sum() == np.isnan(change.distance).sum() == 40
    assert np.isnan(change.norm_before).sum() == np.isnan(change.norm_after).sum() == 20


def test_a_group_that_moves_together_does_not_drag_the_rotation():
    before, turn = towers(), rotation(2)
    after = turned(before, turn)
    after["item"][:180] = after["item"][:180] @ rotation(8)
    found = {
        "items alone": measures.rotation([(before["item"], after["item"])], rounds=1),
        "equal weights": measures.rotation([(before[t], after[t]) for t in before], rounds=1),
        "weights": measures.rotation([(before[t], after[t]) for t in before]),
    }
    off = {name: np.linalg.norm(matrix - turn.T) / np.linalg.norm(turn) for name, matrix in found.items()}
    assert off["weights"] < 0.01 < off["equal weights"] < off["items alone"]


# The parts.


def test_one_round_is_scipys_procrustes():
    before, random = towers(), np.random.default_rng(1)
    after = {t: (v + 0.3 * random.normal(size=v.shape)) @ rotation(1) for t, v in before.items()}
    expected, _ = orthogonal_procrustes(
        np.concatenate([measures.unit(after[t]) for t in after]),
        np.concatenate([measures.unit(before[t]) for t in before]),
    )
    found = measures.rotation([(before[t], after[t]) for t in before], rounds=1)
    assert np.abs(found - expected).max() < 1e-12
    weighted = measures.rotation([(before[t], after[t]) for t in before])
    assert np.abs(weighted @ weighted.T - np.eye(16)).max() < 1e-12


def test_unrelated_reads_less_with_few_ids():
    """What "no relation" reads depends on how many ids there are to fit: measured, and printed beside the distance."""
    random = np.random.default_rng(5)
    reads = []
    for times in (1, 10, 50):
        vectors = [random.normal(size=(16 * times, 16)) for _ in range(2)]
        reads.append(measures.distance_unrelated([tuple(vectors)])[0])
    assert reads[0] < 0.5 < reads[1] < reads[2] < 1
    assert measures.distance_unrelated([tuple(vectors)]) == measures.distance_unrelated([tuple(vectors)])
    assert not measures.fits_rotation([(np.ones((159, 16)), np.ones((159, 16)))])
    assert measures.fits_rotation([(np.ones((80, 16)), np.ones((80, 16))), (np.ones((80, 8)), np.ones((80, 16)))])


def test_zero_vectors_have_no_change_and_are_counted():
    before = towers()
    after = turned(before, rotation(1))
    before["item"][3], after["item"][5] = 0, 0
    change, totals = compare(before, after)["item"]
    assert {*np.flatnonzero(np.isnan(change.score_change))} == {3, 5}
    assert {*np.flatnonzero(np.isnan(change.distance))} == {3, 5}
    assert (totals.before.zeros, totals.after.zeros) == (1, 1)
    assert (totals.score_change.count, totals.score_change.missing) == (598, 2)
    assert np.nanmax(change.score_change) < 1e-6


def test_a_score_that_is_the_same_for_everybody_has_no_change():
    before = {"user": np.ones((50, 4)), "item": np.eye(4)}
    change, totals = measure(
        worlds.rows(before["item"], before["item"]),
        "item",
        Fit(False, {"item": measures.score_moments(before["user"], before["user"])}, None),
        5,
    )
    assert np.isnan(change.score_change).all()
    assert totals.score_change.quantile(0.5) is None
    assert totals.movers == []


def test_one_tower_alone_has_a_distance_and_no_score_change():
    before = {"item": towers()["item"]}
    after = {"item": before["item"] @ rotation(1)}
    after["item"][7] = before["item"][8]
    change, totals = compare(before, after)["item"]
    assert np.isnan(change.score_change).all()
    assert totals.movers[0].id == "id 00007"
    assert np.delete(change.distance, 7).max() < 1e-4


def test_cosine_scores_ignore_norms():
    before = towers()
    after = turned(before, rotation(1))
    after["user"] *= np.random.default_rng(1).uniform(0.1, 10, size=(1500, 1))
    pairs = {t: (measures.unit(before[t]), measures.unit(after[t])) for t in before}
    fitted = Fit(True, {"item": measures.score_moments(*pairs["user"])}, None)
    change, _ = measure(worlds.rows(before["item"], after["item"]), "item", fitted, 5)
    assert change.score_change.max() < 1e-9
    change, _ = measure(worlds.rows(before["item"], after["item"]), "item", worlds.fit(before, after), 5)
    assert change.score_change.max() > 0.01


def test_score_correlation():
    before = towers()
    same = turned(before, rotation(1))
    pairs = {t: (before[t], same[t]) for t in before}
    assert measures.score_correlation(pairs["item"], pairs["user"]) == pytest.approx(1)
    after = towers(2)
    scores = [(m["user"] @ m["item"].T).ravel() for m in (before, after)]
    expected = scores[0] @ scores[1] / np.linalg.norm(scores[0]) / np.linalg.norm(scores[1])
    pairs = {t: (before[t], after[t]) for t in before}
    assert measures.score_correlation(pairs["item"], pairs["user"]) == pytest.approx(expected)
    zero = (np.zeros((3, 16)), np.zeros((3, 16)))
    assert measures.score_correlation(zero, pairs["user"]) is None


def test_effective_rank_and_mean_cosine():
    random = np.random.default_rng(1)
    sphere = Cloud.of(random.normal(size=(20_000, 8)))
    assert sphere.effective_rank() == pytest.approx(8, abs=0.01)
    assert sphere.mean_cosine() < 0.001
    line = Cloud.of(np.outer(random.normal(size=100), np.ones(8)))
    assert line.effective_rank() == pytest.approx(1)
    cone = Cloud.of(random.normal(size=(100, 8)) * 1e-3 + 1)
    assert cone.mean_cosine() == pytest.approx(1, abs=1e-4)
    point = Cloud.of(np.ones((5, 8)) * 0.1)
    assert (point.effective_rank(), sum(point.spectrum())) == (None, 0)
    assert (Cloud().effective_rank(), Cloud().mean_cosine(), Cloud().mean_norm) == (None, None, None)
    assert Cloud.of(np.zeros((3, 4))).mean_cosine() is None


@given(st.lists(st.floats(0, 2), min_size=1, max_size=300), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_quantiles_from_parts(values, parts):
    whole = Distribution()
    for part in np.array_split(np.array(values), parts):
        whole.add(Distribution.of(part))
    assert whole.mean == pytest.approx(np.mean(values))
    for share in (0.5, 0.9, 0.99):
        exact = np.quantile(values, share, method="inverted_cdf")
        assert abs(whole.quantile(share) - exact) <= measures.WIDTH * 1.01
    assert sum(whole.histogram()) == len(values)
    assert whole.share_above(2.0) <= np.mean(np.array(values) >= 2 - measures.WIDTH) + 1e-9
    limit = whole.quantile(0.5)
    assert (
        abs(whole.share_above(limit) - 0.5)
        <= max(np.bincount((np.array(values) / measures.WIDTH).astype(int))) / len(values) + 1e-9
    )


@given(st.integers(1, 7), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_parts_make_the_same_totals(parts, seed):
    before = towers(seed, 60, 41, 4)
    after = {t: v + 0.2 for t, v in towers(seed + 1, 60, 41, 4).items()}
    fitted, joined = worlds.fit(before, after), worlds.rows(before["item"], after["item"])
    groups = np.array([None, "a", "b"] * 14, object)[:41]
    joined = Rows(joined.ids, joined.before, joined.after, np.arange(41) != 3, np.arange(41) != 9, groups)
    change, whole = measure(joined, "item", fitted, 5)
    together = Totals(top=5)
    for places in np.array_split(np.random.default_rng(seed).permutation(41), parts):
        together.add(measure(joined.where(places), "item", fitted, 5)[1])
    assert [m.id for m in together.movers] == [m.id for m in whole.movers]
    order = np.argsort(-np.nan_to_num(change.score_change, nan=-1))[:5]
    assert [m.id for m in whole.movers] == [joined.ids[place] for place in order]
    assert (together.common, together.added, together.removed) == (39, 1, 1)
    assert (together.plane == whole.plane).all()
    assert together.norms == whole.norms
    assert together.score_change.quantile(0.9) == whole.score_change.quantile(0.9)
    assert together.before.effective_rank() == pytest.approx(whole.before.effective_rank())
    assert {n: g.count for n, g in together.groups.items()} == {n: g.count for n, g in whole.groups.items()}
    assert together.groups["a"].total == pytest.approx(np.nansum(change.score_change[groups == "a"]))
    assert sum(together.norms.values()) == 39


def test_the_median_of_a_group():
    group = Group(4, 1.0, 0.5, np.bincount([5, 10, 10, 25], minlength=100))
    assert group.median() == pytest.approx(0.21)


# Exact blocks.


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
    monkeypatch.setattr(measures, "_CANDIDATE_ROWS", 100)
    monkeypatch.setattr(measures, "_QUERY_ROWS", 64)
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


# What is usual.


def test_usual_takes_five_pairs():
    assert usual([0.5] * 4).pairs == 4
    assert usual([0.5] * 4).unusual(9.0) is None
    band = usual([0.46, 0.47, 0.48, 0.49, 0.50])
    assert (band.low, band.high) == pytest.approx((0.48 - 3 * 1.4826 * 0.01, 0.48 + 3 * 1.4826 * 0.01))
    assert [band.unusual(value) for value in (0.43, 0.45, 0.52, 0.53, None)] == [True, False, False, True, None]
    assert usual([9.0] * 5 + [0.5] * 20).high == pytest.approx(0.5)  # the last 20
