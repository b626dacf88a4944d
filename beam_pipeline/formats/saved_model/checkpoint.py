"""TensorFlow's tensor bundle: where each variable's bytes are, without reading them.

`<prefix>.index` is an SSTable in LevelDB's table format (leveldb/doc/table_format.md) from variable key to
`BundleEntryProto`; `<prefix>.data-SSSSS-of-NNNNN` holds the tensors' bytes
(tensorflow/core/protobuf/tensor_bundle.proto, tensorflow/core/util/tensor_bundle).
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass, field

import google_crc32c

from beam_pipeline import checksums
from beam_pipeline.errors import ChecksumError, CorruptFileError, UnsupportedModelError
from beam_pipeline.files import ByteFile, OpenFile
from beam_pipeline.formats import protobuf
from beam_pipeline.formats.model import Encoding
from beam_pipeline.formats.protobuf import Span

_FOOTER_SIZE = 48
_MAGIC = 0xDB4775248B80FB57
_BLOCK_TRAILER = 5  # One byte of compression type, four of masked crc32c.
_MAX_INDEX = 16 << 20
_MAX_ENTRIES = 100_000
_MAX_KEY = 1024
_MAX_DIMENSIONS = 254  # tensorflow/core/framework/tensor_shape.h
_DT_STRING = 7

DTYPES = {1: "float32", 2: "float64", 14: "bfloat16", 19: "float16"}
"""The `DataType` numbers (tensorflow/core/framework/types.proto) that an embedding may have."""

ID_TYPES = {3: Encoding.INT32, 7: Encoding.STRING_TENSOR, 9: Encoding.INT64}
"""The `DataType` numbers that ids may have, and how these are laid out in a checkpoint."""

OBJECT_GRAPH_KEY = "_CHECKPOINTABLE_OBJECT_GRAPH"


@dataclass(frozen=True)
class Entry:
    """A tensor of the bundle (`BundleEntryProto`).

    Attributes:
        dtype: TensorFlow's number of the element type.
        shape: length of each dimension.
        shard: which data file.
        offset: first byte in the data file.
        size: bytes in the data file.
        crc32c: checksum of those bytes, unmasked.
        sliced: whether the tensor is stored in slices, under other keys.
    """

    dtype: int = 0
    shape: tuple[int, ...] = ()
    shard: int = 0
    offset: int = 0
    size: int = 0
    crc32c: int = 0
    sliced: bool = False


@dataclass(frozen=True)
class Bundle:
    """The index of a tensor bundle."""

    prefix: str
    shards: int
    entries: dict[str, Entry] = field(repr=False)

    def data_path(self, entry: Entry) -> str:
        """Returns the path of the file that holds the entry's bytes."""
        return f"{self.prefix}.data-{entry.shard:05d}-of-{self.shards:05d}"

    def read_string(self, key: str, open_file: OpenFile) -> bytes:
        """Returns the value of a scalar string tensor.

        In a data file the lengths come first (a varint each), then a masked crc32c of the lengths, then the bytes;
        the entry's checksum covers the lengths as fixed-width integers, so only the latter crc is compared here.

        Raises:
            CorruptFileError: there is no such tensor or it is not a string.
        """
        entry = self.entries.get(key)
        if entry is None or entry.dtype != _DT_STRING or entry.shape:
            raise CorruptFileError(f"{self.prefix}.index has no string {key!r}: not a checkpoint that Keras wrote")
        path = self.data_path(entry)
        with open_file(path) as file:
            data = protobuf.read(file, Span(entry.offset, entry.offset + entry.size))
        try:
            length, at = protobuf.read_varint(data, 0)
        except (IndexError, ValueError) as error:
            raise CorruptFileError(f"{path}: {key!r} has no length") from error
        if at + 4 + length != len(data):
            raise CorruptFileError(f"{path}: {key!r} has {len(data) - at - 4:,} bytes and says {length:,}")
        # The checksum of a string tensor: each length as a little-endian uint32 (uint64 above 4 GiB), the stored
        # length checksum, then the bytes (WriteStringTensor in tensor_bundle.cc).
        checksum = google_crc32c.value(struct.pack("<I", length) + data[at : at + 4] + data[at + 4 :])
        if checksum != entry.crc32c:
            raise ChecksumError(f"{path}: {key!r} does not match its crc32c; the file is damaged, log the model again")
        return data[at + 4 :]


def read_bundle(prefix: str, open_file: OpenFile) -> Bundle:
    """Reads `<prefix>.index`.

    Raises:
        ArtifactMissingError: there is no index.
        CorruptFileError: it is not a table, or a block does not match its checksum.
        UnsupportedModelError: it is a valid table in a variant that TensorFlow does not write on common machines.
    """
    path = f"{prefix}.index"
    with open_file(path) as file:
        if file.size < _FOOTER_SIZE:
            raise CorruptFileError(f"{path} has {file.size} bytes, too few for a checkpoint index; log the model again")
        if file.size > _MAX_INDEX:
            raise CorruptFileError(f"{path} has {file.size:,} bytes, too many for a checkpoint index")
        footer = file.read(file.size - _FOOTER_SIZE, _FOOTER_SIZE)
        if int.from_bytes(footer[-8:], "little") != _MAGIC:
            raise CorruptFileError(f"{path} is not a checkpoint index (wrong magic number); log the model again")
        try:
            _, _, at = _handle(footer, 0)
            start, size, _ = _handle(footer, at)
            entries: dict[str, Entry] = {}
            shards = None
            done = 0  # Data blocks follow one another: none is read twice.
            for _, block in _block(file, start, size):
                data_start, data_size, _ = _handle(block, 0)
                if data_start < done:
                    raise ValueError(f"two blocks at byte {data_start:,}")
                done = data_start + data_size
                for key, value in _block(file, data_start, data_size):
                    message = ByteFile(path, io.BytesIO(value), len(value))
                    if key:
                        entries[key.decode("utf-8", "replace")] = _entry(message)
                        if len(entries) > _MAX_ENTRIES:
                            raise ValueError(f"more than {_MAX_ENTRIES:,} tensors")
                    else:
                        shards = _shards(message)
        except (IndexError, ValueError, struct.error) as error:
            raise CorruptFileError(f"{path} is corrupt ({error}); log the model again") from error
    if shards is None:
        raise CorruptFileError(f"{path} has no header; log the model again")
    return Bundle(prefix, shards, entries)


def read_shape(file: ByteFile, span: Span) -> list[int]:
    """Returns the length of each dimension of a `TensorShapeProto` (tensorflow/core/framework/tensor_shape.proto)."""
    sizes = list[int]()
    for dim in protobuf.spans(file, span, 2):
        if len(sizes) == _MAX_DIMENSIONS:
            raise CorruptFileError(f"{file.path}: a tensor of more than {_MAX_DIMENSIONS} dimensions")
        sizes.append(
            next((size for number, size in protobuf.scan(file, dim) if number == 1 and isinstance(size, int)), 0)
        )
    return sizes


def read_type(file: ByteFile, span: Span) -> tuple[int, list[int]]:
    """Returns (data type, length of each dimension) of a `TensorProto`, or of a `SavedVariable`, which begins alike."""
    dtype, sizes = 0, list[int]()
    for number, value in protobuf.scan(file, span):
        if number == 1 and isinstance(value, int):
            dtype = value
        elif number == 2 and isinstance(value, Span):
            sizes = read_shape(file, value)
        elif number > 2:  # Type and shape come first; what follows may be a hundred million strings.
            break
    return dtype, sizes


def _handle(data: bytes, at: int) -> tuple[int, int, int]:
    """Returns (offset, size, position after) of a BlockHandle."""
    offset, at = protobuf.read_varint(data, at)
    size, at = protobuf.read_varint(data, at)
    return offset, size, at


def _block(file: ByteFile, start: int, size: int) -> list[tuple[bytes, bytes]]:
    """Returns the (key, value) pairs of a table block."""
    raw = file.read(start, size + _BLOCK_TRAILER)
    stored = checksums.unmask(int.from_bytes(raw[size + 1 :], "little"))
    if google_crc32c.value(raw[: size + 1]) != stored:
        raise ChecksumError(f"{file.path} does not match its checksum at byte {start:,}; log the model again")
    if raw[size] != 0:
        raise UnsupportedModelError(
            f"{file.path} has compressed blocks, which TensorFlow does not write; save the model again"
        )
    # A block ends with the offsets of its restart points and their number, which only a search by key needs.
    data = raw[:size]
    restarts = int.from_bytes(data[-4:], "little")
    end = size - 4 - 4 * restarts
    if end < 0:
        raise ValueError(f"{restarts:,} restart points in a block of {size:,} bytes")
    pairs = list[tuple[bytes, bytes]]()
    key, at = b"", 0
    while at < end:
        shared, at = protobuf.read_varint(data, at)
        unshared, at = protobuf.read_varint(data, at)
        length, at = protobuf.read_varint(data, at)
        if shared > len(key) or at + unshared + length > end:
            raise ValueError("an entry that is longer than its block")
        # Shared parts of keys take no bytes in the file: a small one could hold keys without end.
        if shared + unshared > _MAX_KEY or len(pairs) == _MAX_ENTRIES:
            raise ValueError(f"a key of {shared + unshared:,} bytes, or more than {_MAX_ENTRIES:,} of them")
        key = key[:shared] + data[at : at + unshared]
        pairs.append((key, data[at + unshared : at + unshared + length]))
        at += unshared + length
    return pairs


def _shards(message: ByteFile) -> int:
    """Returns `num_shards` of the BundleHeaderProto, refusing what cannot be read."""
    # BundleHeaderProto: num_shards (1), endianness (2), of which 0 is little.
    header = {
        number: value for number, value in protobuf.scan(message, Span(0, message.size)) if isinstance(value, int)
    }
    if header.get(2, 0) != 0:
        raise UnsupportedModelError(f"{message.path} was written on a big-endian machine, which is not supported")
    return header.get(1, 1)


def _entry(message: ByteFile) -> Entry:
    numbers: dict[int, int] = {}
    shape: list[int] = []
    sliced = False
    # BundleEntryProto: dtype (1), shape (2), shard_id (3), offset (4), size (5), crc32c (6), slices (7).
    for number, value in protobuf.scan(message, Span(0, message.size)):
        if isinstance(value, int):
            numbers[number] = value
        elif number == 2:
            shape = read_shape(message, value)
        elif number == 7:
            sliced = True
    return Entry(
        dtype=numbers.get(1, 0),
        shape=tuple(shape),
        shard=numbers.get(3, 0),
        offset=numbers.get(4, 0),
        size=numbers.get(5, 0),
        crc32c=checksums.unmask(numbers.get(6, 0)),
        sliced=sliced,
    )
