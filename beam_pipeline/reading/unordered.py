"""Vocabularies that are not in row order: cut by position into entries, each an id and its row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from beam_pipeline.errors import BadIdError
from beam_pipeline.files import OpenFile
from beam_pipeline.formats.encodings import decode_with_rows, shown
from beam_pipeline.formats.files import parquet
from beam_pipeline.formats.model import Encoding, Tower
from beam_pipeline.formats.protobuf import Span
from beam_pipeline.reading.pieces import check_count, check_size, cut_ids, read_ids

PIECE_ENTRIES = 1 << 19
"""Entries that are read at once: their rows lie anywhere in the matrix, so each part of it gets few of many."""

_ROW_BYTES = 32
"""Bytes that an id and its row take in Parquet, about: a row group of more than eight million is too large."""


@dataclass(frozen=True)
class Entries:
    """Consecutive entries of a lookup whose ids are not in row order.

    Attributes:
        tower: name of the tower.
        first: position of the first one.
        count: number of entries.
        ids: where their ids are; of Parquet files, which of all row groups.
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
    vocabulary, first = tower.vocabulary, 0
    if vocabulary.table is not None:
        for number, group in enumerate(vocabulary.table.groups):
            check_size(tower, group.rows, group.rows * _ROW_BYTES)
            yield Entries(tower.name, first, group.rows, Span(number, number + 1))
            first += group.rows
        return
    with open_file(vocabulary.path) as file:
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
    rows, ids = _read_entries(entries, tower, open_file)
    outside = np.flatnonzero((rows < 0) | (rows >= tower.matrix.rows))
    if outside.size:
        at = int(outside[0])
        raise BadIdError(
            f"tower {tower.name!r}: id {shown(ids[at].as_py())} has row {rows[at]:,}, but the matrix has only "
            f"rows 0 to {tower.matrix.rows - 1:,}: vocabulary and weights do not belong together; log the model again"
        )
    return rows, ids


def _read_entries(entries: Entries, tower: Tower, open_file: OpenFile) -> tuple[np.ndarray, pa.Array]:
    vocabulary = tower.vocabulary
    if vocabulary.table is not None:
        group = vocabulary.table.groups[entries.ids.start]
        batches = list(parquet.read_rows(vocabulary.table, group, PIECE_ENTRIES, open_file))
        if not batches:
            return np.zeros(0, np.int64), pa.array([], pa.binary())
        rows, names = zip(*batches, strict=True)
        return np.concatenate(rows), pa.concat_arrays(names)
    if vocabulary.encoding in (Encoding.JSON_OBJECT, Encoding.CSV):
        with open_file(vocabulary.path) as file:
            data = file.read(entries.ids.start, entries.ids.end - entries.ids.start)
        return decode_with_rows(vocabulary, data, entries.count)
    if vocabulary.row_numbers is None:
        raise ValueError("entries without rows")
    with open_file(vocabulary.path) as file:
        ids = read_ids(file, tower, entries.count, entries.ids, entries.lengths)
    # A checkpoint may have ids and rows in two of its data files.
    with open_file(vocabulary.row_numbers_path or vocabulary.path) as file:
        numbers = np.frombuffer(file.read(vocabulary.row_numbers.start + 8 * entries.first, 8 * entries.count), "<i8")
    return numbers, ids
