"""What a format reader finds: towers, each an embedding matrix and the ids of its rows, as byte ranges."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np

from beam_pipeline.formats.wire import Span

DEFAULT_TOWERS = {"user": "user_layer", "item": "item_layer"}


class Encoding(Enum):
    """How ids lie in a file, one after the other."""

    LINES = "lines"
    """One id per line, as TensorFlow's vocabulary files have them."""
    PROTOBUF = "protobuf"
    """Entries of `TensorProto.string_val`: the wire format's field 8, one after the other."""
    STRING_TENSOR = "string tensor"
    """A string tensor of a checkpoint: all lengths (varints), their masked crc32c, then the bytes of all ids."""
    INTEGER_LINES = "integer lines"
    """One integer per line; an id is its decimal digits, as with all integers."""
    INT64 = "int64"
    """Integers of eight bytes, little-endian."""
    VARINTS = "varints"
    """Integers as a packed protobuf field, negative ones in ten bytes."""


@dataclass(frozen=True)
class Matrix:
    """An embedding matrix, its rows contiguous and little-endian.

    Attributes:
        path: the file that holds it.
        offset: first byte of row 0.
        rows: number of rows.
        dimension: values in a row.
        dtype: "float32", "float64", "float16" or "bfloat16".
        crc32c: checksum of all its bytes.
    """

    path: str
    offset: int
    rows: int
    dimension: int
    dtype: str
    crc32c: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.dimension * {"float64": 8, "float32": 4}.get(self.dtype, 2)

    def decode(self, raw: bytes) -> np.ndarray:
        """Returns whole rows [rows, dimension] as the floats that they are, without a copy; bfloat16 as float32."""
        if self.dtype == "bfloat16":  # The upper half of a float32, which NumPy has no name for.
            flat = (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
        else:
            flat = np.frombuffer(raw, np.dtype(self.dtype).newbyteorder("<"))
        return flat.reshape(-1, self.dimension)


@dataclass(frozen=True)
class Vocabulary:
    """The ids of a tower, as a rule in row order: the id at position i belongs to row `first_row + i`.

    Attributes:
        path: the file that holds the ids.
        span: where in it.
        encoding: how they lie there.
        first_row: the lowest row of an id; the rows before it stand for out-of-vocabulary ids or the mask.
        count: number of ids, if the artifact says it without reading them.
        row_numbers: where the artifact itself lists the row of each id (int64, little-endian), if it does.
        special_tokens: names for the rows before `first_row`, if these are to be written too.
        in_row_order: False if the row of the id at position i is the i-th of `row_numbers`, whatever that is.
        row_numbers_path: the file of `row_numbers`, if it is not `path`.
        crc32c: checksum of the ids, if the artifact has one.
    """

    path: str
    span: Span
    encoding: Encoding
    first_row: int
    count: int | None = None
    row_numbers: Span | None = None
    special_tokens: tuple[str, ...] = ()
    in_row_order: bool = True
    row_numbers_path: str | None = None
    crc32c: int | None = None


@dataclass(frozen=True)
class Tower:
    """One tower of a model.

    Attributes:
        name: "user", "item" or as given with `--tower`.
        layer: path of the layer in the model.
        matrix: its embeddings.
        vocabulary: its ids.
    """

    name: str
    layer: str
    matrix: Matrix
    vocabulary: Vocabulary
