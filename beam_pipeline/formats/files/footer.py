"""What the footer of a Parquet file says of its row groups: Thrift's compact protocol, of which a few fields are read.

pyarrow shows the same, but a damaged footer can end the whole process in it (an exception of C++ that nothing catches
while `RowGroupMetaData.column` is created), and here it is looked at before pyarrow reads anything. The fields are
those of parquet.thrift (apache/parquet-format), the encoding is that of thrift-compact-protocol.md (apache/thrift).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from beam_pipeline.errors import CorruptFileError
from beam_pipeline.formats.protobuf import read_varint

_DEEPEST = 24
_TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = 1, 2, 3, 7, 8, 9, 10, 11, 12
_INTEGERS = (4, 5, 6)


@dataclass(frozen=True)
class Leaf:
    """The values of a column in a row group.

    Attributes:
        path: of the column in the schema, joined by dots.
        values: how many there are.
        size: their bytes, uncompressed.
    """

    path: str
    values: int
    size: int


@dataclass(frozen=True)
class Group:
    """A row group: its rows, and its columns."""

    rows: int
    leaves: tuple[Leaf, ...]


def read_groups(path: str, data: bytes) -> list[Group]:
    """Returns the row groups that a footer describes.

    Args:
        path: of the file, for a message.
        data: the footer.

    Raises:
        CorruptFileError: it is no footer.
    """
    try:
        return _Reader(data).groups()
    except (IndexError, ValueError, OverflowError) as error:
        raise CorruptFileError(f"{path} cannot be read as Parquet (its footer is damaged); write it again") from error


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def groups(self) -> list[Group]:
        found = list[Group]()
        for number, kind in self._fields():
            if (number, kind) == (4, _LIST):
                found += [self._group() for _ in self._elements(_STRUCT)]
            else:
                self._skip(kind)
        return found

    def _group(self) -> Group:
        rows, leaves = -1, tuple[Leaf, ...]()
        for number, kind in self._fields():
            if (number, kind) == (1, _LIST):
                leaves = tuple(self._column() for _ in self._elements(_STRUCT))
            elif number == 3 and kind in _INTEGERS:
                rows = self._integer()
            else:
                self._skip(kind)
        return Group(rows, leaves)

    def _column(self) -> Leaf:
        leaf = Leaf("", -1, -1)
        for number, kind in self._fields():
            if (number, kind) == (3, _STRUCT):
                leaf = self._metadata()
            else:
                self._skip(kind)
        return leaf

    def _metadata(self) -> Leaf:
        path, values, size = "", -1, -1
        for number, kind in self._fields():
            if (number, kind) == (3, _LIST):
                path = ".".join(self._binary().decode("utf-8", "replace") for _ in self._elements(_BINARY))
            elif number == 5 and kind in _INTEGERS:
                values = self._integer()
            elif number == 6 and kind in _INTEGERS:
                size = self._integer()
            else:
                self._skip(kind)
        return Leaf(path, values, size)

    def _fields(self) -> Iterator[tuple[int, int]]:
        """Yields (number, type) of a struct's fields; whoever takes one reads its value."""
        number = 0
        while (head := self._byte()) != 0:
            number = number + (head >> 4) if head >> 4 else self._integer()
            yield number, head & 15

    def _elements(self, kind: int) -> Iterator[None]:
        """Yields as often as a list has elements, which have to be of a type."""
        count, found = self._list_head()
        if count and found != kind:
            raise ValueError(f"a list of type {found}")
        for _ in range(count):
            yield

    def _list_head(self) -> tuple[int, int]:
        head = self._byte()
        count = head >> 4
        if count == 15:
            count = self._unsigned()
        if count > len(self._data) - self._at:  # Each takes a byte.
            raise ValueError(f"a list of {count} elements")
        return count, head & 15

    def _skip(self, kind: int, depth: int = 0, *, in_list: bool = False) -> None:
        if depth > _DEEPEST:
            raise ValueError("too deep")
        if kind in (_TRUE, _FALSE):
            self._at += in_list  # Elsewhere the type is the value.
        elif kind == _BYTE:
            self._at += 1
        elif kind in _INTEGERS:
            self._unsigned()
        elif kind == _DOUBLE:
            self._at += 8
        elif kind == _BINARY:
            self._binary()
        elif kind in (_LIST, _SET):
            count, element = self._list_head()
            for _ in range(count):
                self._skip(element, depth + 1, in_list=True)
        elif kind == _MAP:
            count = self._unsigned()
            if count > len(self._data) - self._at:
                raise ValueError(f"a map of {count} entries")
            kinds = self._byte() if count else 0
            for _ in range(count):
                self._skip(kinds >> 4, depth + 1, in_list=True)
                self._skip(kinds & 15, depth + 1, in_list=True)
        elif kind == _STRUCT:
            for _, field in self._fields():
                self._skip(field, depth + 1)
        else:
            raise ValueError(f"type {kind}")

    def _binary(self) -> bytes:
        length = self._unsigned()
        if length > len(self._data) - self._at:
            raise ValueError(f"a string of {length} bytes")
        self._at += length
        return self._data[self._at - length : self._at]

    def _integer(self) -> int:
        value = self._unsigned()
        return value >> 1 ^ -(value & 1)

    def _unsigned(self) -> int:
        value, self._at = read_varint(self._data, self._at)
        return value

    def _byte(self) -> int:
        value = self._data[self._at]
        self._at += 1
        return value
