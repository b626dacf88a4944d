"""Strings of an HDF5 dataset: each a reference into collections of strings elsewhere in the file (the global heap).

The formats are public: HDF5 File Format Specification, III.E (global heap) and IV.A.2.d (variable-length types).
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from beam_pipeline.errors import CorruptFileError
from beam_pipeline.files import ByteFile
from beam_pipeline.formats.protobuf import Span

REFERENCE_BYTES = 16
"""Of a reference: length, address of the collection, number in it, where addresses have eight bytes."""

_REFERENCE = np.dtype([("length", "<u4"), ("address", "<u8"), ("number", "<u4")])
_HEAD = 16
"""Bytes before a collection's strings, and before each of them."""
_MAX_BYTES = 1 << 28
"""Bytes of strings that are read at once."""


def read_strings(file: ByteFile, heap: Span, references: bytes) -> pa.Array:
    """Returns the strings of some references, as an Arrow binary array.

    Args:
        file: which holds the HDF5 file.
        heap: the bytes from which addresses count, up to the end of the HDF5 file.
        references: one after the other.

    Raises:
        CorruptFileError: they point to no strings, or to more bytes than a worker reads at once.
    """
    found = np.frombuffer(references, _REFERENCE)
    sizes = found["length"].astype(np.int64)
    if (total := int(sizes.sum())) > min(_MAX_BYTES, heap.end - heap.start):
        raise CorruptFileError(
            f"{file.path}: {len(found):,} strings take {total:,} bytes, more than there are or a worker reads at once"
        )
    starts = np.zeros(len(found) + 1, np.int64)
    np.cumsum(sizes, out=starts[1:])
    text = bytearray(total)
    left = heap.end - heap.start
    some = np.flatnonzero(sizes)
    some = some[np.argsort(found["address"][some], kind="stable")]
    for rows in np.split(some, np.flatnonzero(np.diff(found["address"][some])) + 1) if some.size else []:
        address = int(found["address"][rows[0]])
        collection = _read_collection(file, heap, address, left)
        left -= len(collection)
        places = _places(collection)
        for row in rows:
            start, size = places.get(int(found["number"][row]), (0, -1))
            if size != sizes[row]:
                raise CorruptFileError(f"{file.path}: string {row:,} is not where the file says; log the model again")
            text[starts[row] : starts[row + 1]] = collection[start : start + size]
    offsets = pa.py_buffer(starts.astype(np.int32))
    return pa.Array.from_buffers(pa.binary(), len(found), [None, offsets, pa.py_buffer(bytes(text))])


def _read_collection(file: ByteFile, heap: Span, address: int, left: int) -> bytes:
    """Returns the bytes of a collection; `left` is what all collections that were not read yet can have."""
    start = heap.start + address
    head = file.read(start, _HEAD) if address <= heap.end - heap.start - _HEAD else b""
    size = int.from_bytes(head[8:], "little")
    if head[:5] != b"GCOL\1" or not _HEAD <= size <= min(left, heap.end - start):
        raise CorruptFileError(f"{file.path}: no collection of strings at byte {start:,}; log the model again")
    return file.read(start, size)


def _places(collection: bytes) -> dict[int, tuple[int, int]]:
    """Returns where the strings of a collection are, by their numbers: (first byte, number of bytes)."""
    places, at = dict[int, tuple[int, int]](), _HEAD
    while at + _HEAD <= len(collection):
        number = int.from_bytes(collection[at : at + 2], "little")
        size = int.from_bytes(collection[at + 8 : at + 16], "little")
        if number == 0 or size > len(collection) - at - _HEAD:  # Free space, up to the end.
            break
        places[number] = at + _HEAD, size
        at += _HEAD + (size + 7) // 8 * 8
    return places
