"""Vocabularies that are not in row order: cut by position into entries, each an id and its row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import google_crc32c
import numpy as np
import pyarrow as pa

from beam_pipeline import checksums
from beam_pipeline.errors import BadIdError, ChecksumError, CorruptFileError
from beam_pipeline.files import ByteFile, OpenFile
from beam_pipeline.formats.encodings import cuts, decode, shown, varints
from beam_pipeline.formats.model import Encoding, Tower
from beam_pipeline.formats.protobuf import Span
from beam_pipeline.reading.pieces import MAX_IDS_BYTES, check_count, check_size, check_sum

PIECE_ENTRIES = 1 << 19
"""Entries that are read at once: their rows lie anywhere in the matrix, so each part of it gets few of many."""

_VARINT_BLOCK = 1 << 18  # They take eight times their bytes while they are decoded.


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
        if vocabulary.encoding is Encoding.STRING_TENSOR:
            yield from _string_tensor_cuts(file, tower, entries)
            return
        start, count = vocabulary.span.start, 0
        for ids, end in cuts(file, vocabulary, entries):
            check_size(tower, ids, end - start)
            yield Entries(tower.name, count, ids, Span(start, end))
            start, count = end, count + ids
        check_count(tower, count)
        check_sum(file, tower, 0, vocabulary.span.start)


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
        data = file.read(entries.ids.start, entries.ids.end - entries.ids.start)
        if entries.lengths is None:
            ids = decode(vocabulary.encoding, data, entries.count)
        else:
            lengths = varints(file.read(entries.lengths.start, entries.lengths.end - entries.lengths.start))
            if len(lengths) != entries.count or int(lengths.sum()) != len(data):
                raise CorruptFileError(f"{vocabulary.path}: its ids changed while they were read")
            offsets = np.zeros(entries.count + 1, np.int32)
            np.cumsum(lengths, out=offsets[1:], dtype=np.int32)
            ids = pa.Array.from_buffers(pa.binary(), entries.count, [None, pa.py_buffer(offsets), pa.py_buffer(data)])
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


def _string_tensor_cuts(file: ByteFile, tower: Tower, entries: int) -> Iterator[Entries]:
    """Yields pieces of a string tensor, once its checksums are compared.

    The layout, and what the checksums cover, is that of WriteStringTensor in
    tensorflow/core/util/tensor_bundle/tensor_bundle.cc: lengths count as little-endian uint32.
    """
    vocabulary = tower.vocabulary
    found, at, crc = list[tuple[int, Span, int]](), vocabulary.span.start, 0
    left = vocabulary.count or 0
    while left:
        start, count, size = at, 0, 0
        while count < min(entries, left):
            block = file.read(at, min(_VARINT_BLOCK, vocabulary.span.end - at))
            ends = np.flatnonzero(np.frombuffer(block, np.uint8) < 0x80)[: min(entries, left) - count]
            if not ends.size:
                raise CorruptFileError(f"{file.path}: no length of an id at byte {at:,}")
            lengths = varints(block[: int(ends[-1]) + 1])
            if (lengths > MAX_IDS_BYTES).any():
                raise CorruptFileError(f"{file.path}: tower {tower.name!r} has an id of {lengths.max():,} bytes")
            crc = google_crc32c.extend(crc, lengths.astype("<u4").tobytes())
            at, count, size = at + int(ends[-1]) + 1, count + len(ends), size + int(lengths.sum())
        check_size(tower, count, size)
        found.append((count, Span(start, at), size))
        left -= count
    stored = file.read(at, 4)
    total = sum(size for _, _, size in found)
    if checksums.unmask(int.from_bytes(stored, "little")) != crc or at + 4 + total != vocabulary.span.end:
        raise ChecksumError(
            f"{file.path}: the lengths of the ids of tower {tower.name!r} do not match their crc32c; "
            "the file was damaged after the training: log the model again"
        )
    at += 4
    check_sum(file, tower, google_crc32c.extend(crc, stored), at)
    first = 0
    for count, lengths_span, size in found:
        yield Entries(tower.name, first, count, Span(at, at + size), lengths_span)
        first, at = first + count, at + size
