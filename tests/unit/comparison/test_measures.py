"""What a comparison says of models between which the difference is known."""

import numpy as np
import pytest
import worlds
from scipy.linalg import orthogonal_procrustes
from worlds import compare, nearest, recommendations, rotation, towers, turned

from beam_pipeline.comparison import measures
from beam_pipeline.comparison.neighbours import kept
from beam_pipeline.comparison.totals import Fit, Rows, measure

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
