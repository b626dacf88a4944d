"""Vocabularies that are not in row order: cut by position into entries, each an id and its row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from beam_pipeline.errors import BadIdError
from beam_pipeline.files import OpenFile
from beam_pipeline.formats.encodings import shown
from beam_pipeline.formats.model import Tower
from beam_pipeline.formats.protobuf import Span
from beam_pipeline.reading.pieces import check_count, cut_ids, read_ids

PIECE_ENTRIES = 1 << 19
"""Entries that are read at once: their rows lie anywhere in the matrix, so each part of it gets few of many."""


@dataclass(frozen=True)
class Entries:
    """Consecutive entries of a lookup whose ids are not in row order.

    Attributes:
        tower: name of the tower.
        first: position of the first one.
        count: number of entries.
        ids: where their ids are.
        lengths: where the lengths of these ids are, if apart from them.
    """

    tower: str
    first: int
    count: int
    ids: Span
    lengths: Span | None = None


def cut_entries(tower: Tower, open_file: OpenFile, entries: int) -> Iterator[Entries]:
    """Yields pieces of a vocabulary that is not in row order, every entry once, `entries` at a time.

    Raises:
        ChecksumError: the ids do not match the artifact's checksum.
        CorruptFileError: the vocabulary is not where the artifact says.
    """
    vocabulary = tower.vocabulary
    with open_file(vocabulary.path) as file:
        first = 0
        for count, ids, lengths in cut_ids(file, tower, entries):
            yield Entries(tower.name, first, count, ids, lengths)
            first += count
    check_count(tower, first)


def read_entries(entries: Entries, tower: Tower, open_file: OpenFile) -> tuple[np.ndarray, pa.Array]:
    """Returns (rows, ids) of entries: int64 [n], and an Arrow binary array of the same length.

    Raises:
        BadIdError: an id has a row that the matrix does not have; named, with its row.
        CorruptFileError: the bytes are not that many ids.
    """
    vocabulary = tower.vocabulary
    if vocabulary.row_numbers is None:
        raise ValueError("entries without rows")
    with open_file(vocabulary.path) as file:
        ids = read_ids(file, tower, entries.count, entries.ids, entries.lengths)
    with open_file(vocabulary.row_numbers_path or vocabulary.path) as file:
        rows = np.frombuffer(file.read(vocabulary.row_numbers.start + 8 * entries.first, 8 * entries.count), "<i8")
    outside = np.flatnonzero((rows < 0) | (rows >= tower.matrix.rows))
    if outside.size:
        at = int(outside[0])
        raise BadIdError(
            f"tower {tower.name!r}: id {shown(ids[at].as_py())} has row {rows[at]:,}, but the matrix has only "
            f"rows 0 to {tower.matrix.rows - 1:,}: vocabulary and weights do not belong together; log the model again"
        )
    return rows, ids
