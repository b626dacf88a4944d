"""The zip that a `.keras` file is: which members it has, and where their bytes are."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO, cast

from beam_pipeline.errors import CorruptFileError, NotAModelError, PipelineError, UnsupportedModelError
from beam_pipeline.files import ByteFile
from beam_pipeline.formats.protobuf import Span

CONFIG, WEIGHTS, METADATA = "config.json", "model.weights.h5", "metadata.json"
_MAX_DIRECTORY = 8 << 20
"""Bytes read of the zip's directory: 100,000 members, each of which takes half a kilobyte of memory."""


@dataclass(frozen=True)
class Member:
    """A member of the zip: where its bytes are in the file, and their CRC-32."""

    span: Span
    crc: int


class Window:
    """A part of a file as a file object, which fails after a number of bytes: what libraries read stays bounded."""

    def __init__(self, file: ByteFile, span: Span, limit: int, name: str) -> None:
        self._file = file
        self._span = span
        self._limit = self._left = limit
        self._name = name
        self._at = 0

    def seekable(self) -> bool:
        """Returns True, as of a file."""
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        """Moves to a position of the part, and returns it."""
        size = self._span.end - self._span.start
        self._at = offset + {0: 0, 1: self._at, 2: size}[whence]
        if self._at < 0:
            raise OSError(f"seek to {self._at}")
        return self._at

    def tell(self) -> int:
        """Returns the position in the part."""
        return self._at

    def read(self, length: int = -1) -> bytes:
        """Returns the next bytes, no more than the part has.

        Raises:
            CorruptFileError: more is read than a file that Keras saved takes.
        """
        left = max(0, self._span.end - self._span.start - self._at)
        length = left if length < 0 else min(length, left)
        self._left -= length + 16  # An empty read counts, too.
        if self._left < 0:
            limit = f"{self._limit >> 20} MB" if self._limit >= 1 << 20 else f"{self._limit:,} bytes"
            raise CorruptFileError(
                f"{self._file.path}: its {self._name} exceeds the limit of {limit}; log the model again"
            )
        data = self._file.read(self._span.start + self._at, length) if length else b""
        self._at += length
        return data


def is_of_model(name: str) -> bool:
    """Whether a model is read from a member."""
    return name in (CONFIG, WEIGHTS, METADATA) or asset_owner(name) is not None


def read_directory(
    file: ByteFile,
    is_wanted: Callable[[str], bool] = is_of_model,
    kind: str = ".keras",
    remedy: str = "use model.save()",
) -> dict[str, Member]:
    """Returns the members of a zip.

    Args:
        file: the zip.
        is_wanted: which members, by their names.
        kind: what the zip is, for a message.
        remedy: how one is saved that is not compressed.

    Raises:
        NotAModelError: it is not a zip.
        UnsupportedModelError: a member that is needed is compressed.
        CorruptFileError: a member is not where the directory says.
    """
    window = Window(file, Span(0, file.size), _MAX_DIRECTORY, "directory")
    try:
        with zipfile.ZipFile(cast(BinaryIO, window)) as archive:
            infos = archive.infolist()
    except PipelineError:
        raise
    except Exception as error:  # `zipfile` raises whatever its parsing runs into.
        raise NotAModelError(f"{file.path} is not a {kind} file ({error}); log it again") from error
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


def asset(owner: str) -> str:
    """Returns the name of the member with the vocabulary of the layer at a path."""
    return f"assets/{owner}/vocabulary.txt"


def asset_owner(name: str) -> str | None:
    """Returns the path of the layer whose vocabulary a member is, None for any other member."""
    owner = name.removeprefix("assets/").removesuffix("/vocabulary.txt")
    return owner if name == asset(owner) else None
