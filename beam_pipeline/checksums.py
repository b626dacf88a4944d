"""CRCs of 32 bits, and that of a whole from those of its pieces, which neither `google_crc32c` nor `zlib` offers.

A CRC is linear: appending n zero bytes multiplies the register by a fixed 32 × 32 matrix over GF(2), and
crc(A + B) = matrix(len(B)) · crc(A) xor crc(B). The matrix for n bytes is a product of squarings, as in zlib's
`crc32_combine`, for either polynomial: Castagnoli's (crc32c, RFC 3720) and that of zip files (crc32, RFC 1952).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from functools import lru_cache

import google_crc32c

_POLYNOMIALS = {"crc32c": 0x82F63B78, "crc32": 0xEDB88320}  # reflected
_MASK_DELTA = 0xA282EAD8  # LevelDB stores a crc rotated and shifted, since crcs of crcs behave badly.

_Matrix = tuple[int, ...]


def _times(matrix: _Matrix, vector: int) -> int:
    total = 0
    for column in matrix:
        if not vector:
            break
        if vector & 1:
            total ^= column
        vector >>= 1
    return total


def _product(left: _Matrix, right: _Matrix) -> _Matrix:
    return tuple(_times(left, column) for column in right)


@lru_cache(maxsize=64)
def _zero_bytes(algorithm: str, count: int) -> _Matrix:
    """The matrix that appends `count` zero bytes to a crc register."""
    one_bit: _Matrix = (_POLYNOMIALS[algorithm], *(1 << bit for bit in range(31)))
    power = one_bit
    for _ in range(3):  # 1 bit → 8 bits
        power = _product(power, power)
    result: _Matrix = tuple(1 << bit for bit in range(32))
    while count:
        if count & 1:
            result = _product(power, result)
        count >>= 1
        if count:
            power = _product(power, power)
    return result


def value(algorithm: str, data: bytes) -> int:
    """Returns the checksum of some bytes; the algorithm is "crc32c" or "crc32"."""
    return google_crc32c.value(data) if algorithm == "crc32c" else zlib.crc32(data)


def combine(algorithm: str, pieces: Iterable[tuple[int, int]]) -> int:
    """Returns the checksum of the concatenation of pieces given in order as (checksum, length in bytes)."""
    total = 0
    for crc, length in pieces:
        total = _times(_zero_bytes(algorithm, length), total) ^ crc
    return total


def unmask(masked: int) -> int:
    """Undoes LevelDB's masking (leveldb/util/crc32c.h)."""
    rotated = (masked - _MASK_DELTA) & 0xFFFFFFFF
    return ((rotated >> 17) | (rotated << 15)) & 0xFFFFFFFF
