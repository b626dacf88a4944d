"""What is kept of any number of ids: distributions, moments and the ids that moved farthest, added up in any order.

NumPy arrays alone. `measure` looks at some rows; what it returns of all rows is the same however they were cut.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, field, replace

import numpy as np

from beam_pipeline.comparison.measures import LARGEST, ScoreMoments, distance, score_change, unit

WIDTH = 1e-4
"""Width of the bins from which quantiles are taken, and so their largest error."""

COARSE = 0.02
"""Width of the bins of a stored histogram."""

_FINE_BINS = round(LARGEST / WIDTH)
_PER_COARSE = round(COARSE / WIDTH)

_PLANE_BINS = 40
_NORM_BINS_PER_OCTAVE = 8


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
