"""What a format reader finds: towers, each an embedding matrix and the ids of its rows, as byte ranges.

Every reader is an `Artifact`; what comes after it knows towers alone, not formats.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

import numpy as np

from beam_pipeline.errors import CorruptFileError
from beam_pipeline.formats.protobuf import Span

_MAX_OOV = 100_000
_LONGEST_TOKEN = 300


class Encoding(Enum):
    """How ids are laid out in a file, one after the other."""

    LINES = "lines"
    """One id per line, as TensorFlow's vocabulary files have them."""
    PROTOBUF = "protobuf"
    """Entries of `TensorProto.string_val`: the wire format's field 8, one after the other."""
    JSON = "json"
    """Elements of a JSON array, strings or integers, one after the other with their commas."""
    STRING_TENSOR = "string tensor"
    """A string tensor of a checkpoint: all lengths (varints), their masked crc32c, then the bytes of all ids."""
    INTEGER_LINES = "integer lines"
    """One integer per line; an id is its decimal digits, as with all integers."""
    INT32 = "int32"
    """Integers of four bytes, little-endian."""
    INT64 = "int64"
    """Integers of eight bytes, little-endian."""
    VARINTS = "varints"
    """Integers as a packed protobuf field, negative ones in ten bytes."""
    UTF32 = "UTF-32"
    """Strings of one width, as NumPy's type `<U`: four bytes a character, padded with NULs."""
    REFERENCES = "references"
    """References to strings elsewhere in an HDF5 file, each of one width."""
    FIXED = "fixed width"
    """Strings of one width, as NumPy's type `S`: padded with NULs."""
    ROWS = "rows"
    """No bytes at all: the id of a row is its number."""
    JSON_OBJECT = "JSON object"
    """Members of a JSON object, `"id": row`, one after the other with their commas."""
    CSV = "CSV"
    """Lines of a table, among whose columns are an id and its row."""
    PARQUET = "Parquet"
    """A column of Parquet files, with vectors or rows in another."""


@dataclass(frozen=True)
class Checksum:
    """What the artifact says of some of a file's bytes.

    Attributes:
        algorithm: "crc32c" or "crc32".
        value: the checksum.
        span: the bytes that it covers.
    """

    algorithm: str
    value: int
    span: Span


@dataclass(frozen=True)
class Matrix:
    """An embedding matrix, its rows contiguous and little-endian.

    Attributes:
        path: the file that holds it.
        offset: first byte of row 0.
        rows: number of rows.
        dimension: values in a row.
        dtype: "float32", "float64", "float16" or "bfloat16".
        checksum: covers all its bytes, and perhaps others of the same file; None if the artifact has none.
    """

    path: str
    offset: int
    rows: int
    dimension: int
    dtype: str
    checksum: Checksum | None

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.dimension * {"float64": 8, "float32": 4}.get(self.dtype, 2)

    @property
    def size(self) -> int:
        """Bytes of all rows."""
        return self.rows * self.row_bytes

    @property
    def span(self) -> Span:
        """Its bytes in the file."""
        return Span(self.offset, self.offset + self.size)

    def rows_in(self, size: int) -> int:
        """Returns how many rows so many bytes hold, but at least one."""
        return max(1, size // self.row_bytes)

    def decode(self, raw: bytes) -> np.ndarray:
        """Returns whole rows [rows, dimension] as the floats that they are, without a copy; bfloat16 as float32."""
        if self.dtype == "bfloat16":  # The upper half of a float32, which NumPy has no name for.
            flat = (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
        else:
            flat = np.frombuffer(raw, np.dtype(self.dtype).newbyteorder("<"))
        return flat.reshape(-1, self.dimension)


@dataclass(frozen=True)
class RowGroup:
    """A row group of a Parquet file: rows that are read without those of others.

    Attributes:
        path: the file.
        number: which of the file's groups.
        rows: its rows.
    """

    path: str
    number: int
    rows: int


@dataclass(frozen=True)
class Table:
    """Two columns of Parquet files: an id, and what belongs to it.

    Attributes:
        path: the file, or what the files were named by: a folder or a pattern.
        files: path of each file, and the rows of its row groups.
        id_column: name of the column of ids.
        value_column: name of the other: a row of a matrix, or a vector.
    """

    path: str
    files: tuple[tuple[str, tuple[int, ...]], ...]
    id_column: str
    value_column: str

    @property
    def groups(self) -> list[RowGroup]:
        """All row groups, file by file."""
        return [RowGroup(path, number, rows) for path, counts in self.files for number, rows in enumerate(counts)]

    @property
    def rows(self) -> int:
        """Rows of all files."""
        return sum(sum(counts) for _, counts in self.files)


@dataclass(frozen=True)
class VectorTable(Table):
    """Ids and their vectors in Parquet files. They have no checksum of the whole; a page may have one of its own.

    Attributes:
        dimension: values in a vector.
        dtype: "float32", "float64" or "float16".
        checksum: None.
    """

    dimension: int
    dtype: str
    checksum: None = None

    @property
    def row_bytes(self) -> int:
        """Bytes of one vector in memory."""
        return self.dimension * np.dtype(self.dtype).itemsize

    @property
    def size(self) -> int:
        """Bytes of all vectors in memory."""
        return self.rows * self.row_bytes

    def rows_in(self, size: int) -> int:
        """Returns how many vectors so many bytes hold, but at least one."""
        return max(1, size // self.row_bytes)


@dataclass(frozen=True)
class Vocabulary:
    """The ids of a tower, as a rule in row order: the id at position i belongs to row `first_row + i`.

    Attributes:
        path: the file that holds the ids.
        span: where in it.
        encoding: how they are laid out there.
        first_row: the lowest row of an id; the rows before it stand for out-of-vocabulary ids or the mask.
        count: number of ids, if the artifact says it without reading them.
        row_numbers: where the artifact itself lists the row of each id (int64, little-endian), if it does.
        special_tokens: names for the rows before `first_row`, if these are to be written too.
        checksum: covers the ids, if the artifact has one; it may begin before `span` and ends with it.
        in_row_order: False if the row of the id at position i is the i-th of `row_numbers`, whatever that is, or stands
            beside the id.
        row_numbers_path: the file of `row_numbers`, if it is not `path`.
        fills: each row from `first_row` on has an id: of ids from outside of the model.
        columns: of a CSV file, the positions of the columns of ids and of rows.
        table: of Parquet files, where the ids are and what stands beside them.
        heap: of references, the bytes in which they are strings; addresses count from their start.
    """

    path: str
    span: Span
    encoding: Encoding
    first_row: int
    count: int | None = None
    row_numbers: Span | None = None
    special_tokens: tuple[str, ...] = ()
    checksum: Checksum | None = None
    in_row_order: bool = True
    row_numbers_path: str | None = None
    fills: bool = False
    columns: tuple[int, int] | None = None
    table: Table | None = None
    heap: Span | None = None


class Ending(Enum):
    """How a tower continues after its embedding."""

    EMBEDDING = "ends at the embedding"
    SCALED = "scales only"
    GOES_ON = "continues"
    UNKNOWN = "unknown"
    COMPUTED = "is computed to its end"
    LOGGED = "is what the trainer logged"


@dataclass(frozen=True)
class Tail:
    """What a tower does with the rows of its embedding before they are compared with the other tower, or returned.

    Attributes:
        ending: whether the row is the vector that the model serves.
        operations: what is done, each as (layer, operation); empty where the tower ends at the embedding.
        meeting: the operation in which the towers meet, where that is neither a dot product nor a cosine.
        is_biased: whether the model adds something of each id to the dot product.
        reason: why the ending is unknown, or what else a person should know.
    """

    ending: Ending
    operations: tuple[tuple[str, str], ...] = ()
    meeting: str = ""
    is_biased: bool = False
    reason: str = ""

    @property
    def is_row(self) -> bool:
        """Whether the row is what the model serves, or at least points where that does."""
        return self.ending in (Ending.EMBEDDING, Ending.SCALED, Ending.LOGGED)

    @property
    def steps(self) -> str:
        """The operations by layer, as `dense (MatMul, BiasAdd, Relu), dense_1 (MatMul, BiasAdd)`."""
        layers: dict[str, list[str]] = {}
        for layer, operation in self.operations:
            layers.setdefault(layer, []).append(operation)
        return ", ".join(
            f"{layer} ({', '.join(names)})" if layer else ", ".join(names) for layer, names in layers.items()
        )


@dataclass(frozen=True)
class Tower:
    """One tower of a model.

    Attributes:
        name: "user", "item" or as given with `--tower`.
        layer: path of the layer in the model.
        matrix: its embeddings.
        vocabulary: its ids.
        rest: bytes of the matrix's file that are read with this tower, for the checksum alone.
        tail: what the model does with the rows.
        source: "embedding", "index" if the rows are those of a search index, "file" if the trainer logged them, or
            "computed".
        model_uri: where its model is, if the towers of a training are of several.
    """

    name: str
    layer: str
    matrix: Matrix | VectorTable
    vocabulary: Vocabulary
    rest: tuple[Span, ...] = ()
    tail: Tail = Tail(Ending.UNKNOWN)
    source: str = "embedding"
    model_uri: str = ""

    @property
    def is_computed(self) -> bool:
        """Whether its vectors are in no file; how many there are is then known only once its ids were read."""
        return False

    @property
    def computed_by(self) -> str:
        """The library that computes its vectors, and its version; empty if they are read."""
        return ""

    @property
    def ids_place(self) -> str:
        """Where its ids are, for a message."""
        if self.source == "index":
            return f"the index {self.layer!r}"
        return self.vocabulary.path if self.has_ids_beside_it else "the vocabulary"

    @property
    def has_ids_beside_it(self) -> bool:
        """Whether its ids are in a file that is no part of a model."""
        beside = (Encoding.JSON_OBJECT, Encoding.CSV, Encoding.PARQUET)
        return self.source == "file" or self.vocabulary.fills or self.vocabulary.encoding in beside

    @property
    def contiguous(self) -> Matrix:
        """The matrix, of a tower whose vectors are stored one after the other."""
        if not isinstance(self.matrix, Matrix):
            raise TypeError(f"the vectors of tower {self.name!r} are in Parquet files")
        return self.matrix

    @property
    def vector_source(self) -> str:
        """What the published vectors are: what the model serves, or rows after which its tower continues."""
        return "embedding_rows" if self.tail.ending == Ending.GOES_ON else self.source


class Artifact(Protocol):
    """A model, as a reader of its format shows it."""

    def tower(self, name: str, layer: str, *, include_oov: bool = False) -> Tower:
        """Returns the tower that the layer `layer` holds.

        Raises:
            TowerMissingError: no such layer, or it does not hold one lookup and one embedding.
            UnsupportedModelError: it holds them in a form that cannot be read.
            CorruptFileError: the files contradict each other.
        """
        ...

    def matrix(self, name: str, layer: str) -> Matrix:
        """Returns the embedding of a layer that has no lookup: the ids of the tower `name` are elsewhere.

        Raises:
            TowerMissingError: no such layer, or it holds a lookup, or not one embedding.
            UnsupportedModelError: it holds it in a form that cannot be read.
            CorruptFileError: the files contradict each other.
        """
        ...

    def embeddings_without_ids(self) -> list[str]:
        """Returns what could be given as `layer` to `matrix`."""
        ...

    def tails(self, layers: Mapping[str, str], without_lookup: Collection[str] = ()) -> dict[str, Tail]:
        """Returns how towers continue after their embeddings, until they meet each other or are returned.

        Args:
            layers: of all towers that are published together: name → layer.
            without_lookup: names of those towers whose layers are as `matrix` takes them.

        Raises:
            TowerMissingError: a layer is no tower, or holds other embeddings that its tower needs.
        """
        ...

    def tower_layers(self) -> list[str]:
        """Returns what could be given as `layer`: all layers that are towers."""
        ...

    def index_layers(self) -> list[str]:
        """Returns those of them that are search indexes: their vectors and ids are those of the items they find."""
        ...

    def close(self) -> None:
        """Closes the files."""
        ...


def special_names(where: str, mask: Any, oov: Any, buckets: Any) -> list[str]:
    """Returns names for the rows before the first id: the mask token, then one row per out-of-vocabulary bucket.

    Args:
        where: the lookup, for a message.
        mask: `mask_token` of its config, whatever JSON holds there, as with the others.
        oov: `oov_token`.
        buckets: `num_oov_indices`.

    Raises:
        CorruptFileError: they are not what Keras writes.
    """
    if type(buckets) is not int or not 0 <= buckets <= _MAX_OOV:
        number = f"{buckets:,}" if type(buckets) is int and abs(buckets) < 1 << 64 else "no sensible number of"
        raise CorruptFileError(f"{where} has {number} out-of-vocabulary rows; log the model again")
    for token in (mask, oov):
        try:
            sensible = type(token) in (str, int, type(None)) and len(str(token).encode()) <= _LONGEST_TOKEN
        except ValueError:  # half a surrogate pair, or an integer of thousands of digits
            sensible = False
        if not sensible:
            raise CorruptFileError(
                f"{where} has a mask or out-of-vocabulary token that is not text of up to {_LONGEST_TOKEN} bytes; "
                "log the model again"
            )
    # Each row has a name of its own, as ids are unique. An empty mask token is Keras's old default, and not an id.
    names = [] if mask is None else [str(mask) or "[MASK]"]
    return names + [str(oov) if bucket == 0 else f"{oov}:{bucket}" for bucket in range(buckets)]
