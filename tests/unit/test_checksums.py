import zlib

import google_crc32c
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_pipeline import checksums


@pytest.mark.parametrize(("algorithm", "real"), [("crc32c", google_crc32c.value), ("crc32", zlib.crc32)])
@given(pieces=st.lists(st.binary(max_size=300), max_size=8))
def test_combined_is_the_crc_of_the_whole(algorithm, real, pieces):
    of_pieces = [(checksums.value(algorithm, piece), len(piece)) for piece in pieces]
    assert checksums.combine(algorithm, of_pieces) == real(b"".join(pieces))


def test_known_values():
    # RFC 3720, B.4: 32 bytes of zeros; and the check value of the catalogue of CRCs.
    zeros = bytes(16)
    assert checksums.combine("crc32c", [(checksums.value("crc32c", zeros), 16)] * 2) == 0x8A9136AA
    digits = [(checksums.value("crc32", part), len(part)) for part in (b"1234", b"56789")]
    assert checksums.combine("crc32", digits) == 0xCBF43926


def test_unmask():
    crc = google_crc32c.value(b"foo")
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF  # leveldb/util/crc32c.h
    assert checksums.unmask(masked) == crc
