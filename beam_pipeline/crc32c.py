"""The crc32c of a whole from the crc32c of its pieces, which `google_crc32c` does not offer.

A CRC is linear: appending n zero bytes multiplies the register by a fixed 32 × 32 matrix over GF(2), and
crc(A + B) = matrix(len(B)) · crc(A) xor crc(B). The matrix for n bytes is a product of squarings, as in zlib's
`crc32_combine`; here with the Castagnoli polynomial of crc32c (RFC 3720, reflected: 0x82F63B78).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

_POLYNOMIAL = 0x82F63B78
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
def _zero_bytes(count: int) -> _Matrix:
    """The matrix that appends `count` zero bytes to a crc register."""
    one_bit: _Matrix = (_POLYNOMIAL, *(1 << bit for bit in range(31)))
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


def combine(pieces: Iterable[tuple[int, int]]) -> int:
    """Returns the crc32c of the concatenation of pieces given in order as (crc32c, length in bytes)."""
    total = 0
    for crc, length in pieces:
        total = _times(_zero_bytes(length), total) ^ crc
    return total


def unmask(masked: int) -> int:
    """Undoes LevelDB's masking (leveldb/util/crc32c.h)."""
    rotated = (masked - _MASK_DELTA) & 0xFFFFFFFF
    return ((rotated >> 17) | (rotated << 15)) & 0xFFFFFFFF
