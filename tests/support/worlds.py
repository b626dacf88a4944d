"""Two-tower models that are made, not trained: what is between two of them is known exactly."""

import numpy as np
from scipy.stats import ortho_group

from beam_pipeline.comparison import measures
from beam_pipeline.comparison.neighbours import Nearest
from beam_pipeline.comparison.totals import Fit, Rows, measure

USERS, ITEMS, DIMENSION = 1500, 600, 16


def towers(seed=1, users=USERS, items=ITEMS, dimension=DIMENSION):
    """Returns {tower: vectors}: a few directions matter more than others, and norms differ, as in trained ones."""
    random = np.random.default_rng(seed)
    scale = np.linspace(2, 0.4, dimension)
    return {
        "user": random.normal(size=(users, dimension)) * scale,
        "item": random.normal(size=(items, dimension)) * scale * random.uniform(0.5, 2, size=(items, 1)),
    }


def turned(model, turn, user=None):
    """Returns the model rotated, its user tower by another matrix if one is given."""
    return {"user": model["user"] @ (turn if user is None else user), "item": model["item"] @ turn}


def rotation(seed=0, dimension=DIMENSION):
    return ortho_group.rvs(dimension, random_state=seed)


def rows(before, after, ids=None):
    """Returns all ids as common to both."""
    names = np.array([f"id {n:05}" for n in range(len(before))] if ids is None else ids, object)
    common = np.ones(len(before), bool)
    return Rows(names, np.asarray(before, float), np.asarray(after, float), common, common)


def fit(before, after, *, cosine=False):
    """Fits on all ids."""
    pairs = {tower: (np.asarray(before[tower], float), np.asarray(after[tower], float)) for tower in before}
    other = {"user": "item", "item": "user"}
    moments = {t: measures.score_moments(*pairs[other[t]]) for t in pairs if other[t] in pairs}
    return Fit(cosine, moments, measures.rotation([*pairs.values()]))


def compare(before, after, top=25):
    """Returns {tower: (Change, Totals)}."""
    fitted = fit(before, after)
    return {tower: measure(rows(before[tower], after[tower]), tower, fitted, top) for tower in before}


def nearest(queries, candidates, ids, k):
    found = Nearest.none(len(queries), k)
    found.see(np.asarray(queries, float), np.asarray(candidates, float), np.asarray(ids, object))
    return found


def brute_force(queries, candidates, ids, k):
    """Returns the ids of the k best, by sorting everything."""
    scores = np.einsum("qd,nd->qn", queries, candidates)
    return [[name for _, name in sorted(zip(-row, ids, strict=True))[:k]] for row in scores]


def recommendations(model, k=10):
    ids = [f"id {n:05}" for n in range(len(model["item"]))]
    return nearest(model["user"], model["item"], ids, k).lists(k)
