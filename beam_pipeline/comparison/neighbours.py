"""Neighbours and recommendations: the best candidates of each query, exact, and how many of them were kept.

NumPy arrays alone; candidates come in blocks of any size and order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

_QUERY_ROWS, _CANDIDATE_ROWS = 512, 8192
_MOST_HITS = 1 << 15


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
        error: its standard error; 0 if all ids were queries.
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
