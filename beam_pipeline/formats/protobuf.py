"""The protobuf wire format, scanned in place (https://protobuf.dev/programming-guides/encoding).

A SavedModel can hold hundreds of megabytes of ids. Parsing it whole costs several times its size in memory, and does
not say where in the file a field is. This scanner says so, and skips over what nobody asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from beam_pipeline.errors import CorruptFileError
from beam_pipeline.files import ByteFile

_MAX_MESSAGE = 64 << 20
_MAX_INTEGERS = 1 << 20
_MAX_NUMBER = 1 << 12  # The messages of a model have none above 20; readers keep what they find by number.
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class Span(NamedTuple):
    """A byte range of a file."""

    start: int
    end: int


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """Returns (value, position after it) of the varint at `at`.

    Raises:
        IndexError: the data end inside it.
        ValueError: it is longer than 64 bits.
    """
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("varint of more than 64 bits")


def scan(file: ByteFile, span: Span) -> Iterator[tuple[int, int | Span]]:
    """Yields (field number, value) of the message in `span`, in file order.

    A varint or fixed-width value comes as an int, anything length-delimited (strings, bytes, messages, packed
    fields) as the Span of its content, which is not read.

    Raises:
        CorruptFileError: the bytes are not a protobuf message of that length.
    """
    for _, number, value in _fields(file, span):
        yield number, value


def position(file: ByteFile, span: Span, number: int) -> int | None:
    """Returns where the first field `number` of a message begins, its tag included."""
    return next((at for at, found, _ in _fields(file, span) if found == number), None)


def _fields(file: ByteFile, span: Span) -> Iterator[tuple[int, int, int | Span]]:
    at, end = span
    while at < end:
        head = file.read(at, min(20, end - at))
        try:
            tag, used = read_varint(head, 0)
            number, kind = tag >> 3, tag & 7
            if not 0 < number < _MAX_NUMBER:
                raise ValueError(f"field number {number}")
            value: int | Span
            if kind == _VARINT:
                value, used = read_varint(head, used)
            elif kind == _BYTES:
                length, used = read_varint(head, used)
                value = Span(at + used, at + used + length)
                used += length
            elif kind in (_FIXED64, _FIXED32):
                width = 8 if kind == _FIXED64 else 4
                value = int.from_bytes(head[used : used + width], "little")
                used += width
            else:
                raise ValueError(f"wire type {kind}")
            if at + used > end:
                raise ValueError("a field that is longer than its message")
        except (IndexError, ValueError) as error:
            raise CorruptFileError(f"{file.path}: not a protobuf message at byte {at:,} ({error})") from error
        yield at, number, value
        at += used


def spans(file: ByteFile, span: Span, number: int) -> Iterator[Span]:
    """Yields the spans of field `number` (length-delimited) of a message."""
    for found, value in scan(file, span):
        if found == number and isinstance(value, Span):
            yield value


def read(file: ByteFile, span: Span) -> bytes:
    """Returns the bytes of a small span.

    Raises:
        CorruptFileError: it is larger than anything that is read whole.
    """
    if span.end - span.start > _MAX_MESSAGE:
        raise CorruptFileError(f"{file.path}: a field of {span.end - span.start:,} bytes where a short one belongs")
    return file.read(span.start, span.end - span.start)


def text(file: ByteFile, span: Span) -> str:
    """Returns a string field."""
    return read(file, span).decode("utf-8", "replace")


def packed(file: ByteFile, span: Span) -> list[int]:
    """Returns a packed repeated varint field."""
    if span.end - span.start > 10 * _MAX_INTEGERS:
        raise CorruptFileError(f"{file.path}: a list of more than {_MAX_INTEGERS:,} integers; log the model again")
    data = read(file, span)
    values, at = [], 0
    try:
        while at < len(data):
            value, at = read_varint(data, at)
            values.append(value)
    except (IndexError, ValueError) as error:
        raise CorruptFileError(f"{file.path}: broken list of integers at byte {span.start:,}") from error
    return values


def integers(file: ByteFile, span: Span, number: int) -> list[int]:
    """Returns a repeated varint field of a message, packed or not."""
    values: list[int] = []
    for found, value in scan(file, span):
        if found == number:
            values += packed(file, value) if isinstance(value, Span) else [value]
            if len(values) > _MAX_INTEGERS:
                raise CorruptFileError(
                    f"{file.path}: a list of more than {_MAX_INTEGERS:,} integers; log the model again"
                )
    return values
