import google_crc32c
from hypothesis import given
from hypothesis import strategies as st

from beam_pipeline import crc32c


@given(st.lists(st.binary(max_size=300), max_size=8))
def test_combined_is_the_crc_of_the_whole(pieces):
    assert crc32c.combine((google_crc32c.value(p), len(p)) for p in pieces) == google_crc32c.value(b"".join(pieces))


def test_known_value():
    # RFC 3720, B.4: 32 bytes of zeros.
    zeros = bytes(16)
    assert crc32c.combine([(google_crc32c.value(zeros), 16)] * 2) == 0x8A9136AA


def test_unmask():
    crc = google_crc32c.value(b"foo")
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF  # leveldb/util/crc32c.h
    assert crc32c.unmask(masked) == crc
