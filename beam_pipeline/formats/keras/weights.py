"""The HDF5 file of a `.keras` file, `model.weights.h5`: which objects it has, and where their variables are."""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

from beam_pipeline.errors import ConfigError, CorruptFileError, PipelineError, UnsupportedModelError
from beam_pipeline.files import ByteFile
from beam_pipeline.formats.keras.archive import WEIGHTS, Window
from beam_pipeline.formats.protobuf import Span

_MAX_METADATA = 32 << 20
"""Bytes read of the HDF5 file's own structures."""
_MAX_GROUPS, _LONGEST_PATH, _DEEPEST_PATH = 100_000, 512, 64
_MAX_VALUES = 1000
"""Values of an HDF5 attribute; Keras writes one."""

STRINGS = "strings"
"""Type of a variable of strings, each of its own length; NumPy has no name for it."""


def _bounded(read: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps pyfive's reading of an attribute, which allocates as many values as the file claims before it reads one."""

    @wraps(read)
    def checked(self: Any, kind: Any, data: bytes, count: int, offset: int) -> Any:
        if count > _MAX_VALUES:
            raise ValueError(f"an attribute of {count:,} values")
        return read(self, kind, data, count, offset)

    return checked


@dataclass(frozen=True)
class Dataset:
    """A variable in the HDF5 file.

    Attributes:
        offset: of its first byte in the HDF5 file; None if it is not stored in one piece.
        shape: its dimensions.
        dtype: NumPy's name of the type of its values, or `STRINGS`.
    """

    offset: int | None
    shape: tuple[int, ...]
    dtype: str


class Weights:
    """The names and places in an HDF5 file (`model.weights.h5`).

    Attributes:
        groups: path of each saved object → the layer's name as Keras noted it, "" if it did not.
        base: where in the HDF5 file its addresses count from.
    """

    def __init__(self, file: ByteFile, span: Span) -> None:
        try:
            import pyfive
        except ImportError as error:
            raise ConfigError("pyfive is not installed; pip install 'beam-pipeline[launcher]'") from error
        logging.getLogger("pyfive").setLevel(logging.WARNING)  # It logs every object that it reads.
        # Of the class: pyfive reads a dataset's attributes before it hands the dataset over.
        objects = pyfive.dataobjects.DataObjects
        if not hasattr(objects._attr_value, "__wrapped__"):
            objects._attr_value = _bounded(objects._attr_value)
        self._where = f"{file.path}: {WEIGHTS}"
        self._datasets: dict[str, Dataset] = {}
        self._counts = Counter[str]()
        self.groups: dict[str, str] = {}
        self._sorted: list[str] = []
        try:
            root = pyfive.File(Window(file, span, _MAX_METADATA, WEIGHTS))
            self.base = int(root.userblock_size)
            self._walk(pyfive, root)
        except PipelineError:
            raise
        except Exception as error:  # pyfive raises whatever its parsing runs into.
            reason = str(error).split("\n")[0] or type(error).__name__
            raise CorruptFileError(f"{self._where} cannot be parsed ({reason}); log the model again") from error

    def _walk(self, pyfive: Any, root: Any) -> None:
        queue, seen = [("", root)], set[int]()
        while queue:
            path, group = queue.pop()
            if len(seen) >= _MAX_GROUPS:
                raise CorruptFileError(f"{self._where} has more than {_MAX_GROUPS:,} groups; log the model again")
            address = group._dataobjects.offset
            if address in seen:
                continue
            seen.add(address)
            is_vars = path.rsplit("/", 1)[-1] == "vars"
            if is_vars:
                name = group.attrs.get("name", b"")
                owner = path[: -len("/vars")] if path != "vars" else ""
                name = name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)
                self.groups[owner] = name[:_LONGEST_PATH]
            elif path:
                self._note(path)
            for key in group:
                child = group.get_lazy_view(key)  # Lazy: a chunked dataset's index is not read.
                below = f"{path}/{key}" if path else key
                self._check_path(below)
                if isinstance(child, pyfive.Group):
                    queue.append((below, child))
                elif is_vars and isinstance(child, pyfive.Dataset):
                    plain = child.id.layout_class == 1 and not child.id.filter_pipeline
                    offset = int(child.id.data_offset) + self.base if plain else None
                    self._counts[path] += 1
                    is_text = (child.dtype.metadata or {}).get("vlen") in (bytes, str)
                    dtype = STRINGS if is_text else child.dtype.str
                    self._datasets[below] = Dataset(offset, tuple(int(n) for n in child.shape), dtype)

    def add_group(self, path: str) -> None:
        """Notes a saved object, and those that hold it: one without variables may be nowhere in the HDF5 file."""
        self._check_path(path)
        names = path.split("/")
        for depth in range(1, len(names) + 1):
            self._note("/".join(names[:depth]))

    def _note(self, path: str) -> None:
        if len(self.groups) >= _MAX_GROUPS:
            raise CorruptFileError(f"{self._where} has more than {_MAX_GROUPS:,} groups; log the model again")
        self.groups.setdefault(path, "")

    def _check_path(self, path: str) -> None:
        if len(path) > _LONGEST_PATH or path.count("/") > _DEEPEST_PATH:
            raise CorruptFileError(f"{self._where} has an object {path[:100]!r}… of {len(path):,} characters")

    def below(self, path: str) -> list[str]:
        """Returns the paths of all objects inside of one."""
        if len(self._sorted) != len(self.groups):
            self._sorted = sorted(self.groups)
        prefix = f"{path}/" if path else ""
        # "0" comes after "/".
        end = bisect_left(self._sorted, f"{path}0") if path else len(self._sorted)
        return [one for one in self._sorted[bisect_left(self._sorted, prefix) : end] if one != path]

    def count(self, path: str) -> int:
        """Returns the number of variables of a layer."""
        return self._counts[f"{path}/vars" if path else "vars"]

    def width(self, path: str) -> int:
        """Returns the last dimension of a layer's first variable, or of its first matrix; 0 if it has none."""
        matrices = (each.shape for each in self.variables(path) if len(each.shape) == 2)
        return next(matrices, self._shape(path) or (0,))[-1]

    def is_table(self, path: str) -> bool:
        """Whether a layer's only variable has two dimensions."""
        return self.count(path) == 1 and len(self._shape(path)) == 2

    def _shape(self, path: str) -> tuple[int, ...]:
        dataset = self._datasets.get(f"{path}/vars/0")
        return dataset.shape if dataset else ()

    def variables(self, path: str) -> list[Dataset]:
        """Returns all variables of a layer."""
        names = (f"{path}/vars/{number}" if path else f"vars/{number}" for number in range(self.count(path)))
        return [self._datasets[name] for name in names if name in self._datasets]

    def variable(self, path: str, where: str) -> tuple[int, Dataset]:
        """Returns a layer's first variable, which is stored in one piece, and its offset in the HDF5 file."""
        name = f"{path}/vars/0"
        if name not in self._datasets:
            raise CorruptFileError(f"{where} is in config.json, but {WEIGHTS} has no {name}; was the model built?")
        return require_offset(self._datasets[name], where), self._datasets[name]


def require_offset(dataset: Dataset, where: str) -> int:
    """Returns where a variable is in the HDF5 file.

    Raises:
        UnsupportedModelError: it is not stored in one piece.
    """
    if dataset.offset is None:
        raise UnsupportedModelError(
            f"{where} is stored in chunks or compressed, which Keras does not do; save it again"
        )
    return dataset.offset
