"""Encodings of ids in a file: where a list of ids can be cut, and which ids a part of it holds.

Cutting scans the bytes in blocks and keeps none of them; decoding returns an Arrow array of one cut at a time.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError
from pyarrow import csv

from beam_pipeline import checksums
from beam_pipeline.errors import BadIdError, ChecksumError, CorruptFileError, UnsupportedModelError
from beam_pipeline.files import ByteFile
from beam_pipeline.formats import protobuf
from beam_pipeline.formats.model import Checksum, Encoding, Vocabulary
from beam_pipeline.formats.protobuf import Span, read_varint

_BLOCK = 4 << 20
_STRING_TAG = 8 << 3 | 2  # TensorProto.string_val, length-delimited
_LONGEST_HEADER = 11  # a tag and a varint of 64 bits


def decode(encoding: Encoding, data: bytes, count: int) -> pa.Array:
    """Returns `count` ids lying one after the other in `data` as an Arrow binary array.

    Raises:
        CorruptFileError: there are more or fewer.
        BadIdError: a non-integer line in a vocabulary of integers.
    """
    if encoding in (Encoding.UTF32, Encoding.FIXED):
        return _decode_fixed(data, count, is_utf32=encoding is Encoding.UTF32)
    ids = _DECODERS[encoding](data)
    if len(ids) != count:
        raise CorruptFileError(f"{len(ids):,} ids where {count:,} were counted: the file changed while it was read")
    return ids


def first(file: ByteFile, vocabulary: Vocabulary, count: int) -> tuple[list[str], int]:
    """Returns the first `count` ids, or all if there are fewer, and the position after them."""
    found, end = next(cuts(file, vocabulary, count), (0, vocabulary.span.start))
    head = protobuf.read(file, Span(vocabulary.span.start, end))
    return [
        name.decode("utf-8", "backslashreplace") for name in decode(vocabulary.encoding, head, found).to_pylist()
    ], end


def cuts(file: ByteFile, vocabulary: Vocabulary, rows: int) -> Iterator[tuple[int, int]]:
    """Yields (number of ids, position after them), `rows` at a time."""
    if vocabulary.encoding in (Encoding.UTF32, Encoding.FIXED):
        return _fixed_cuts(vocabulary.span, vocabulary.count or 0, rows)
    if vocabulary.encoding in _PLAIN_CUTS:
        return _PLAIN_CUTS[vocabulary.encoding](file, vocabulary.span, rows)
    is_json = vocabulary.encoding in (Encoding.JSON, Encoding.JSON_OBJECT)
    scan = _json_cuts if is_json else _line_cuts
    return scan(file, vocabulary.span, rows, vocabulary.checksum)


def decode_with_rows(vocabulary: Vocabulary, data: bytes, count: int) -> tuple[np.ndarray, pa.Array]:
    """Returns `count` ids that have their rows beside them, and these: int64 [n], and an Arrow binary array.

    Raises:
        CorruptFileError: there are more or fewer.
        BadIdError: what stands beside an id is not a row number; named.
    """
    if vocabulary.encoding is Encoding.CSV:
        rows, ids = _decode_csv(data, vocabulary)
    else:
        rows, ids = _decode_json_object(data, vocabulary.path)
    if len(ids) != count:
        raise CorruptFileError(
            f"{vocabulary.path}: {len(ids):,} ids where {count:,} were counted: the file changed while it was read, or "
            "an id is not on a line of its own"
        )
    return rows, ids


def verify(file: ByteFile, vocabulary: Vocabulary) -> None:
    """Raises ChecksumError if ids of one width, which cutting them does not read, do not match their checksum."""
    for _ in _blocks(file, vocabulary.span, vocabulary.checksum):
        pass


def _blocks(file: ByteFile, span: Span, checksum: Checksum | None) -> Iterator[tuple[int, bytes]]:
    """Yields (offset, bytes) of a span, and raises after its last block if the checksum of all does not match."""
    crc = []
    if checksum:
        for _, block in file.blocks(checksum.span.start, span.start, _BLOCK):
            crc.append((checksums.value(checksum.algorithm, block), len(block)))
    for offset, block in file.blocks(span.start, span.end, _BLOCK):
        if checksum:
            crc.append((checksums.value(checksum.algorithm, block), len(block)))
        yield offset, block
    if checksum and checksums.combine(checksum.algorithm, crc) != checksum.value:
        raise ChecksumError(
            f"{file.path}: the ids at byte {span.start:,} do not match their {checksum.algorithm}; the file was "
            "damaged after the training: log the model again"
        )


def _line_cuts(file: ByteFile, span: Span, rows: int, checksum: Checksum | None = None) -> Iterator[tuple[int, int]]:
    """Yields (number of lines, position after them), `rows` lines at a time; the last line needs no newline."""
    lines, done = 0, span.start
    for offset, block in _blocks(file, span, checksum):
        ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + offset + 1
        for end in ends[rows - lines - 1 :: rows]:
            yield rows, int(end)
            done = int(end)
        lines = (lines + len(ends)) % rows
    if lines or done < span.end:
        # Lines after the last cut, the last of them perhaps without its newline.
        unfinished = file.read(span.end - 1, 1) != b"\n"
        yield lines + unfinished, span.end


def _string_cuts(file: ByteFile, span: Span, rows: int) -> Iterator[tuple[int, int]]:
    """Yields (number of strings, position after them) of repeated `string_val` entries, `rows` at a time."""
    count, at = 0, span.start
    while at < span.end:
        data = file.read(at, min(_BLOCK, span.end - at))
        # Only the header of an entry has to lie in the block, not the id itself.
        last = len(data) - (_LONGEST_HEADER if at + len(data) < span.end else 0)
        pos = 0
        while pos < last:
            try:
                if data[pos] != _STRING_TAG:
                    raise ValueError(f"tag {data[pos]}")
                length = data[pos + 1]
                if length < 0x80:
                    pos += 2 + length
                else:
                    length, pos = read_varint(data, pos + 1)
                    pos += length
            except (IndexError, ValueError) as error:
                raise CorruptFileError(f"{file.path}: no id at byte {at + pos:,} ({error})") from error
            count += 1
            if count == rows:
                yield count, at + pos
                count = 0
        at += pos
    if at != span.end:
        raise CorruptFileError(f"{file.path}: the last id ends at byte {at:,} instead of {span.end:,}")
    if count:
        yield count, at


class JsonScanner:
    """Finds characters outside of strings in JSON text that comes in blocks."""

    def __init__(self) -> None:
        self._inside = 0  # 1 in the middle of a string
        self._escaped = False  # whether the next character follows a backslash

    def outside(self, block: bytes, characters: bytes) -> np.ndarray:
        """Returns the positions in the block of these characters, in order, where they are not part of a string."""
        data = np.frombuffer(block, np.uint8)
        quotes = np.flatnonzero(data == ord('"'))
        slashes = np.flatnonzero(data == ord("\\"))
        if self._escaped:
            slashes = np.concatenate(([-1], slashes))
        self._escaped = False
        if slashes.size:
            # In a run of backslashes each second one is itself escaped: what follows an odd run is escaped.
            breaks = np.diff(slashes) != 1
            first, last = slashes[np.r_[True, breaks]], slashes[np.r_[breaks, True]]
            escaped = last[(last - first) % 2 == 0] + 1
            self._escaped = bool(escaped.size) and int(escaped[-1]) == len(block)
            quotes = np.setdiff1d(quotes, escaped, assume_unique=True)
        found: np.ndarray = np.flatnonzero(np.isin(data, np.frombuffer(characters, np.uint8)))
        outside: np.ndarray = (np.searchsorted(quotes, found) + self._inside) % 2 == 0
        self._inside = (self._inside + len(quotes)) % 2
        return np.compress(outside, found)


def _json_cuts(file: ByteFile, span: Span, rows: int, checksum: Checksum | None = None) -> Iterator[tuple[int, int]]:
    """Yields (number of elements, position after their last comma) of an array's content, `rows` at a time."""
    count, done, scanner = 0, span.start, JsonScanner()
    for offset, block in _blocks(file, span, checksum):
        ends = scanner.outside(block, b",") + offset + 1
        for end in ends[rows - count - 1 :: rows]:
            yield rows, int(end)
            done = int(end)
        count = (count + len(ends)) % rows
    if done < span.end:
        yield count + 1, span.end  # No comma follows the last element.


def _decode_json(data: bytes) -> pa.Array:
    try:
        elements = json.loads(b"[" + data.strip().removesuffix(b",") + b"]")
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"not a list of ids in JSON ({error}); log the model again") from error
    wrong = next((element for element in elements if type(element) not in (str, int)), None)
    if wrong is not None or None in elements:
        kind = type(wrong).__name__  # Not the thing itself: its repr may recurse too deeply.
        raise UnsupportedModelError(
            f"an id that is neither string nor integer, but of JSON type {kind}; log the model again"
        )
    # Half a surrogate pair becomes bytes that are not UTF-8, which is reported later, with its row.
    return pa.array([str(element).encode("utf-8", "surrogatepass") for element in elements], pa.binary())


def _varint_cuts(file: ByteFile, span: Span, rows: int) -> Iterator[tuple[int, int]]:
    """Yields (number of varints, position after them), `rows` at a time."""
    count, done = 0, span.start
    for offset, block in file.blocks(span.start, span.end, _BLOCK):
        ends = np.flatnonzero(np.frombuffer(block, np.uint8) < 0x80) + offset + 1
        for end in ends[rows - count - 1 :: rows]:
            yield rows, int(end)
            done = int(end)
        count = (count + len(ends)) % rows
    if done < span.end:
        yield count, span.end


def _integer_cuts(size: int, _: ByteFile, span: Span, rows: int) -> Iterator[tuple[int, int]]:
    for start in range(span.start, span.end, size * rows):
        end = min(start + size * rows, span.end)
        yield (end - start) // size, end


def _fixed_cuts(span: Span, count: int, rows: int) -> Iterator[tuple[int, int]]:
    """Yields (number of ids, position after them) of ids that all have one width."""
    width = (span.end - span.start) // max(1, count)
    for first in range(0, count, rows):
        some = min(rows, count - first)
        yield some, span.start + (first + some) * width


def _row_cuts(span: Span, rows: int) -> Iterator[tuple[int, int]]:
    for start in range(span.start, span.end, rows):
        end = min(start + rows, span.end)
        yield end - start, end


def varints(data: bytes) -> np.ndarray:
    """Returns the varints lying one after the other in `data`, as uint64."""
    raw = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(raw < 0x80)
    if not ends.size or ends[-1] != len(raw) - 1:
        raise CorruptFileError("a list of integers that ends inside one")
    if len(raw) > 10 * len(ends):
        raise CorruptFileError("a list of integers with one of more than 64 bits")
    starts = np.concatenate([[0], ends[:-1] + 1])
    shifts = 7 * (np.arange(len(raw)) - np.repeat(starts, ends - starts + 1))
    if shifts.max() > 63:
        raise CorruptFileError("a list of integers with one of more than 64 bits")
    values: np.ndarray = np.bitwise_or.reduceat((raw & 0x7F).astype(np.uint64) << shifts.astype(np.uint64), starts)
    return values


def _decode_integers(numbers: np.ndarray) -> pa.Array:
    return pa.array(numbers).cast(pa.string()).cast(pa.binary())


def _decode_integer_lines(data: bytes) -> pa.Array:
    # TensorFlow ignores spaces around a number, and zeros before it.
    lines = pc.ascii_trim_whitespace(_decode_lines(data).cast(pa.string(), safe=False))
    try:
        return lines.cast(pa.int64()).cast(pa.string()).cast(pa.binary())
    except pa.ArrowInvalid as error:
        raise BadIdError(f"a vocabulary of integers has a non-integer line ({error}); train with integers") from error


def _decode_lines(data: bytes) -> pa.Array:
    if data and not data.endswith(b"\n"):
        data += b"\n"
    # To TensorFlow one carriage return before a newline is a part of the line's end.
    data = data.replace(b"\r\n", b"\n")
    ends = np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n"))
    # Without the newlines, line i ends i bytes earlier than in the file.
    offsets = np.zeros(len(ends) + 1, np.int32)
    offsets[1:] = ends - np.arange(len(ends))
    text = data.replace(b"\n", b"")
    return pa.Array.from_buffers(pa.binary(), len(ends), [None, pa.py_buffer(offsets), pa.py_buffer(text)])


def _strings_message() -> Any:
    """Returns a message class with TensorProto's `string_val` alone, so that protobuf's C parser splits the strings."""
    file = descriptor_pb2.FileDescriptorProto(name="beam_pipeline/strings.proto", package="beam_pipeline")
    message = file.message_type.add(name="Strings")
    message.field.add(
        name="string_val",
        number=8,
        type=descriptor_pb2.FieldDescriptorProto.TYPE_BYTES,
        label=descriptor_pb2.FieldDescriptorProto.LABEL_REPEATED,
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("beam_pipeline.Strings"))


_Strings = _strings_message()


def _decode_strings(data: bytes) -> pa.Array:
    try:
        return pa.array(list(_Strings.FromString(data).string_val), pa.binary())
    except DecodeError as error:
        raise CorruptFileError(f"not a list of ids in protobuf ({error}); log the model again") from error


def _decode_fixed(data: bytes, count: int, *, is_utf32: bool) -> pa.Array:
    """Returns strings of one width; NumPy keeps no NULs at their ends (numpy/doc/neps, `numpy.bytes_`)."""
    width = len(data) // max(1, count)
    if not width or len(data) != width * count or (is_utf32 and width % 4):
        raise CorruptFileError(f"{len(data):,} bytes are not {count:,} strings of one width")
    if not is_utf32:
        return pa.array(np.frombuffer(data, f"S{width}").tolist())
    try:
        texts = [data[at : at + width].decode("utf-32-le", "surrogatepass") for at in range(0, len(data), width)]
    except UnicodeDecodeError as error:
        raise CorruptFileError(f"a string that is not UTF-32 ({error.reason})") from error
    return pa.array([text.rstrip("\0").encode("utf-8", "surrogatepass") for text in texts])


def _decode_json_object(data: bytes, path: str) -> tuple[np.ndarray, pa.Array]:
    try:
        pairs = json.loads(b"{" + data.strip().removesuffix(b",") + b"}", object_pairs_hook=list)
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{path}: not a JSON object of id and row ({error})") from error
    ids = pa.array([name.encode("utf-8", "surrogatepass") for name, _ in pairs], pa.binary())
    for name, row in pairs:
        if type(row) is not int or not -(1 << 63) <= row < 1 << 63:
            problem = "beyond 64 bits" if type(row) is int else "not an integer"
            raise BadIdError(
                f"{path}: the row of id {shown(name.encode('utf-8', 'surrogatepass'))} is {problem}; a JSON object "
                "maps each id to the row of its vector"
            )
    return np.array([row for _, row in pairs], np.int64), ids


def _decode_csv(data: bytes, vocabulary: Vocabulary) -> tuple[np.ndarray, pa.Array]:
    id_column, row_column = (f"f{position}" for position in vocabulary.columns or (0, 1))
    try:
        table = csv.read_csv(
            pa.BufferReader(data if data.endswith(b"\n") else data + b"\n"),
            read_options=csv.ReadOptions(use_threads=False, autogenerate_column_names=True, block_size=len(data) + 2),
            parse_options=csv.ParseOptions(ignore_empty_lines=False),
            convert_options=csv.ConvertOptions(
                include_columns=[id_column, row_column], column_types={id_column: pa.binary(), row_column: pa.int64()}
            ),
        )
    except (pa.ArrowException, ValueError) as error:
        # Arrow counts columns from 0, and rows from the first of this part of the file.
        reason = re.sub(r"In CSV column #\d+: Row #?\d+: ", "", str(error).splitlines()[0])
        raise BadIdError(f"{vocabulary.path}: not a table of ids and their rows ({reason})") from error
    rows, ids = table[row_column].combine_chunks(), table[id_column].combine_chunks()
    if rows.null_count:
        at = int(np.flatnonzero(rows.is_null().to_numpy(zero_copy_only=False))[0])
        raise BadIdError(f"{vocabulary.path}: id {shown(ids[at].as_py())} has no row")
    return rows.to_numpy(), ids


_PLAIN_CUTS: dict[Encoding, Callable[[ByteFile, Span, int], Iterator[tuple[int, int]]]] = {
    Encoding.PROTOBUF: _string_cuts,
    Encoding.INT32: functools.partial(_integer_cuts, 4),
    Encoding.INT64: functools.partial(_integer_cuts, 8),
    Encoding.VARINTS: _varint_cuts,
    Encoding.REFERENCES: functools.partial(_integer_cuts, 16),
    Encoding.ROWS: lambda _, span, rows: _row_cuts(span, rows),
}
_DECODERS: dict[Encoding, Callable[[bytes], pa.Array]] = {
    Encoding.LINES: _decode_lines,
    Encoding.INTEGER_LINES: _decode_integer_lines,
    Encoding.JSON: _decode_json,
    Encoding.PROTOBUF: _decode_strings,
    Encoding.INT32: lambda data: _decode_integers(np.frombuffer(data[: len(data) // 4 * 4], "<i4")),
    Encoding.INT64: lambda data: _decode_integers(np.frombuffer(data[: len(data) // 8 * 8], "<i8")),
    Encoding.VARINTS: lambda data: _decode_integers(varints(data).view("<i8")),
}


def shown(name: bytes) -> str:
    """Returns an id in a form that is safe in a message."""
    return repr(name.decode("utf-8", "backslashreplace"))
