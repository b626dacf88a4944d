"""The mathematics of a comparison, on NumPy arrays alone.

Two trainings of the same data differ by an arbitrary rotation, so the cosine of an id with itself across trainings is
noise. What a two-tower model means are its scores, the dot products of users with items, and they survive any rotation
of both towers: `score_change` compares them without aligning anything, `distance` after the one rotation that brings
both towers of one training closest to the other.

Vectors are float64 arrays [n, dimension]; the dimensions of the two trainings may differ. Partial results are merged
in any order.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

IDS_PER_DIMENSION = 10
"""Common ids of both towers together, per dimension, that a rotation needs: fewer fit any two clouds."""

ROUNDS = 6
"""Fits of the rotation; each but the first weighs down what the one before left far apart."""

WIDTH = 1e-4
"""Width of the bins from which quantiles are taken, and so their largest error."""

COARSE = 0.02
"""Width of the bins of a stored histogram."""

LARGEST = 2.0
"""The largest score change and distance: opposite."""

_FINE_BINS = round(LARGEST / WIDTH)
_PER_COARSE = round(COARSE / WIDTH)

_PLANE_BINS = 40
_NORM_BINS_PER_OCTAVE = 8

# Of |vector|² · trace: what rounding leaves of a variance that is zero.
_NO_VARIANCE = 1e-13

_QUERY_ROWS, _CANDIDATE_ROWS = 512, 8192
_MOST_HITS = 1 << 15


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
    """Returns one minus the correlation of each id's scores before and after, with everybody of the other tower.

    0 the same, 1 unrelated, 2 reversed; NaN where an id has the same score with everybody, which correlates with
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


# Partial results.


@dataclass
class Distribution:
    """Values from 0 to 2, counted; NaN are counted apart.

    Attributes:
        count: of values.
        missing: of NaN.
        total: sum of the values.
        smallest, largest: of them.
        bins: [20,000] counts of values in bins of 0.0001.
    """

    count: int = 0
    missing: int = 0
    total: float = 0.0
    smallest: float = math.inf
    largest: float = -math.inf
    bins: np.ndarray = field(default_factory=lambda: np.zeros(_FINE_BINS, np.int64))

    @classmethod
    def of(cls, values: np.ndarray) -> Distribution:
        """Returns the distribution of an array."""
        found = values[~np.isnan(values)]
        if not len(found):
            return cls(missing=len(values))
        places = np.minimum((found / WIDTH).astype(np.int64), _FINE_BINS - 1)
        return cls(
            len(found),
            len(values) - len(found),
            float(found.sum()),
            float(found.min()),
            float(found.max()),
            np.bincount(places, minlength=_FINE_BINS),
        )

    def add(self, other: Distribution) -> None:
        """Adds the values of another."""
        self.count += other.count
        self.missing += other.missing
        self.total += other.total
        self.smallest = min(self.smallest, other.smallest)
        self.largest = max(self.largest, other.largest)
        self.bins = self.bins + other.bins

    @property
    def mean(self) -> float | None:
        """Mean of the values; None without any."""
        return self.total / self.count if self.count else None

    def quantile(self, share: float) -> float | None:
        """Returns the value below which that share of the values lies, within a bin; None without any."""
        if not self.count:
            return None
        below = np.cumsum(self.bins)
        place = int(np.searchsorted(below, share * self.count))
        before = below[place - 1] if place else 0
        within = (share * self.count - before) / max(self.bins[place], 1)
        return float(np.clip((place + within) * WIDTH, self.smallest, self.largest))

    def share_above(self, limit: float) -> float | None:
        """Returns the share of values above a limit, exact but for values in the limit's bin; None without any."""
        if not self.count:
            return None
        place = min(int(limit / WIDTH), _FINE_BINS - 1)
        rest = (place + 1) - limit / WIDTH
        above = float(self.bins[place + 1 :].sum() + np.clip(rest, 0, 1) * self.bins[place])
        return above / self.count

    def histogram(self) -> list[int]:
        """Returns the counts in bins of 0.02."""
        return [int(count) for count in self.bins.reshape(-1, _PER_COARSE).sum(axis=1)]


@dataclass
class Cloud:
    """Moments of a tower's vectors of one training; empty until vectors are added.

    Attributes:
        count: of vectors.
        zeros: of vectors of zeros alone.
        norms: sum of their norms.
        total: [d] sum of the vectors.
        outer: [d, d] sum of their outer products.
        directions: [d] sum of the unit vectors.
    """

    count: int = 0
    zeros: int = 0
    norms: float = 0.0
    total: np.ndarray = field(default_factory=lambda: np.zeros(0))
    outer: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    directions: np.ndarray = field(default_factory=lambda: np.zeros(0))

    @classmethod
    def of(cls, vectors: np.ndarray) -> Cloud:
        """Returns the moments of an array [n, d]."""
        lengths = np.linalg.norm(vectors, axis=1)
        return cls(
            len(vectors),
            int(np.count_nonzero(lengths == 0)),
            float(lengths.sum()),
            vectors.sum(axis=0),
            vectors.T @ vectors,
            unit(vectors).sum(axis=0),
        )

    def add(self, other: Cloud) -> None:
        """Adds the vectors of another."""
        if not other.count:
            return
        if not self.count:
            self.total, self.outer, self.directions = other.total, other.outer, other.directions
        else:
            self.total = self.total + other.total
            self.outer = self.outer + other.outer
            self.directions = self.directions + other.directions
        self.count += other.count
        self.zeros += other.zeros
        self.norms += other.norms

    @property
    def mean_norm(self) -> float | None:
        """Mean norm; None without vectors."""
        return self.norms / self.count if self.count else None

    def spectrum(self) -> list[float]:
        """Returns the eigenvalues of the covariance as shares of their sum, largest first; zeros if all are alike."""
        if not self.count:
            return []
        mean = self.total / self.count
        values = np.linalg.eigvalsh(self.outer / self.count - np.outer(mean, mean))[::-1].clip(0)
        # Rounding leaves a little where there is no variance at all.
        scale = float(np.trace(self.outer)) / self.count
        total = values.sum()
        return [float(value) for value in (values / total if total > 1e-12 * scale else np.zeros_like(values))]

    def effective_rank(self) -> float | None:
        """Returns the exponential of the spectrum's entropy: how many dimensions are in use. None without variance."""
        shares = np.array([share for share in self.spectrum() if share > 0])
        return float(np.exp(-(shares * np.log(shares)).sum())) if len(shares) else None

    def mean_cosine(self) -> float | None:
        """Returns the mean cosine of any two vectors: 0 for a sphere, 1 for a cone. None without any but zeros."""
        with_direction = self.count - self.zeros
        return float(np.sum((self.directions / with_direction) ** 2)) if with_direction else None


@dataclass(frozen=True)
class Mover:
    """An id that moved far.

    Attributes:
        id: of the user or item.
        score_change, distance: None where there is none.
        before, after: its vectors.
    """

    id: str
    score_change: float | None
    distance: float | None
    before: np.ndarray
    after: np.ndarray

    @property
    def rank(self) -> tuple[float, str]:
        """Sorts the one that moved farthest first: by score change, and by distance where there is no other tower."""
        far = self.score_change if self.score_change is not None else self.distance
        return -(far or 0.0), self.id


@dataclass
class Totals:
    """All that is kept of any number of ids of a tower.

    Attributes:
        common, added, removed: counts of ids.
        score_change, distance: of the common ids.
        before, after: of all ids of each training.
        common_norms: sums of norms of the common ids, before and after.
        plane: [40, 40] counts by distance and score change, from 0 to 2.
        norms: counts by (bin of the norm before, bin after), eight bins to a doubling.
        groups: score change by group.
        movers: the ids that moved farthest.
        added_ids, removed_ids: the first few of them.
        top: how many of these are kept.
    """

    top: int
    common: int = 0
    added: int = 0
    removed: int = 0
    score_change: Distribution = field(default_factory=Distribution)
    distance: Distribution = field(default_factory=Distribution)
    before: Cloud = field(default_factory=Cloud)
    after: Cloud = field(default_factory=Cloud)
    common_norms: tuple[float, float] = (0.0, 0.0)
    plane: np.ndarray = field(default_factory=lambda: np.zeros((_PLANE_BINS, _PLANE_BINS), np.int64))
    norms: dict[tuple[int, int], int] = field(default_factory=dict)
    groups: dict[str, Group] = field(default_factory=dict)
    movers: list[Mover] = field(default_factory=list)
    added_ids: list[str] = field(default_factory=list)
    removed_ids: list[str] = field(default_factory=list)

    def add(self, other: Totals) -> None:
        """Adds what was kept of other ids."""
        self.common += other.common
        self.added += other.added
        self.removed += other.removed
        self.score_change.add(other.score_change)
        self.distance.add(other.distance)
        self.before.add(other.before)
        self.after.add(other.after)
        self.common_norms = (
            self.common_norms[0] + other.common_norms[0],
            self.common_norms[1] + other.common_norms[1],
        )
        self.plane = self.plane + other.plane
        for place, count in other.norms.items():
            self.norms[place] = self.norms.get(place, 0) + count
        for name, group in other.groups.items():
            self.groups[name] = self.groups.get(name, Group()) + group
        self.movers = sorted([*self.movers, *other.movers], key=lambda mover: mover.rank)[: self.top]
        self.added_ids = sorted([*self.added_ids, *other.added_ids])[: self.top]
        self.removed_ids = sorted([*self.removed_ids, *other.removed_ids])[: self.top]


@dataclass(frozen=True)
class Group:
    """Score change of the common ids that share a label.

    Attributes:
        count: ids with a score change.
        total: sum of it.
        largest: of it.
        bins: [100] counts in bins of 0.02.
    """

    count: int = 0
    total: float = 0.0
    largest: float = 0.0
    bins: np.ndarray = field(default_factory=lambda: np.zeros(_FINE_BINS // _PER_COARSE, np.int64))

    def __add__(self, other: Group) -> Group:
        return Group(
            self.count + other.count,
            self.total + other.total,
            max(self.largest, other.largest),
            self.bins + other.bins,
        )

    def median(self) -> float:
        """Returns the median, within a bin."""
        below = np.cumsum(self.bins)
        place = int(np.searchsorted(below, self.count / 2))
        before = below[place - 1] if place else 0
        return float((place + (self.count / 2 - before) / max(self.bins[place], 1)) * COARSE)


@dataclass(frozen=True)
class Fit:
    """What is fitted on a sample before the pass over all ids.

    Attributes:
        cosine: scores are cosines, not dot products.
        moments: by tower, those of the *other* tower; a tower without another has none.
        turn: the rotation, if there is one.
    """

    cosine: bool
    moments: dict[str, ScoreMoments]
    turn: np.ndarray | None


@dataclass(frozen=True)
class Rows:
    """Joined ids of a tower; a side that an id lacks is False in `has_before` or `has_after` and zeros in the vectors.

    Attributes:
        ids: [n] strings.
        before, after: [n, d] and [n, e].
        has_before, has_after: [n] booleans.
        groups: [n] names or None, if labels were given.
    """

    ids: np.ndarray
    before: np.ndarray
    after: np.ndarray
    has_before: np.ndarray
    has_after: np.ndarray
    groups: np.ndarray | None = None

    @property
    def common(self) -> np.ndarray:
        """[n] whether both trainings have the id."""
        both: np.ndarray = self.has_before & self.has_after
        return both

    def __len__(self) -> int:
        return len(self.ids)

    def where(self, chosen: np.ndarray) -> Rows:
        """Returns the chosen rows, by booleans or by places."""
        return replace(
            self,
            ids=self.ids[chosen],
            before=self.before[chosen],
            after=self.after[chosen],
            has_before=self.has_before[chosen],
            has_after=self.has_after[chosen],
            groups=None if self.groups is None else self.groups[chosen],
        )


@dataclass(frozen=True)
class Change:
    """What became of each id; NaN where there is no value.

    Attributes:
        score_change, distance, norm_before, norm_after: [n].
    """

    score_change: np.ndarray
    distance: np.ndarray
    norm_before: np.ndarray
    norm_after: np.ndarray


def measure(rows: Rows, tower: str, fit: Fit, top: int) -> tuple[Change, Totals]:
    """Returns what became of each id, and what is kept of all of them together."""
    common = rows.common
    both = rows if common.all() else rows.where(common)
    scores = np.full(len(both), np.nan)
    distances = np.full(len(both), np.nan)
    if tower in fit.moments:
        as_scored = (unit(both.before), unit(both.after)) if fit.cosine else (both.before, both.after)
        scores = score_change(*as_scored, fit.moments[tower])
    if fit.turn is not None:
        distances = distance(both.before, both.after, fit.turn)
    before = np.where(rows.has_before, np.linalg.norm(rows.before, axis=1), np.nan)
    after = np.where(rows.has_after, np.linalg.norm(rows.after, axis=1), np.nan)
    change = Change(_spread(scores, common), _spread(distances, common), before, after)
    added, removed = rows.ids[~rows.has_before], rows.ids[~rows.has_after]
    totals = Totals(
        top=top,
        common=len(both),
        added=len(added),
        removed=len(removed),
        score_change=Distribution.of(scores),
        distance=Distribution.of(distances),
        before=Cloud.of(rows.before[rows.has_before]),
        after=Cloud.of(rows.after[rows.has_after]),
        common_norms=(float(before[common].sum()), float(after[common].sum())),
        plane=_plane(distances, scores),
        norms=_norm_bins(before[common], after[common]),
        groups=_by_group(scores, both.groups),
        movers=_movers(both, scores, distances, top),
        added_ids=heapq.nsmallest(top, map(str, added)),
        removed_ids=heapq.nsmallest(top, map(str, removed)),
    )
    return change, totals


def _spread(values: np.ndarray, places: np.ndarray) -> np.ndarray:
    if len(values) == len(places):
        return values
    spread = np.full(len(places), np.nan)
    spread[places] = values
    return spread


def _plane(distances: np.ndarray, scores: np.ndarray) -> np.ndarray:
    both = ~(np.isnan(distances) | np.isnan(scores))
    width = LARGEST / _PLANE_BINS
    across = np.minimum((distances[both] / width).astype(np.int64), _PLANE_BINS - 1)
    up = np.minimum((scores[both] / width).astype(np.int64), _PLANE_BINS - 1)
    counts: np.ndarray = np.bincount(across * _PLANE_BINS + up, minlength=_PLANE_BINS**2)
    plane: np.ndarray = counts.reshape(_PLANE_BINS, _PLANE_BINS)
    return plane


def _norm_bins(before: np.ndarray, after: np.ndarray) -> dict[tuple[int, int], int]:
    positive = (before > 0) & (after > 0)
    norms = np.stack([before[positive], after[positive]], axis=1)
    places = np.floor(np.log2(norms) * _NORM_BINS_PER_OCTAVE).astype(np.int64)
    found, counts = np.unique(places, axis=0, return_counts=True)
    return {(int(one), int(other)): int(count) for (one, other), count in zip(found, counts, strict=True)}


def norm_of_bin(place: int) -> float:
    """Returns the norm in the middle of a bin of `Totals.norms`."""
    return float(2 ** ((place + 0.5) / _NORM_BINS_PER_OCTAVE))


def _by_group(scores: np.ndarray, groups: np.ndarray | None) -> dict[str, Group]:
    if groups is None:
        return {}
    is_scored = np.array([group is not None for group in groups], bool) & ~np.isnan(scores)
    names, places = np.unique(groups[is_scored].astype(str), return_inverse=True)
    found = {}
    for number, name in enumerate(names):
        of_group = scores[is_scored][places == number]
        bins = np.bincount(np.minimum((of_group / COARSE).astype(np.int64), 99), minlength=100)
        found[str(name)] = Group(len(of_group), float(of_group.sum()), float(of_group.max()), bins)
    return found


def _movers(rows: Rows, scores: np.ndarray, distances: np.ndarray, top: int) -> list[Mover]:
    ranked = scores if not np.isnan(scores).all() else distances
    moved = np.flatnonzero(~np.isnan(ranked))
    if len(moved) > top:
        # All that tie with the last are looked at: among them the id decides.
        last = np.partition(ranked[moved], len(moved) - top)[len(moved) - top] if top else math.inf
        moved = moved[ranked[moved] >= last]
        if len(moved) > top:
            moved = np.array(sorted(moved, key=lambda place: (-ranked[place], rows.ids[place]))[:top], np.int64)
    movers = [
        Mover(
            str(rows.ids[place]),
            None if np.isnan(scores[place]) else float(scores[place]),
            None if np.isnan(distances[place]) else float(distances[place]),
            rows.before[place].copy(),
            rows.after[place].copy(),
        )
        for place in moved
    ]
    return sorted(movers, key=lambda mover: mover.rank)


# Neighbours and recommendations.


@dataclass
class Nearest:
    """The candidates with the highest scores of each query, exact, ties by id; filled up with -inf and "".

    Attributes:
        scores: [q, k], highest first.
        ids: [q, k].
    """

    scores: np.ndarray
    ids: np.ndarray

    @classmethod
    def none(cls, queries: int, k: int) -> Nearest:
        """Returns it before any candidate was seen."""
        return cls(np.full((queries, k), -np.inf), np.full((queries, k), "", object))

    def add(self, other: Nearest) -> None:
        """Adds the candidates that another has seen."""
        queries, k = self.scores.shape
        place = np.repeat(np.arange(queries), k)
        self._take(place, other.scores.ravel(), other.ids.ravel())

    def see(self, queries: np.ndarray, candidates: np.ndarray, ids: np.ndarray) -> None:
        """Looks at more candidates.

        Scores of a block are taken in float32, which finds all that can be among the k best with its rounding
        allowed for; those are scored again in float64, so that blocks of any size give the same.

        Args:
            queries: [q, d].
            candidates: [n, d].
            ids: [n] of the candidates.
        """
        k = self.scores.shape[1]
        small = queries.astype(np.float32)
        lengths = np.linalg.norm(queries, axis=1)
        for at in range(0, len(candidates), _CANDIDATE_ROWS):
            block = candidates[at : at + _CANDIDATE_ROWS]
            block32 = block.astype(np.float32)
            names = ids[at : at + _CANDIDATE_ROWS]
            longest = float(np.linalg.norm(block, axis=1).max())
            for first in range(0, len(queries), _QUERY_ROWS):
                rows = slice(first, first + _QUERY_ROWS)
                found = small[rows] @ block32.T
                # Both operands and each of the sums are rounded.
                slack = (queries.shape[1] + 4) * float(np.finfo(np.float32).eps) * lengths[rows] * longest
                limit = self.scores[rows, -1] - slack
                if k < len(block) and np.isneginf(limit).any():
                    limit = np.maximum(limit, np.partition(found, -k, axis=1)[:, -k] - 2 * slack)
                hits = found >= limit.astype(np.float32)[:, None]
                for queried, seen in _in_parts(hits):
                    exact = np.einsum("ij,ij->i", queries[rows][queried], block[seen])
                    self._take(queried + first, exact, names[seen])

    def _take(self, places: np.ndarray, scores: np.ndarray, ids: np.ndarray) -> None:
        if not len(places):
            return
        touched, place = np.unique(places, return_inverse=True)
        k = self.scores.shape[1]
        row = np.concatenate([np.repeat(np.arange(len(touched)), k), place])
        score = np.concatenate([self.scores[touched].ravel(), scores])
        name = np.concatenate([self.ids[touched].ravel(), ids])
        # By query, then the highest score, then the id; fillers have the lowest score and so come last.
        order = np.lexsort((name.astype(str), -score, row))
        row = row[order]
        rank = np.arange(len(row)) - np.searchsorted(row, row)
        kept = order[rank < k]
        self.scores[touched] = score[kept].reshape(-1, k)
        self.ids[touched] = name[kept].reshape(-1, k)

    def lists(self, k: int, leave_out: Sequence[str] | None = None) -> list[list[str]]:
        """Returns the ids of the k best of each query, fewer where there were fewer; without the query's id."""
        found = []
        for number, (scores, ids) in enumerate(zip(self.scores, self.ids, strict=True)):
            query = leave_out[number] if leave_out is not None else None
            best = [str(name) for name, score in zip(ids, scores, strict=True) if score > -np.inf and name != query]
            found.append(best[:k])
        return found


def _in_parts(hits: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (query, candidate) of the hits, so many at once that their vectors take little memory."""
    queried, seen = np.nonzero(hits)
    for at in range(0, len(queried), _MOST_HITS):
        yield queried[at : at + _MOST_HITS], seen[at : at + _MOST_HITS]


@dataclass(frozen=True)
class Kept:
    """How much of the k best of each query stayed.

    Attributes:
        share: mean over the queries.
        error: its standard error; 0 if everybody was asked.
        k: how many are compared.
        queries: how many were asked.
        distinct_before, distinct_after: ids in all lists together.
    """

    share: float
    error: float
    k: int
    queries: int
    distinct_before: int
    distinct_after: int


def kept(before: Sequence[Sequence[str]], after: Sequence[Sequence[str]], k: int, population: int) -> Kept | None:
    """Returns how much of the lists stayed; None without queries or candidates.

    Args:
        before: the best of each query, best first.
        after: the same after.
        k: how many were asked for; fewer are compared where there were fewer candidates.
        population: number of ids from which the queries were drawn.
    """
    shortest = min((min(len(one), len(other)) for one, other in zip(before, after, strict=True)), default=0)
    k = min(k, shortest)
    if not k:
        return None
    shares = np.array([len({*one[:k]} & {*other[:k]}) / k for one, other in zip(before, after, strict=True)])
    asked = len(shares)
    error = float(shares.std(ddof=1)) / math.sqrt(asked) if asked > 1 else 0.0
    # Of those asked, all that there are leave nothing to chance.
    error *= math.sqrt(max(0.0, 1 - asked / population))
    return Kept(
        float(shares.mean()),
        error,
        k,
        asked,
        len({name for one in before for name in one[:k]}),
        len({name for other in after for name in other[:k]}),
    )


# What is usual.

HISTORY = 20
"""How many earlier pairs say what is usual, at most."""

ENOUGH = 5
"""How many it takes."""


@dataclass(frozen=True)
class Usual:
    """What the 99th percentile was in earlier pairs.

    Attributes:
        pairs: how many there were, of the last 20.
        low, high: the band that is usual; None with too few.
    """

    pairs: int
    low: float | None = None
    high: float | None = None

    def unusual(self, value: float | None) -> bool | None:
        """Returns whether a value is outside; None if that is unknown."""
        if value is None or self.low is None or self.high is None:
            return None
        return not self.low <= value <= self.high


def usual(earlier: Sequence[float]) -> Usual:
    """Returns what is usual after these values, oldest first: the median and three robust standard deviations."""
    last = np.array(earlier[-HISTORY:])
    if len(last) < ENOUGH:
        return Usual(len(last))
    middle = float(np.median(last))
    spread = 3 * 1.4826 * float(np.median(np.abs(last - middle)))
    return Usual(len(last), max(0.0, middle - spread), middle + spread)
