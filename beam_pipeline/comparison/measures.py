"""The mathematics of a comparison, on NumPy arrays alone.

Two trainings of the same data differ by an arbitrary rotation, so the cosine of an id with itself across trainings is
noise. What a two-tower model means are its scores, the dot products of users with items, and they survive any rotation
of both towers: `score_change` compares them without aligning anything, `distance` after the one rotation that brings
both towers of one training closest to the other.

Vectors are float64 arrays [n, dimension]; the dimensions of the two trainings may differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

IDS_PER_DIMENSION = 10
"""Common ids of both towers together, per dimension, that a rotation needs: fewer fit any two clouds."""

ROUNDS = 6
"""Fits of the rotation; each but the first weighs down what the one before left far apart."""

LARGEST = 2.0
"""The largest score change and distance: opposite."""

# Of |vector|² · trace: what rounding leaves of a variance that is zero.
_NO_VARIANCE = 1e-13


@dataclass(frozen=True)
class ScoreMoments:
    """Second moments of one tower, by which the scores of the other tower's ids are compared.

    Attributes:
        before: [d, d] of the vectors before, columns centred.
        after: [e, e] of those after.
        across: [d, e] of both.
    """

    before: np.ndarray
    after: np.ndarray
    across: np.ndarray


def score_moments(before: np.ndarray, after: np.ndarray) -> ScoreMoments:
    """Returns the moments of a tower's common ids, row by row the same id in both."""
    centred, later = before - before.mean(axis=0), after - after.mean(axis=0)
    return ScoreMoments(centred.T @ centred, later.T @ later, centred.T @ later)


def score_change(before: np.ndarray, after: np.ndarray, other: ScoreMoments) -> np.ndarray:
    """Returns one minus the correlation of each id's scores before and after, with all ids of the other tower.

    0 the same, 1 unrelated, 2 reversed; NaN where an id has the same score with all of them, which correlates with
    nothing.
    """
    covariance = np.einsum("ij,ij->i", before @ other.across, after)
    variances = _variance(before, other.before) * _variance(after, other.after)
    with np.errstate(divide="ignore", invalid="ignore"):
        correlation = covariance / np.sqrt(variances)
    return np.where(variances > 0, np.clip(1 - correlation, 0, LARGEST), np.nan)


def _variance(vectors: np.ndarray, moment: np.ndarray) -> np.ndarray:
    variance = np.einsum("ij,ij->i", vectors @ moment, vectors)
    floor = _NO_VARIANCE * np.einsum("ij,ij->i", vectors, vectors) * np.trace(moment)
    return np.where(variance > floor, variance, 0.0)


def rotation(towers: Sequence[tuple[np.ndarray, np.ndarray]], rounds: int = ROUNDS) -> np.ndarray:
    """Returns the orthogonal matrix R for which `after @ R` is closest to `before`, in all towers at once.

    Directions are compared, not lengths. Ids that moved are weighed down: a group that moved together would drag the
    rotation after itself. With one round this is the orthogonal Procrustes problem.

    Args:
        towers: (before, after) of the common ids of each; dimensions that one side lacks are zeros.
        rounds: of fitting.

    Returns:
        [D, D] of the larger dimension; reflections are allowed.
    """
    pairs = [_directions(before, after) for before, after in towers]
    weights = [np.ones(len(before)) for before, _ in pairs]
    for number in range(rounds):
        total = sum(
            after.T @ (before * weight[:, None]) for (before, after), weight in zip(pairs, weights, strict=True)
        )
        left, _, right = np.linalg.svd(np.asarray(total))
        found = left @ right
        if number + 1 < rounds:
            errors = [np.linalg.norm(after @ found - before, axis=1) for before, after in pairs]
            middle = float(np.median(np.concatenate(errors)))
            # Errors below the median weigh alike: one close to zero would let a single id decide.
            weights = [1 / np.maximum(error, max(middle, 1e-6)) for error in errors]
    return np.asarray(found)


def _directions(before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    dimension = max(before.shape[1], after.shape[1])
    both = (np.linalg.norm(before, axis=1) > 0) & (np.linalg.norm(after, axis=1) > 0)
    return _padded(unit(before[both]), dimension), _padded(unit(after[both]), dimension)


def fits_rotation(towers: Sequence[tuple[np.ndarray, np.ndarray]]) -> bool:
    """Returns whether there are enough ids for a rotation that says anything."""
    dimension = max(max(before.shape[1], after.shape[1]) for before, after in towers)
    return bool(sum(len(_directions(*pair)[0]) for pair in towers) >= IDS_PER_DIMENSION * dimension)


def distance(before: np.ndarray, after: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """Returns one minus the cosine of each id's vectors, those after being rotated; NaN where one is zero."""
    turned = _padded(after, len(turn)) @ turn
    return _cosine_distance(_padded(before, len(turn)), turned)


def _cosine_distance(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        cosine = np.einsum("ij,ij->i", one, other) / lengths
    found: np.ndarray = np.where(lengths > 0, np.clip(1 - cosine, 0, LARGEST), np.nan)
    return found


def distance_unrelated(towers: Sequence[tuple[np.ndarray, np.ndarray]], seed: int = 0) -> list[float]:
    """Returns the mean distance of each tower if ids had nothing to do with each other: shuffled, and fitted anew."""
    random = np.random.default_rng(seed)
    shuffled = [(before, after[random.permutation(len(after))]) for before, after in towers]
    turn = rotation(shuffled)
    return [float(np.nanmean(distance(before, after, turn))) for before, after in shuffled]


def score_correlation(tower: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]) -> float | None:
    """Returns the correlation, not centred, of all scores before with all after; None if all of a side are zero."""
    (x, y), (p, q) = tower, other
    same = math.sqrt(float(np.sum((p.T @ p) * (x.T @ x)) * np.sum((q.T @ q) * (y.T @ y))))
    return float(np.sum((p.T @ q) * (x.T @ y))) / same if same > 0 else None


def unit(vectors: np.ndarray) -> np.ndarray:
    """Returns vectors of length one; zeros stay."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    found: np.ndarray = np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0)
    return found


def _padded(vectors: np.ndarray, dimension: int) -> np.ndarray:
    missing = dimension - vectors.shape[1]
    return np.pad(vectors, ((0, 0), (0, missing))) if missing else vectors
