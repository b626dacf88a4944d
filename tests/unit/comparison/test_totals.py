"""What is kept of ids is the same however they were cut, and says what NumPy says of all of them."""

import numpy as np
import pytest
import worlds
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import towers

from beam_pipeline.comparison.totals import WIDTH, Cloud, Distribution, Group, Rows, Totals, measure


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
        assert abs(whole.quantile(share) - exact) <= WIDTH * 1.01
    assert sum(whole.histogram()) == len(values)
    assert whole.share_above(2.0) <= np.mean(np.array(values) >= 2 - WIDTH) + 1e-9
    limit = whole.quantile(0.5)
    assert (
        abs(whole.share_above(limit) - 0.5)
        <= max(np.bincount((np.array(values) / WIDTH).astype(int))) / len(values) + 1e-9
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
