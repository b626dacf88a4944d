"""The containers of a `.keras` file: the members of the zip, and what is where in its HDF5 file, `model.weights.h5`."""

from __future__ import annotations

import logging
import zipfile
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, BinaryIO, cast

from beam_pipeline.errors import ConfigError, CorruptFileError, NotAModelError, PipelineError, UnsupportedModelError
from beam_pipeline.files import ByteFile
from beam_pipeline.formats.protobuf import Span

CONFIG, WEIGHTS, METADATA = "config.json", "model.weights.h5", "metadata.json"
_MAX_DIRECTORY = 8 << 20
"""Bytes read of the zip's directory: 100,000 members, each of which takes half a kilobyte of memory."""
_MAX_METADATA = 32 << 20
"""Bytes read of the HDF5 file's own structures."""
_MAX_GROUPS, _LONGEST_PATH, _DEEPEST_PATH = 100_000, 512, 64
_MAX_VALUES = 1000
"""Values of an HDF5 attribute; Keras writes one."""


def joined(*names: str) -> str:
    """Joins a path; the model itself has the path ""."""
    return "/".join(names[1:] if not names[0] else names)


@dataclass(frozen=True)
class Member:
    """A member of the zip: where its bytes are in the file, and their CRC-32."""

    span: Span
    crc: int


class _Window:
    """A part of a file as a file object of its own, which gives up after so many bytes: nothing grows without bound."""

    def __init__(self, file: ByteFile, span: Span, budget: int, what: str) -> None:
        self._file = file
        self._span = span
        self._budget = budget
        self._what = what
        self._at = 0

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        size = self._span.end - self._span.start
        self._at = offset + {0: 0, 1: self._at, 2: size}[whence]
        if self._at < 0:
            raise OSError(f"seek to {self._at}")
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, length: int = -1) -> bytes:
        left = max(0, self._span.end - self._span.start - self._at)
        length = left if length < 0 else min(length, left)
        self._budget -= length + 16  # An empty read counts, too.
        if self._budget < 0:
            raise CorruptFileError(f"{self._file.path}: its {self._what} is too large to be true; log the model again")
        data = self._file.read(self._span.start + self._at, length) if length else b""
        self._at += length
        return data


def is_of_keras(name: str) -> bool:
    """Whether a member of a `.keras` file is read."""
    is_vocabulary = name.startswith("assets/") and name.endswith("/vocabulary.txt")
    return name in (CONFIG, WEIGHTS, METADATA) or is_vocabulary


def read_directory(
    file: ByteFile,
    is_wanted: Callable[[str], bool] = is_of_keras,
    kind: str = ".keras",
    remedy: str = "use model.save()",
) -> dict[str, Member]:
    """Returns the members of a zip.

    Args:
        file: the zip.
        is_wanted: which members, by their names.
        kind: what the zip is, for a message.
        remedy: how a zip is made that is not compressed.

    Raises:
        NotAModelError: it is no zip.
        UnsupportedModelError: a member that is needed is compressed.
        CorruptFileError: a member is not where the directory says.
    """
    window = _Window(file, Span(0, file.size), _MAX_DIRECTORY, "directory")
    try:
        with zipfile.ZipFile(cast(BinaryIO, window)) as archive:
            infos = archive.infolist()
    except PipelineError:
        raise
    except Exception as error:  # `zipfile` raises what its parsing runs into.
        raise NotAModelError(f"{file.path} is no {kind} file ({error}); log it again") from error
    members = {}
    for info in infos:
        name = info.filename
        if not is_wanted(name):
            continue
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise UnsupportedModelError(
                f"{file.path}: {name} is compressed or encrypted, so it cannot be read in parts; {remedy}"
            )
        # The local header (APPNOTE.TXT, 4.3.7) has an extra field of its own, of another length than the directory's.
        head = file.read(info.header_offset, 30)
        start = info.header_offset + 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
        if head[:4] != b"PK\x03\x04" or info.file_size != info.compress_size or start + info.file_size > file.size:
            raise CorruptFileError(f"{file.path}: {name} is not where the zip's directory says; log the model again")
        members[name] = Member(Span(start, start + info.file_size), info.CRC)
    return members


def _short(read: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps pyfive's reading of an attribute, which allocates as many values as the file says before it reads one."""

    @wraps(read)
    def checked(self: Any, kind: Any, data: bytes, count: int, offset: int) -> Any:
        if count > _MAX_VALUES:
            raise ValueError(f"an attribute of {count:,} values")
        return read(self, kind, data, count, offset)

    return checked


class Weights:
    """The names and places in an HDF5 file (`model.weights.h5`).

    Attributes:
        groups: path of each saved object → the layer's name as Keras noted it, "" if it did not.
    """

    def __init__(self, file: ByteFile, span: Span) -> None:
        try:
            import pyfive
        except ImportError as error:
            raise ConfigError("pyfive is not installed; pip install 'beam-pipeline[launcher]'") from error
        logging.getLogger("pyfive").setLevel(logging.WARNING)  # It tells every object that it meets.
        # Of the class: pyfive reads a dataset's attributes before it hands the dataset over.
        objects = pyfive.dataobjects.DataObjects
        if not hasattr(objects._attr_value, "__wrapped__"):
            objects._attr_value = _short(objects._attr_value)
        self._where = f"{file.path}: {WEIGHTS}"
        self._datasets: dict[str, tuple[int | None, tuple[int, ...], str]] = {}
        self._counts = Counter[str]()
        self.groups: dict[str, str] = {}
        self._sorted: list[str] = []
        try:
            root = pyfive.File(_Window(file, span, _MAX_METADATA, WEIGHTS))
            self._base = int(root.userblock_size)
            self._walk(pyfive, root)
        except PipelineError:
            raise
        except Exception as error:  # pyfive raises what its parsing runs into.
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
                    offset = int(child.id.data_offset) + self._base if plain else None
                    self._counts[path] += 1
                    self._datasets[below] = (offset, tuple(int(n) for n in child.shape), child.dtype.str)

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
        prefix = joined(path, "")
        # "0" comes after "/".
        end = bisect_left(self._sorted, f"{path}0") if path else len(self._sorted)
        return [one for one in self._sorted[bisect_left(self._sorted, prefix) : end] if one != path]

    def count(self, path: str) -> int:
        """Returns the number of variables of a layer."""
        return self._counts[f"{path}/vars"]

    def width(self, path: str) -> int:
        """Returns the last dimension of a layer's first variable, 0 if it has none."""
        return (self._datasets.get(f"{path}/vars/0", (0, (), ""))[1] or (0,))[-1]

    def is_table(self, path: str) -> bool:
        """Whether a layer's only variable has two dimensions."""
        return self.count(path) == 1 and len(self._datasets.get(f"{path}/vars/0", (0, (), ""))[1]) == 2

    def dataset(self, path: str, where: str) -> tuple[int, tuple[int, ...], str]:
        """Returns (offset in the file, shape, NumPy's name of the type) of a dataset that is stored in one piece."""
        if path not in self._datasets:
            raise CorruptFileError(f"{where} is in config.json, but {WEIGHTS} has no {path}; was the model built?")
        offset, shape, dtype = self._datasets[path]
        if offset is None:
            raise UnsupportedModelError(
                f"{where} is stored in chunks or compressed, which Keras does not do; save it again"
            )
        return offset, shape, dtype
