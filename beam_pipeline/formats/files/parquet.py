"""Parquet files: found, opened, and read row group by row group where two columns are an id and its vector, or its row.

pyarrow reads them, through a file of byte ranges. What the footer says of sizes and counts is checked before a column
is read; a column is then decoded some rows at a time, so that memory does not depend on the size of a row group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from beam_pipeline.errors import (
    ArtifactMissingError,
    BadIdError,
    BadVectorError,
    ChecksumError,
    CorruptFileError,
    PipelineError,
    UnsupportedModelError,
)
from beam_pipeline.files import OpenFile
from beam_pipeline.formats.encodings import shown
from beam_pipeline.formats.files.footer import Group, Leaf, read_groups
from beam_pipeline.formats.model import RowGroup, Table, VectorTable

ListFolder = Callable[[str], Sequence[str]]
"""How the names of the files in a folder are listed."""

ID_COLUMNS = ("id", "{tower}_id")
ROW_COLUMNS = ("row", "index")
VECTOR_COLUMNS = ("vector", "embedding", "{tower}_vector", "{tower}_embedding")

_SUFFIXES = (".parquet", ".parq")
_MAX_FOOTER = 16 << 20
_MAX_FILES, _MAX_GROUPS = 100_000, 1_000_000
_MAX_DIMENSION = 1 << 20
_MAX_NAMED = 12
_BUFFER = 1 << 20
_SMALL = 64 << 20
"""Bytes of a file whose columns are read at once. Of a larger one pages are read, each as large as its header says."""
_LEVELS = 4
"""Bytes that a value may take besides itself, in levels and in the headers of pages."""
_SLACK = 1 << 20
_TEXTS = (pa.string(), pa.large_string(), pa.binary(), pa.large_binary())
_TYPES = {pa.float32(): "float32", pa.float64(): "float64", pa.float16(): "float16"}


def is_parquet(path: str) -> bool:
    """Whether a path names Parquet files: one, a folder of them, or a pattern."""
    last = path.rstrip("/").rpartition("/")[2]
    return last.endswith(_SUFFIXES) or "*" in last or "." not in last


def find_files(path: str, list_folder: ListFolder) -> list[str]:
    """Returns the Parquet files that a path names: itself, those in a folder, or those that match a pattern.

    Args:
        path: local or `gs://`; a pattern has `*` or `?` in its last part.
        list_folder: lists the names in a folder.

    Raises:
        ArtifactMissingError: there are none.
        UnsupportedModelError: there are too many, or the pattern is of folders.
    """
    last = path.rstrip("/").rpartition("/")[2]
    folder = path.rstrip("/").removesuffix(last)
    if _is_pattern(folder):
        raise UnsupportedModelError(f"{path}: * and ? are for names of files, not for {folder}; name one folder")
    if _is_pattern(last):
        pattern = last.replace("[", "[[]")
        names = [name for name in list_folder(folder.rstrip("/") or folder or ".") if fnmatchcase(name, pattern)]
    elif last.endswith(_SUFFIXES) and not list_folder(path):
        return [path]
    else:
        folder = f"{path.rstrip('/')}/"
        names = [name for name in list_folder(path.rstrip("/")) if name.endswith(_SUFFIXES)]
    # Spark and others note what is no data in such names.
    names = sorted(name for name in names if not name.startswith(("_", ".")))
    if not names:
        raise ArtifactMissingError(f"{path} names no Parquet files (*.parquet)")
    if len(names) > _MAX_FILES:
        raise UnsupportedModelError(
            f"{path} names {len(names):,} files, more than {_MAX_FILES:,}; write fewer and larger ones"
        )
    return [f"{folder}{name}" for name in names]


def _is_pattern(path: str) -> bool:
    return "*" in path or "?" in path


def find_vectors(
    path: str, tower: str, columns: tuple[str, str] | None, open_file: OpenFile, list_folder: ListFolder
) -> VectorTable:
    """Returns where the ids and vectors of a tower are in Parquet files.

    Args:
        path: a file, a folder, or a pattern.
        tower: its name.
        columns: names of the columns of ids and of vectors; without them, those that are called so.
        open_file: opens a file.
        list_folder: lists the names in a folder.

    Raises:
        UnsupportedModelError: there are no such columns, or of another type.
        BadVectorError: the vectors have no length, or different ones.
        CorruptFileError: a file contradicts its format.
    """
    found: list[tuple[str, tuple[int, ...]]] = []
    first: tuple[str, str, int, str] | None = None
    for file_path in find_files(path, list_folder):
        with opened(file_path, open_file) as file:
            names = columns or _columns(file_path, file, tower, VECTOR_COLUMNS, "--vectors", "VECTORS")
            _require_id_column(file_path, file, names[0])
            dtype = _vector_type(file_path, file, names[1])
            counts: tuple[int, ...] = row_counts(file_path, file)
            if first is None and any(counts):
                dimension = _dimension(file_path, file, names[1])
                first = (*names, dimension, dtype)
            if first is not None:
                if (*names, dtype) != (*first[:2], first[3]):
                    raise BadVectorError(
                        f"{file_path} has vectors of {dtype} in {names[1]!r}, the files before it {first[3]} in "
                        f"{first[1]!r}"
                    )
                _require_lengths(file_path, file, (names[0], names[1]), first[2], dtype)
            found.append((file_path, counts))
    if first is None:
        raise BadVectorError(f"{path} has no rows")
    return VectorTable(path, _bounded(path, found), first[0], first[1], first[2], first[3])


def find_rows(
    path: str, tower: str, columns: tuple[str, str] | None, open_file: OpenFile, list_folder: ListFolder
) -> Table:
    """Returns where the ids of a tower, and the row of each, are in Parquet files; arguments as `find_vectors`.

    Raises:
        UnsupportedModelError: there are no such columns, or of another type.
        CorruptFileError: a file contradicts its format.
    """
    found: list[tuple[str, tuple[int, ...]]] = []
    first: tuple[str, str] | None = None
    for file_path in find_files(path, list_folder):
        with opened(file_path, open_file) as file:
            names = columns or _columns(file_path, file, tower, ROW_COLUMNS, "--ids", "ROWS")
            _require_id_column(file_path, file, names[0])
            kind = file.parquet.schema_arrow.field(_index(file_path, file, names[1])).type
            if not pa.types.is_integer(kind):
                raise UnsupportedModelError(
                    f"{file_path}: column {names[1]!r} has type {kind}, and a row is an integer"
                )
            first = first or names
            if names != first:
                raise UnsupportedModelError(f"{file_path} has columns {names}, the files before it {first}")
            found.append((file_path, row_counts(file_path, file)))
    if first is None or not any(any(counts) for _, counts in found):
        raise BadIdError(f"{path} has no rows: no ids")
    return Table(path, _bounded(path, found), *first)


def read_vectors(
    table: VectorTable, group: RowGroup, rows: int, open_file: OpenFile
) -> Iterator[tuple[pa.Array, np.ndarray]]:
    """Yields ids and vectors of a row group, some rows at a time: Arrow binary [n], and a matrix [n, dimension].

    Args:
        table: which columns.
        group: which rows.
        rows: the most of a batch.
        open_file: opens the file.

    Raises:
        BadIdError: an id is NULL.
        BadVectorError: a vector is NULL, has a NULL in it, or another length; its id is named.
        ChecksumError: a page does not match its checksum.
        CorruptFileError: the file contradicts its format, or is another one than before.
    """
    for at, ids, values in _batches(table, group, rows, open_file):
        _require(ids, values.is_valid(), group, at, "NULL instead of a vector")
        if not pa.types.is_fixed_size_list(values.type):
            lengths = pc.list_value_length(values)
            fits = pc.equal(lengths, table.dimension)
            if not pc.all(fits).as_py():
                length = lengths[int(np.flatnonzero(~fits.to_numpy(zero_copy_only=False))[0])]
                problem = f"a vector of {length} values, and others have {table.dimension:,}"
                _require(ids, fits, group, at, problem)
        flat = values.flatten()
        if len(flat) != len(ids) * table.dimension:
            raise CorruptFileError(f"{group.path}: row group {group.number} is not as its footer says; write it again")
        if flat.null_count:
            valid = flat.is_valid().to_numpy(zero_copy_only=False).reshape(-1, table.dimension).all(axis=1)
            _require(ids, pa.array(valid), group, at, "a vector with NULL in it")
        yield ids, flat.to_numpy(zero_copy_only=False).reshape(-1, table.dimension)


def read_rows(table: Table, group: RowGroup, rows: int, open_file: OpenFile) -> Iterator[tuple[np.ndarray, pa.Array]]:
    """Yields rows and ids of a row group, as int64 [n] and Arrow binary [n]; raises as `read_vectors`."""
    for at, ids, values in _batches(table, group, rows, open_file):
        _require(ids, values.is_valid(), group, at, "NULL instead of a row", BadIdError)
        try:
            yield values.cast(pa.int64()).to_numpy(), ids
        except pa.ArrowInvalid as error:
            raise BadIdError(f"{group.path}: a row beyond 64 bits ({error})") from error


def _batches(table: Table, group: RowGroup, rows: int, open_file: OpenFile) -> Iterator[tuple[int, pa.Array, pa.Array]]:
    """Yields (rows before them, ids, values) of a row group."""
    at = 0
    with opened(group.path, open_file) as file:
        if group.number >= len(file.groups) or file.groups[group.number].rows != group.rows:
            raise CorruptFileError(
                f"{group.path}: row group {group.number} has no longer {group.rows:,} rows: the file changed since the "
                "job started"
            )
        batches = file.parquet.iter_batches(
            batch_size=rows,
            row_groups=[group.number],
            columns=[table.id_column, table.value_column],
            use_threads=False,
        )
        for batch in batches:
            ids = batch.column(table.id_column)
            if pa.types.is_dictionary(ids.type):
                ids = ids.dictionary_decode()
            if ids.null_count:
                null = at + int(np.flatnonzero(ids.is_null().to_numpy(zero_copy_only=False))[0])
                raise BadIdError(f"{group.path}: the id of row {null:,} in row group {group.number} is NULL; remove it")
            if pa.types.is_integer(ids.type):
                ids = ids.cast(pa.string())
            yield at, ids.cast(pa.binary()), batch.column(table.value_column)
            at += len(batch)
    if at != group.rows:
        raise CorruptFileError(
            f"{group.path}: row group {group.number} has {at:,} rows, its footer says {group.rows:,}; write it again"
        )


class File(NamedTuple):
    """An open Parquet file, and the row groups that its footer describes.

    Attributes:
        parquet: reads it.
        groups: what the footer says of them.
    """

    parquet: pq.ParquetFile
    groups: list[Group]


@contextmanager
def opened(path: str, open_file: OpenFile) -> Iterator[File]:
    """Opens a Parquet file; what pyarrow raises while it is open becomes an error that names the file.

    Raises:
        ChecksumError: a page does not match its checksum.
        CorruptFileError: the file contradicts its format.
        UnsupportedModelError: it is encrypted, or its footer is too large.
    """
    with open_file(path) as source:
        if source.size < 12 or source.read(source.size - 4, 4) not in (b"PAR1", b"PARE"):
            raise CorruptFileError(f"{path} is not a Parquet file, or truncated; write it again")
        if source.read(source.size - 4, 4) == b"PARE":
            raise UnsupportedModelError(f"{path} is encrypted, and cannot be read")
        if (footer := int.from_bytes(source.read(source.size - 8, 4), "little")) > _MAX_FOOTER:
            raise UnsupportedModelError(
                f"{path} has a footer of {footer:,} bytes, more than {_MAX_FOOTER:,}: larger row groups make it smaller"
            )
        groups = read_groups(path, source.read(source.size - 8 - footer, footer) if footer <= source.size - 8 else b"")
        try:
            # Not pre-buffered, which would read whole columns of a row group at once.
            with pq.ParquetFile(
                source.stream(),
                pre_buffer=False,
                buffer_size=0 if source.size <= _SMALL else _BUFFER,
                page_checksum_verification=True,
                thrift_string_size_limit=_MAX_FOOTER,
                thrift_container_size_limit=_MAX_GROUPS,
            ) as parquet:
                if parquet.num_row_groups != len(groups):
                    raise CorruptFileError(f"{path} cannot be read as Parquet (its footer is damaged); write it again")
                yield File(parquet, groups)
        except PipelineError:
            raise
        except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            if "CRC" in reason:
                raise ChecksumError(
                    f"{path}: a page does not match its checksum ({reason}); the file is damaged: write it again"
                ) from error
            raise CorruptFileError(f"{path} cannot be read as Parquet ({reason}); write it again") from error


def row_counts(path: str, file: File) -> tuple[int, ...]:
    """Returns the rows of each row group."""
    counts, total = tuple(group.rows for group in file.groups), file.parquet.metadata.num_rows
    if any(count < 0 for count in counts) or sum(counts) != total:
        raise CorruptFileError(f"{path}: its row groups have {sum(counts):,} rows, its footer says {total:,}")
    return counts


def _bounded(path: str, files: list[tuple[str, tuple[int, ...]]]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Returns the files; raises if a job would have more row groups than it can pass on."""
    if (groups := sum(len(counts) for _, counts in files)) > _MAX_GROUPS:
        raise UnsupportedModelError(f"{path} has {groups:,} row groups, more than {_MAX_GROUPS:,}; write larger ones")
    return tuple(files)


def _columns(path: str, file: File, tower: str, values: Sequence[str], flag: str, metavar: str) -> tuple[str, str]:
    """Returns the names of the columns of ids and of values, if the file has one of each that is called so."""
    names, remedy = file.parquet.schema_arrow.names, f"name them with {flag} {tower}=PATH#ID,{metavar}"
    ids, others = (
        names[only_column(path, names, [name.format(tower=tower) for name in wanted], "its columns are", remedy)]
        for wanted in (ID_COLUMNS, values)
    )
    return ids, others


def only_column(path: str, names: Sequence[str], wanted: Sequence[str], place: str, remedy: str) -> int:
    """Returns the position of the only column that has one of the wanted names.

    Args:
        path: of the file, for messages.
        names: of all columns.
        wanted: what it may be called.
        place: where the names are, for messages.
        remedy: what helps, for messages.

    Raises:
        UnsupportedModelError: there is none, or more than one.
    """
    fitting = [position for position, name in enumerate(names) if name in wanted]
    if len(fitting) != 1:
        found = ", ".join(repr(name[:100]) for name in names[:_MAX_NAMED]) or "none"
        raise UnsupportedModelError(
            f"{path} has {len(fitting)} columns named {' or '.join(wanted)}; {place} {found}: {remedy}"
        )
    return fitting[0]


def _index(path: str, file: File, column: str) -> int:
    """Returns the position of a column, which has to be there once."""
    there = [position for position, name in enumerate(file.parquet.schema_arrow.names) if name == column]
    if len(there) != 1:
        names = ", ".join(repr(name[:100]) for name in file.parquet.schema_arrow.names[:_MAX_NAMED])
        raise UnsupportedModelError(f"{path} has {len(there)} columns {column!r}; its columns are {names}")
    return there[0]


def _require_id_column(path: str, file: File, column: str) -> None:
    kind = file.parquet.schema_arrow.field(_index(path, file, column)).type
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    if plain not in _TEXTS and not pa.types.is_integer(plain):
        raise UnsupportedModelError(f"{path}: column {column!r} has type {kind}, and an id is a string or an integer")


def _vector_type(path: str, file: File, column: str) -> str:
    """Returns the type of a vector's values."""
    kind = file.parquet.schema_arrow.field(_index(path, file, column)).type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not is_list or kind.value_type not in _TYPES:
        raise UnsupportedModelError(f"{path}: column {column!r} has type {kind}, and a vector is a list of floats")
    return _TYPES[kind.value_type]


def find_leaf(path: str, file: File, group: int, column: str) -> Leaf:
    """Returns what the footer says of the values of a column in a row group."""
    found = [leaf for leaf in file.groups[group].leaves if leaf.path == column or leaf.path.startswith(f"{column}.")]
    if len(found) != 1:
        raise CorruptFileError(f"{path}: row group {group} has {len(found)} columns {column!r}; write it again")
    return found[0]


def _dimension(path: str, file: File, column: str) -> int:
    """Returns the length of the first vector."""
    kind = file.parquet.schema_arrow.field(column).type
    if pa.types.is_fixed_size_list(kind):
        dimension = int(kind.list_size)
    else:
        group = next(number for number, one in enumerate(file.groups) if one.rows)
        leaf, rows = find_leaf(path, file, group, column), file.groups[group].rows
        if not 0 < leaf.values <= rows * _MAX_DIMENSION:
            raise BadVectorError(f"{path}: row group {group} has {leaf.values:,} values in {rows:,} vectors")
        # What most have; the one that differs is named when its row group is read.
        dimension = max(1, round(leaf.values / rows))
    if not 0 < dimension <= _MAX_DIMENSION:
        raise BadVectorError(
            f"{path}: column {column!r} has vectors of {dimension:,} values; BigQuery loads 1 to {_MAX_DIMENSION:,}"
        )
    return dimension


def _require_lengths(path: str, file: File, columns: tuple[str, str], dimension: int, dtype: str) -> None:
    """Raises if the footer has more or fewer values in a row group than its vectors, or more bytes than these take."""
    width = np.dtype(dtype).itemsize
    for number, group in enumerate(file.groups):
        leaf = find_leaf(path, file, number, columns[1])
        values = group.rows * dimension
        if leaf.values != values:
            _name_length(path, file, number, columns, leaf.values, dimension)
        if not 0 <= leaf.size <= values * (width + _LEVELS) + _SLACK:
            raise CorruptFileError(
                f"{path}: row group {number} has {leaf.size:,} bytes for {values:,} values of {dtype}; write it again"
            )


def _name_length(path: str, file: File, number: int, columns: tuple[str, str], values: int, dimension: int) -> None:
    """Raises BadVectorError for a row group with another number of values, and names an id if it is cheap to find."""
    rows = file.groups[number].rows
    if 0 < values <= 2 * rows * dimension:
        for batch in file.parquet.iter_batches(
            batch_size=1024, row_groups=[number], columns=[*columns], use_threads=False
        ):
            lengths = pc.fill_null(pc.list_value_length(batch.column(columns[1])), -1)
            other = np.flatnonzero(lengths.to_numpy(zero_copy_only=False) != dimension)
            if other.size:
                at = int(other[0])
                name, length = batch.column(columns[0])[at].as_py(), lengths[at].as_py()
                what = "NULL instead of a vector" if length < 0 else f"a vector of {length:,} values"
                name = name if isinstance(name, bytes) else str(name).encode("utf-8", "surrogatepass")
                raise BadVectorError(f"{path}: id {shown(name)} has {what}, and others have {dimension:,}")
    raise BadVectorError(
        f"{path}: row group {number} has {values:,} values in {rows:,} vectors, which others have {dimension:,} each"
    )


def _require(
    ids: pa.Array, fits: pa.Array, group: RowGroup, at: int, problem: str, error: type[PipelineError] = BadVectorError
) -> None:
    """Raises an error that names the first id that does not fit."""
    wrong = np.flatnonzero(~fits.to_numpy(zero_copy_only=False))
    if wrong.size:
        first = int(wrong[0])
        more = f" (and {wrong.size - 1:,} more of {len(ids):,})" if wrong.size > 1 else ""
        raise error(
            f"{group.path}: id {shown(ids[first].as_py())} (row {at + first:,} of row group {group.number}) has "
            f"{problem}{more}"
        )
