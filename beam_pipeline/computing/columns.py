"""The columns that a tower is called with: checked against its signature, and turned into what TensorFlow takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from beam_pipeline.computing.signature import Input, Signature
from beam_pipeline.errors import BadIdError, FeaturesError
from beam_pipeline.formats.encodings import shown

_INTEGERS = {"int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"}
_FLOATS = {"float16", "bfloat16", "float32", "float64"}


@dataclass(frozen=True)
class Columns:
    """Which column is which input of a tower.

    Attributes:
        tower: the tower's name.
        id_column: the column that names the rows.
        names: the column of each input, in the order of the signature.
        inputs: the inputs.
    """

    tower: str
    id_column: str
    names: tuple[str, ...]
    inputs: tuple[Input, ...]

    @property
    def all(self) -> tuple[str, ...]:
        """Every column, the id first, each once."""
        return tuple(dict.fromkeys((self.id_column, *self.names)))


def id_column(tower: str) -> str:
    """Returns the name of a tower's id column, as in the destination."""
    return f"{tower}_id"


def of_ids(tower: str, signature: Signature) -> Columns:
    """Returns the columns of a tower that is called with ids alone.

    Raises:
        FeaturesError: it takes more than an id.
    """
    column = id_column(tower)
    if len(signature.inputs) != 1 or signature.inputs[0].shape not in ((), (1,)):
        raise FeaturesError(
            f"tower {tower!r} takes {', '.join(map(str, signature.inputs))}, not an id alone; give the columns "
            f"{', '.join(dict.fromkeys([column, *(each.name for each in signature.inputs)]))}: "
            f"--features {tower}=QUERY or --features {tower}=gs://…/*.parquet"
        )
    return Columns(tower, column, (column,), signature.inputs)


def bind(tower: str, signature: Signature, schema: pa.Schema, source: str) -> Columns:
    """Returns which column of a table of features is which input.

    The id column is named as in the destination. It is an input too if the tower has one of that name, or takes a
    single input and the table has no other column. The column of a single input may have any name.

    Args:
        tower: its name.
        signature: what it takes.
        schema: the table's columns.
        source: what the table is, for messages.

    Raises:
        FeaturesError: a column is missing, unknown, given twice, or of a type or shape that does not fit.
    """
    column, where = id_column(tower), f"the features of tower {tower!r} ({source})"
    if doubles := sorted({name for name in schema.names if schema.names.count(name) > 1}):
        raise FeaturesError(f"{where} have the column {doubles[0]!r} twice")
    if column not in schema.names:
        raise FeaturesError(
            f"{where} have no column {column!r}, which names the rows; they have {', '.join(schema.names) or 'none'}"
        )
    others = [name for name in schema.names if name != column]
    if len(signature.inputs) == 1 and len(others) <= 1 and signature.inputs[0].name != column:
        names: tuple[str, ...] = (others[0] if others else column,)
    else:
        names = tuple(each.name for each in signature.inputs)
    wanted = ", ".join(dict.fromkeys((column, *(str(each) for each in signature.inputs if each.name != column))))
    if missing := [name for name in names if name not in schema.names]:
        raise FeaturesError(f"{where} lack the column {missing[0]!r}; the tower takes {wanted}")
    if extra := [name for name in others if name not in names]:
        raise FeaturesError(
            f"{where} have the column {extra[0]!r}, which is not an input of the tower; it takes {wanted}"
        )
    for name, each in zip(names, signature.inputs, strict=True):
        if problem := _misfit(schema.field(name).type, each):
            raise FeaturesError(f"{where}: column {name!r} {problem}")
    kind = schema.field(column).type
    if not (_is_text(kind) or pa.types.is_integer(kind)):
        raise FeaturesError(f"{where}: column {column!r} is {kind}, and an id is a string or an integer: CAST it")
    return Columns(tower, column, names, signature.inputs)


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    is_any = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    return any(check(kind) for check in is_any)


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _misfit(kind: pa.DataType, each: Input) -> str:
    """Returns what is wrong with a column's type for an input; nothing if it fits."""
    value = kind.value_type if _is_list(kind) else kind
    if _is_list(kind) and not each.shape:
        return f"is a list ({kind}), and the tower takes one {each.dtype} for each row"
    if not _is_list(kind) and each.shape not in ((), (1,)):
        length = "any number of" if each.shape[0] is None else f"{each.shape[0]:,}"
        return f"is not a list ({kind}), and the tower takes {length} values of {each.dtype} for each row"
    fits = (
        (each.dtype == "string" and _is_text(value))
        or (each.dtype in _INTEGERS and pa.types.is_integer(value))
        or (each.dtype in _FLOATS and (pa.types.is_integer(value) or pa.types.is_floating(value)))
        or (each.dtype == "bool" and pa.types.is_boolean(value))
    )
    return "" if fits else f"is {kind}, and the tower takes {each.dtype}: CAST it"


def ids_of(table: pa.RecordBatch, columns: Columns) -> pa.Array:
    """Returns the ids of a table's rows as strings; an integer is its decimal digits.

    Raises:
        FeaturesError: an id is NULL.
        BadIdError: an id is empty or not UTF-8.
    """
    names = table.column(columns.id_column)
    if names.null_count:
        raise FeaturesError(
            f"tower {columns.tower!r}: {columns.id_column} is NULL in {names.null_count:,} of {len(names):,} rows of "
            "features; leave them out (WHERE … IS NOT NULL)"
        )
    if pa.types.is_dictionary(names.type):
        names = names.dictionary_decode()
    try:
        text = names.cast(pa.string())
    except pa.ArrowInvalid as error:
        for name in names.to_pylist():
            try:
                name.decode()
            except UnicodeDecodeError:
                raise BadIdError(
                    f"tower {columns.tower!r}: id {shown(name)} is not UTF-8, which BigQuery requires; encode the ids"
                ) from error
        raise
    if pc.any(pc.equal(pc.binary_length(text), 0)).as_py():
        raise BadIdError(f"tower {columns.tower!r}: an id is empty; leave it out")
    return text


def arrays(table: pa.RecordBatch, columns: Columns, ids: pa.Array) -> Iterator[tuple[np.ndarray | None, list[Any]]]:
    """Yields what the tower is called with: rows of the table (None: all), and an array for each input.

    Lists of any length go in as one array, so those of one length at a time: padding would change what is computed.

    Args:
        table: rows of features.
        columns: which column is which input.
        ids: of the rows, for messages.

    Raises:
        FeaturesError: a value is NULL, or a list has another length than the input; named by the id.
    """
    values = [
        _checked(table, name, each, ids, columns) for name, each in zip(columns.names, columns.inputs, strict=True)
    ]
    keys = [
        pc.list_value_length(column).to_numpy(zero_copy_only=False).astype(np.int64)
        for column, each in zip(values, columns.inputs, strict=True)
        if each.shape == (None,) and not each.is_ragged
    ]
    if not keys:
        yield None, _converted(values, columns, ids)
        return
    _, groups = np.unique(np.stack(keys, 1), axis=0, return_inverse=True)
    groups = groups.reshape(-1)
    count = int(groups.max()) + 1 if len(groups) else 0
    if count == 1:
        yield None, _converted(values, columns, ids)
        return
    for group in range(count):
        rows = np.flatnonzero(groups == group)
        taken = pa.array(rows)
        yield rows, _converted([column.take(taken) for column in values], columns, ids.take(taken))


def _checked(table: pa.RecordBatch, name: str, each: Input, ids: pa.Array, columns: Columns) -> pa.Array:
    column = table.column(name)
    if column.null_count:
        row = pc.index(pc.is_null(column), True).as_py()
        problem = f"{name} is NULL, and the tower has nothing to take instead; leave the row out, or COALESCE it"
        raise _bad(columns, ids, row, problem)
    if not _is_list(column.type):
        return column
    if pa.types.is_fixed_size_list(column.type):
        column = column.cast(pa.list_(column.type.value_type))
    if column.flatten().null_count:
        row = next(at for at, value in enumerate(column.to_pylist()) if None in value)
        raise _bad(columns, ids, row, f"{name} holds a NULL")
    wanted = each.shape[0]
    if wanted is not None:
        lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False)
        wrong = np.flatnonzero(lengths != wanted)
        if wrong.size:
            problem = f"{name} has {lengths[wrong[0]]:,} values, and the tower takes {wanted:,}"
            raise _bad(columns, ids, int(wrong[0]), problem)
    return column


def _converted(values: Sequence[pa.Array], columns: Columns, ids: pa.Array) -> list[Any]:
    result: list[Any] = []
    for column, name, each in zip(values, columns.names, columns.inputs, strict=True):
        is_list = _is_list(column.type)
        flat = _numpy(column.flatten() if is_list else column, name, each, columns, ids if not is_list else None)
        if each.is_ragged:
            lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False)
            result.append((flat, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)))
        else:
            result.append(flat.reshape(len(column), -1) if each.shape else flat)
    return result


def _numpy(column: pa.Array, name: str, each: Input, columns: Columns, ids: pa.Array | None) -> np.ndarray:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if each.dtype == "string":
        try:
            found: np.ndarray = column.to_numpy(zero_copy_only=False)
        except pa.ArrowException as error:
            raise _not_text(column, name, columns, ids) from error
        return found
    numbers: np.ndarray = column.to_numpy(zero_copy_only=False)
    if each.dtype in _INTEGERS and numbers.dtype != each.dtype:  # NumPy would wrap numbers around without a word.
        limits = np.iinfo(each.dtype)
        beyond = np.flatnonzero((numbers < limits.min) | (numbers > limits.max))
        if beyond.size:
            problem = f"{name} is {numbers[beyond[0]]:,}, and the tower takes {each.dtype}"
            if ids is None:
                raise FeaturesError(f"tower {columns.tower!r}: {problem}")
            raise _bad(columns, ids, int(beyond[0]), problem)
    # NumPy has no bfloat16: TensorFlow rounds to it.
    return numbers.astype("float32" if each.dtype == "bfloat16" else each.dtype, copy=False)


def _not_text(column: pa.Array, name: str, columns: Columns, ids: pa.Array | None) -> FeaturesError:
    """Returns an error that shows the first text that is not UTF-8, and names its id if that is known."""
    problem = f"{name} cannot be read as text"
    for row, value in enumerate(column.cast(pa.binary()).to_pylist()):
        try:
            value.decode()
        except UnicodeDecodeError:
            problem = f"{name} is {shown(value)}, which is not UTF-8; make the column BYTES, or encode it"
            if ids is not None:
                return _bad(columns, ids, row, problem)
            break
    return FeaturesError(f"the features of tower {columns.tower!r}: {problem}")


def _bad(columns: Columns, ids: pa.Array, row: int, problem: str) -> FeaturesError:
    return FeaturesError(f"the features of tower {columns.tower!r}: for id {ids[row].as_py()!r}, {problem}")
