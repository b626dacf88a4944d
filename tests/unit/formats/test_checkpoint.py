"""The index of a tensor bundle: a golden file, any table that the format allows, and every way to damage one."""

import base64
import io

import google_crc32c
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_format import field, varint

from beam_pipeline import checksums
from beam_pipeline.errors import (
    ArtifactMissingError,
    ChecksumError,
    CorruptFileError,
    PipelineError,
    UnsupportedModelError,
)
from beam_pipeline.files import ByteFile
from beam_pipeline.formats.protobuf import Span
from beam_pipeline.formats.saved_model import checkpoint
from beam_pipeline.formats.saved_model.checkpoint import Entry

# tf.train.Checkpoint(v=tf.Variable([[1., 2.], [3., 4.], [5., 6.]])).write("golden"), TensorFlow 2.21.
GOLDEN_INDEX = base64.b64decode(
    "AAAGCAEaAggBABwNX0NIRUNLUE9JTlRBQkxFX09CSkVDVF9HUkFQSAgHEgAgGChSNfPK8dIAHBN2Ly5BVFRSSUJVVEVTL1ZBUklBQkxFX1ZBTFVF"
    "CAESCBICCAMSAggCKBg1euv1qwAAAAABAAAAABqfGREAAAAAAQAAAADA8qGwAAECdwBvAAAAAAEAAAAAEx2uBHQIgQEOAAAAAAAAAAAAAAAAAAAA"
    "AAAAAAAAAAAAAAAAAAAAAAAAAABX+4CLJHVH2w=="
)
GOLDEN_DATA = base64.b64decode(
    "AACAPwAAAEAAAEBAAACAQAAAoEAAAMBATZ1SnnsKCwoFCAESAXYqAggBCj4SOAoOVkFSSUFCTEVfVkFMVUUSCFZhcmlhYmxlGhx2Ly5BVFRSSUJV"
    "VEVTL1ZBUklBQkxFX1ZBTFVFKgIIAQ=="
)


def files(**contents):
    """An OpenFile over bytes; keys are paths with _ for a dot."""
    by_path = {f"bundle.{name.replace('_', '-')}": data for name, data in contents.items()}

    def open_file(path):
        if path not in by_path:
            raise ArtifactMissingError(f"{path} does not exist")
        return ByteFile(path, io.BytesIO(by_path[path]), len(by_path[path]))

    return open_file


def mask(crc):
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def block(pairs, restart_interval):
    """A LevelDB block with prefix-compressed keys, and its trailer."""
    data, restarts, last = b"", [], b""
    for number, (key, value) in enumerate(pairs):
        shared = 0
        if number % restart_interval == 0:
            restarts.append(len(data))
        else:
            while shared < min(len(last), len(key)) and last[shared] == key[shared]:
                shared += 1
        data += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        last = key
    restarts = restarts or [0]
    data += b"".join(r.to_bytes(4, "little") for r in restarts) + len(restarts).to_bytes(4, "little")
    return data, data + b"\0" + mask(google_crc32c.value(data + b"\0")).to_bytes(4, "little")


def table(entries, block_size, restart_interval=16):
    """An SSTable of (key, value) pairs, `block_size` pairs to a block."""
    out, handles = b"", []
    for start in range(0, len(entries), block_size):
        pairs = entries[start : start + block_size]
        data, stored = block(pairs, restart_interval)
        handles.append((pairs[-1][0], varint(len(out)) + varint(len(data))))
        out += stored
    meta, stored = block([], 1)
    meta_handle = varint(len(out)) + varint(len(meta))
    out += stored
    index, stored = block(handles, 1)
    footer = meta_handle + varint(len(out)) + varint(len(index))
    return out + stored + footer.ljust(40, b"\0") + 0xDB4775248B80FB57.to_bytes(8, "little")


def test_golden():
    bundle = checkpoint.read_bundle("bundle", files(index=GOLDEN_INDEX))
    assert bundle.shards == 1
    assert bundle.entries["v/.ATTRIBUTES/VARIABLE_VALUE"] == Entry(
        dtype=1, shape=(3, 2), shard=0, offset=0, size=24, crc32c=google_crc32c.value(GOLDEN_DATA[:24])
    )
    assert bundle.data_path(bundle.entries["v/.ATTRIBUTES/VARIABLE_VALUE"]) == "bundle.data-00000-of-00001"


def test_golden_string():
    opened = files(index=GOLDEN_INDEX, data_00000_of_00001=GOLDEN_DATA)
    bundle = checkpoint.read_bundle("bundle", opened)
    assert bundle.read_string(checkpoint.OBJECT_GRAPH_KEY, opened) == GOLDEN_DATA[29:]
    with pytest.raises(CorruptFileError, match="has no string 'other'"):
        bundle.read_string("other", opened)


@given(
    st.dictionaries(
        st.text(st.characters(min_codepoint=1, max_codepoint=500), min_size=1, max_size=30),
        st.tuples(st.lists(st.integers(1, 1 << 40), max_size=3), st.integers(0, 1 << 62), st.integers(0, 0xFFFFFFFF)),
        max_size=40,
    ),
    st.integers(1, 50),
    st.integers(1, 20),
)
def test_any_table_is_read_back(variables, block_size, restart_interval):
    entries = [(b"", field(1, 3))]
    expected = {}
    for key, (shape, offset, crc) in sorted(variables.items(), key=lambda pair: pair[0].encode()):
        dims = b"".join(field(2, field(1, size)) for size in shape)
        value = field(1, 1) + field(2, dims) + field(3, 2) + field(4, offset) + field(5, offset + 1)
        value += varint(6 << 3 | 5) + mask(crc).to_bytes(4, "little")
        entries.append((key.encode(), value))
        expected[key] = Entry(1, tuple(shape), 2, offset, offset + 1, crc)
    bundle = checkpoint.read_bundle("bundle", files(index=table(entries, block_size, restart_interval)))
    assert bundle.shards == 3
    assert bundle.entries == expected


@settings(max_examples=300)
@given(st.data())
def test_a_damaged_index_is_refused_or_read_right(data):
    damaged = bytearray(GOLDEN_INDEX)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    whole = checkpoint.read_bundle("bundle", files(index=GOLDEN_INDEX))
    try:
        bundle = checkpoint.read_bundle("bundle", files(index=bytes(damaged)))
    except PipelineError as error:
        assert "bundle.index" in str(error)  # noqa: PT017 - most damages are errors, some hit padding
    else:
        assert bundle.entries == whole.entries


@pytest.mark.parametrize("length", range(0, len(GOLDEN_INDEX), 7))
def test_a_cut_index_is_refused(length):
    with pytest.raises(PipelineError, match=r"bundle.index"):
        checkpoint.read_bundle("bundle", files(index=GOLDEN_INDEX[:length]))


def test_variants_that_are_not_supported():
    big_endian = table([(b"", field(1, 1) + field(2, 1))], 1)
    with pytest.raises(UnsupportedModelError, match="big-endian"):
        checkpoint.read_bundle("bundle", files(index=big_endian))
    with pytest.raises(CorruptFileError, match="has no header"):
        checkpoint.read_bundle("bundle", files(index=table([(b"v", b"")], 1)))


# A table that means harm; its checksums are right.

HEADER = (b"", field(1, 1))
VALUE = field(1, 1) + field(2, b"")


def refused(entries, **options):
    with pytest.raises(CorruptFileError) as refusal:
        checkpoint.read_bundle("bundle", files(index=table(entries, len(entries), **options)))
    return str(refusal.value)


def test_keys_that_cost_more_memory_than_bytes(monkeypatch):
    """Each key shares all of the one before: three bytes in the file, a kilobyte in memory."""
    assert "a key of 2,000 bytes" in refused([HEADER, (b"x" * 2000, VALUE)])
    monkeypatch.setattr(checkpoint, "_MAX_ENTRIES", 50)
    assert "more than 50" in refused([HEADER, *((b"x" * 999, VALUE) for _ in range(60))], restart_interval=100)


def test_more_tensors_than_there_can_be(monkeypatch):
    monkeypatch.setattr(checkpoint, "_MAX_ENTRIES", 50)
    entries = [HEADER, *((b"%03d" % i, VALUE) for i in range(60))]
    with pytest.raises(CorruptFileError, match="more than 50 tensors"):
        checkpoint.read_bundle("bundle", files(index=table(entries, 10)))


def test_a_block_that_is_listed_twice():
    data, stored = block([HEADER, (b"v", VALUE)], 1)
    handle = varint(0) + varint(len(data))
    index, index_stored = block([(b"%d" % i, handle) for i in range(2)], 1)
    footer = varint(0) + varint(0) + varint(len(stored)) + varint(len(index))
    whole = stored + index_stored + footer.ljust(40, b"\0") + 0xDB4775248B80FB57.to_bytes(8, "little")
    with pytest.raises(CorruptFileError, match="two blocks at byte 0"):
        checkpoint.read_bundle("bundle", files(index=whole))


def test_more_dimensions_than_a_tensor_has():
    shape = b"".join(field(2, field(1, 1)) for _ in range(255))
    assert "more than 254 dimensions" in refused([HEADER, (b"v", field(1, 1) + field(2, shape))])


@pytest.mark.parametrize("restarts", [1 << 20, (1 << 32) - 1])
def test_more_restart_points_than_bytes(restarts):
    data = restarts.to_bytes(4, "little")
    stored = data + b"\0" + mask(google_crc32c.value(data + b"\0")).to_bytes(4, "little")
    footer = varint(0) + varint(0) + varint(0) + varint(len(data))
    whole = stored + footer.ljust(40, b"\0") + 0xDB4775248B80FB57.to_bytes(8, "little")
    with pytest.raises(CorruptFileError, match=f"{restarts:,} restart points in a block of 4 bytes"):
        checkpoint.read_bundle("bundle", files(index=whole))


def test_restart_points_alone_are_no_entries():
    """A block that ends where its restart points begin is empty, not corrupt."""
    data = bytes(4)
    stored = data + b"\0" + mask(google_crc32c.value(data + b"\0")).to_bytes(4, "little")
    footer = varint(0) + varint(0) + varint(0) + varint(len(data))
    whole = stored + footer.ljust(40, b"\0") + 0xDB4775248B80FB57.to_bytes(8, "little")
    with pytest.raises(CorruptFileError) as refusal:
        checkpoint.read_bundle("bundle", files(index=whole))
    assert str(refusal.value) == "bundle.index has no header; log the model again"


def with_entries(*entries):
    """An index whose one data block holds these bytes."""
    data = b"".join(entries) + bytes(4) + (1).to_bytes(4, "little")
    stored = data + b"\0" + mask(google_crc32c.value(data + b"\0")).to_bytes(4, "little")
    index, index_stored = block([(b"z", varint(0) + varint(len(data)))], 1)
    footer = varint(0) + varint(0) + varint(len(stored)) + varint(len(index))
    return stored + index_stored + footer.ljust(40, b"\0") + 0xDB4775248B80FB57.to_bytes(8, "little")


@pytest.mark.parametrize(
    "entry",
    [
        varint(1) + varint(1) + varint(0) + b"v",  # shares a byte with no key before it
        varint(0) + varint(20) + varint(1) + b"v",
        varint(0) + varint(1) + varint(20) + b"v",
        varint(0) + varint(1) + varint(4) + b"vaaa",
    ],
)
def test_an_entry_that_is_longer_than_its_block(entry):
    with pytest.raises(CorruptFileError) as refusal:
        checkpoint.read_bundle("bundle", files(index=with_entries(entry)))
    assert str(refusal.value) == (
        "bundle.index is corrupt (an entry that is longer than its block); log the model again"
    )


def test_compressed_blocks():
    stored = bytearray(block([HEADER], 1)[1])
    stored[-5] = 1  # Snappy
    stored[-4:] = mask(google_crc32c.value(bytes(stored[:-4]))).to_bytes(4, "little")
    footer = varint(0) + varint(0) + varint(0) + varint(len(stored) - 5)
    whole = bytes(stored) + footer.ljust(40, b"\0") + 0xDB4775248B80FB57.to_bytes(8, "little")
    with pytest.raises(UnsupportedModelError) as refusal:
        checkpoint.read_bundle("bundle", files(index=whole))
    assert str(refusal.value) == (
        "bundle.index has compressed blocks, which TensorFlow does not write; save the model again"
    )


def test_a_variant_is_named_with_its_file():
    with pytest.raises(UnsupportedModelError) as refusal:
        checkpoint.read_bundle("bundle", files(index=table([(b"", field(2, 1))], 1)))
    assert str(refusal.value) == "bundle.index was written on a big-endian machine, which is not supported"


def test_a_footer_alone_has_the_size_of_an_index():
    with pytest.raises(CorruptFileError, match="wrong magic number"):
        checkpoint.read_bundle("bundle", files(index=bytes(48)))
    with pytest.raises(CorruptFileError, match="has 47 bytes, too few"):
        checkpoint.read_bundle("bundle", files(index=bytes(47)))


def test_the_largest_index(monkeypatch):
    monkeypatch.setattr(checkpoint, "_MAX_INDEX", len(GOLDEN_INDEX))
    assert checkpoint.read_bundle("bundle", files(index=GOLDEN_INDEX)).shards == 1
    monkeypatch.setattr(checkpoint, "_MAX_INDEX", len(GOLDEN_INDEX) - 1)
    with pytest.raises(CorruptFileError) as refusal:
        checkpoint.read_bundle("bundle", files(index=GOLDEN_INDEX))
    assert str(refusal.value) == f"bundle.index has {len(GOLDEN_INDEX)} bytes, too many for a checkpoint index"


def test_as_many_tensors_and_as_long_a_key_as_there_can_be(monkeypatch):
    entries = [HEADER, *((b"%01024d" % i, VALUE) for i in range(3))]
    monkeypatch.setattr(checkpoint, "_MAX_ENTRIES", 3)
    assert len(checkpoint.read_bundle("bundle", files(index=table(entries, 2))).entries) == 3


def test_what_an_entry_leaves_out_is_zero():
    """As protobuf has it: a field of the value zero is not written."""
    shape = field(2, b"") + field(2, field(3, 5)) + field(2, field(1, 4))
    entries = [(b"", b""), (b"a", b""), (b"b\xff", field(2, shape)), (b"c", field(7, b"\x0a\x00"))]
    bundle = checkpoint.read_bundle("bundle", files(index=table(entries, 4)))
    assert bundle.shards == 1
    assert bundle.entries == {
        "a": Entry(crc32c=checksums.unmask(0)),
        "b\ufffd": Entry(shape=(0, 0, 4), crc32c=checksums.unmask(0)),
        "c": Entry(sliced=True, crc32c=checksums.unmask(0)),
    }


def string(data, *, dtype=7, shape=b"", crc=0):
    """Reads a string tensor `s` whose bytes in the data file are these."""
    value = field(1, dtype) + field(2, shape) + field(5, len(data)) + varint(6 << 3 | 5)
    index = table([HEADER, (b"s", value + mask(crc).to_bytes(4, "little"))], 2)
    opened = files(index=index, data_00000_of_00001=data)
    return checkpoint.read_bundle("bundle", opened).read_string("s", opened)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"data": b"", "dtype": 1}, CorruptFileError, "index has no string 's': not a checkpoint that Keras wrote"),
        (
            {"data": b"", "shape": field(2, field(1, 1))},
            CorruptFileError,
            "index has no string 's': not a checkpoint that Keras wrote",
        ),
        ({"data": b"\x80"}, CorruptFileError, "data-00000-of-00001: 's' has no length"),
        ({"data": b"\x03crc.ab"}, CorruptFileError, "data-00000-of-00001: 's' has 2 bytes and says 3"),
        (
            {"data": b"\x02crc.ab"},
            ChecksumError,
            "data-00000-of-00001: 's' does not match its crc32c; the file is damaged, log the model again",
        ),
    ],
)
def test_strings_that_are_refused(arguments, error, message):
    with pytest.raises(error) as refusal:
        string(**arguments)
    assert str(refusal.value) == f"bundle.{message}"
    assert string(b"\x02crc.ab", crc=google_crc32c.value(b"\x02\0\0\0crc.ab")) == b"ab"


def test_a_type_is_read_up_to_what_follows_it():
    """What follows may be a hundred million strings, and says nothing of type and shape."""

    def read(data):
        return checkpoint.read_type(ByteFile("model", io.BytesIO(data), len(data)), Span(0, len(data)))

    known = b"\x08\x07" + field(2, field(2, b"\x08\x05"))
    assert read(b"") == (0, [])
    assert read(known) == (7, [5])
    assert read(known + b"\x18\x02\x08\x09") == (7, [5])  # a version, and another type behind it
