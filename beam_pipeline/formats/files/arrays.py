"""Arrays in `.npy`, `.npz` and `.safetensors` files: their names, types, shapes and bytes; no value is read.

The formats are public: NumPy's (numpy/lib/_format_impl.py), a zip of such files (numpy.savez), and safetensors' (eight
bytes with the length of a JSON header, the header, then all tensors; huggingface/safetensors/README.md).
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from beam_pipeline.errors import BadVectorError, CorruptFileError, UnsupportedModelError
from beam_pipeline.files import ByteFile, OpenFile
from beam_pipeline.formats.keras.archive import read_directory
from beam_pipeline.formats.model import Checksum, Encoding, Matrix, Vocabulary
from beam_pipeline.formats.protobuf import Span

SUFFIXES = (".npy", ".npz", ".safetensors")

_NPY_MAGIC = b"\x93NUMPY"
_MAX_NPY_HEADER = 10_000
"""Bytes; NumPy's own limit, as parsing a longer one may take too long."""
_MAX_TENSORS_HEADER = 100_000_000
"""Bytes; the limit of safetensors itself."""
_MAX_NAMED = 12

_MATRIX_TYPES = {"f2": "float16", "f4": "float32", "f8": "float64", "bf16": "bfloat16"}
_ID_TYPES = {"i8": Encoding.INT64, "i4": Encoding.INT32}
_TENSOR_TYPES = {"F16": "f2", "F32": "f4", "F64": "f8", "BF16": "bf16", "I64": "i8", "I32": "i4"}
_WIDTHS = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8, "I64": 8, "I32": 4}


@dataclass(frozen=True)
class Array:
    """An array in a file, its values contiguous in C order and little-endian.

    Attributes:
        path: the file.
        name: its name in the file; empty in a file that is one array.
        dtype: NumPy's name of the type without the byte order, such as "f4" or "U12"; "bf16" for bfloat16.
        shape: its dimensions.
        span: its bytes.
        checksum: covers them, if the format has one.
    """

    path: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    span: Span
    checksum: Checksum | None = None

    @property
    def is_matrix(self) -> bool:
        """Whether it can hold vectors."""
        return len(self.shape) == 2 and self.dtype in _MATRIX_TYPES

    @property
    def is_ids(self) -> bool:
        """Whether it can hold ids."""
        return len(self.shape) == 1 and (self.dtype in _ID_TYPES or self.dtype[0] in "US")

    @property
    def where(self) -> str:
        """Its file and name, for a message."""
        return f"{self.path}: array {self.name!r}" if self.name else self.path

    def matrix(self) -> Matrix:
        """Returns it as a matrix whose rows are vectors.

        Raises:
            BadVectorError: it is none.
        """
        if not self.is_matrix:
            raise BadVectorError(
                f"{self.where} has shape {list(self.shape)} and type {self.dtype}, and vectors are a matrix [rows, "
                f"dimension] of {', '.join(sorted(_MATRIX_TYPES.values()))}"
            )
        if not all(self.shape):
            raise BadVectorError(f"{self.where} has shape {list(self.shape)}: there are no vectors in it")
        rows, dimension = self.shape
        return Matrix(self.path, self.span.start, rows, dimension, _MATRIX_TYPES[self.dtype], self.checksum)

    def vocabulary(self, first_row: int) -> Vocabulary:
        """Returns it as the ids of rows from `first_row` on.

        Raises:
            UnsupportedModelError: it is none.
        """
        if not self.is_ids:
            raise UnsupportedModelError(
                f"{self.where} has shape {list(self.shape)} and type {self.dtype}, and ids are a list of integers (i8, "
                "i4) or strings (U, S)"
            )
        encoding = _ID_TYPES.get(self.dtype) or (Encoding.UTF32 if self.dtype[0] == "U" else Encoding.FIXED)
        if not self.shape[0] or self.span.end == self.span.start:
            raise UnsupportedModelError(f"{self.where} has no ids")
        return Vocabulary(self.path, self.span, encoding, first_row, count=self.shape[0], checksum=self.checksum)


def read_arrays(path: str, open_file: OpenFile) -> dict[str, Array]:
    """Returns the arrays of a file by their names; that of a `.npy` file has the name "".

    Raises:
        UnsupportedModelError: an array is compressed, pickled, or in another order.
        CorruptFileError: the file contradicts its format.
    """
    with open_file(path) as file:
        if path.endswith(".safetensors"):
            return _read_safetensors(file)
        if path.endswith(".npz"):
            return _read_npz(file)
        return {"": _read_npy(file, "", Span(0, file.size))}


def choose(arrays: Mapping[str, Array], name: str, what: str, flag: str) -> Array:
    """Returns the array of a name, or the only one that can be what is wanted.

    Args:
        arrays: of one file.
        name: empty if none was named.
        what: "vectors" or "ids".
        flag: what names an array, as in `--vectors item=PATH#NAME`, for a message.

    Raises:
        UnsupportedModelError: there is none, or more than one.
    """
    fitting = [array for array in arrays.values() if (array.is_matrix if what == "vectors" else array.is_ids)]
    if name in arrays and (name or len(arrays) == 1):
        return arrays[name]
    if not name and len(fitting) == 1:
        return fitting[0]
    path = next(iter(arrays.values())).path if arrays else ""
    shown = _named(list(arrays.values()))
    problem = f"has no array {name!r}" if name else f"has {len(fitting)} arrays that may be the {what}"
    raise UnsupportedModelError(f"{path} {problem}, and these: {shown}; name one with {flag}")


def _named(arrays: Sequence[Array]) -> str:
    some = [f"{array.name!r} ({array.dtype} {list(array.shape)})"[:120] for array in arrays[:_MAX_NAMED]]
    return ", ".join(some) + (f" and {len(arrays) - len(some):,} more" if len(arrays) > len(some) else "")


def _read_npz(file: ByteFile) -> dict[str, Array]:
    members = read_directory(file, lambda _: True, ".npz", "use numpy.savez, not savez_compressed")
    found = {}
    for name, member in members.items():
        checksum = Checksum("crc32", member.crc, member.span)
        found[name.removesuffix(".npy")] = _read_npy(file, name.removesuffix(".npy"), member.span, checksum)
    if not found:
        raise UnsupportedModelError(f"{file.path} holds no arrays")
    return found


def _read_npy(file: ByteFile, name: str, span: Span, checksum: Checksum | None = None) -> Array:
    where = f"{file.path}: array {name!r}" if name else file.path
    head = file.read(span.start, min(_MAX_NPY_HEADER + 12, span.end - span.start))
    stream = io.BytesIO(head)
    try:
        version = np.lib.format.read_magic(stream)
        read = {(1, 0): np.lib.format.read_array_header_1_0}.get(version, np.lib.format.read_array_header_2_0)
        shape, is_fortran, dtype = read(stream, max_header_size=_MAX_NPY_HEADER)
    except Exception as error:  # NumPy evaluates the header as a Python literal, and raises what that runs into.
        kind = "no .npy file" if not head.startswith(_NPY_MAGIC) else "not what NumPy writes"
        raise CorruptFileError(f"{where} is {kind} ({error}); log it again") from error
    if dtype.hasobject:
        raise UnsupportedModelError(
            f"{where} holds pickled objects, which would run code when they are read; save strings as such: "
            "numpy.save(path, array.astype(str))"
        )
    if is_fortran and len(shape) > 1:
        raise UnsupportedModelError(
            f"{where} is in Fortran order, column by column; save numpy.ascontiguousarray(array)"
        )
    if dtype.byteorder == ">" or dtype.fields or dtype.subdtype:
        raise UnsupportedModelError(f"{where} has type {dtype}; save floats, integers or strings, little-endian")
    start = span.start + stream.tell()
    shape = _shape(where, shape)
    size = prod(shape) * dtype.itemsize
    if start + size != span.end:
        raise CorruptFileError(
            f"{where} has {span.end - start:,} bytes of values, and {size:,} are {list(shape)} of {dtype}: it is "
            "truncated; log it again"
        )
    return Array(file.path, name, dtype.str[1:], shape, Span(start, span.end), checksum)


def _read_safetensors(file: ByteFile) -> dict[str, Array]:
    length = int.from_bytes(file.read(0, 8), "little") if file.size >= 8 else 0
    if not 2 <= length <= min(_MAX_TENSORS_HEADER, file.size - 8):
        raise CorruptFileError(f"{file.path} is not a safetensors file, or truncated: its header has {length:,} bytes")
    try:
        header = json.loads(file.read(8, length))
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{file.path} is not a safetensors file: its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise CorruptFileError(f"{file.path} is not a safetensors file: its header is not a JSON object")
    header.pop("__metadata__", None)
    base, found = 8 + length, {}
    for name, tensor in header.items():
        where = f"{file.path}: tensor {name[:100]!r}"
        kind, shape, start, end = _tensor(where, tensor)
        if kind not in _TENSOR_TYPES:
            continue  # Neither ids nor vectors.
        if end - start != prod(shape) * _WIDTHS[kind]:
            raise CorruptFileError(
                f"{where} has {end - start:,} bytes, which are not {list(shape)} of {kind}; log it again"
            )
        file.read(base + end, 0)  # Raises if the file ends before.
        found[name] = Array(file.path, name, _TENSOR_TYPES[kind], shape, Span(base + start, base + end))
    if not found:
        raise UnsupportedModelError(f"{file.path} holds no tensor of floats")
    return found


def _tensor(where: str, tensor: Any) -> tuple[str, tuple[int, ...], int, int]:
    """Returns type, shape, start and end as a header of safetensors has them."""
    if not isinstance(tensor, dict) or not isinstance(tensor.get("dtype"), str):
        raise CorruptFileError(f"{where} has no dtype in the header; log it again")
    offsets = tensor.get("data_offsets")
    shape = _shape(where, tensor.get("shape"))
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(each) for each in offsets):
        raise CorruptFileError(f"{where} has no data_offsets in the header; log it again")
    start, end = offsets
    if start > end:
        raise CorruptFileError(f"{where} ends before it starts; log it again")
    return tensor["dtype"], shape, start, end


def _shape(where: str, shape: Any) -> tuple[int, ...]:
    if not isinstance(shape, list | tuple) or len(shape) > 32 or not all(_is_size(each) for each in shape):
        raise CorruptFileError(f"{where} has no sensible shape; log it again")
    return tuple(shape)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63
