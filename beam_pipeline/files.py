"""Files of an artifact, local or on Cloud Storage, read by byte range.

Access goes through Beam's `FileSystems`, so credentials, retries and emulators are those of the job itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import BinaryIO, Protocol

from beam_pipeline.errors import ArtifactMissingError, TruncatedFileError

_READ_AHEAD = 1 << 20


class ByteFile:
    """One file, read by byte range; small neighbouring reads share one request.

    Attributes:
        path: where the file lies, as given.
        size: bytes in the file.
    """

    def __init__(self, path: str, stream: BinaryIO, size: int) -> None:
        self.path = path
        self.size = size
        self._stream = stream
        self._start = 0
        self._buffer = b""

    def read(self, offset: int, length: int) -> bytes:
        """Returns exactly `length` bytes from `offset`.

        Raises:
            TruncatedFileError: the file ends before.
        """
        if offset < 0 or length < 0 or offset + length > self.size:
            raise TruncatedFileError(
                f"{self.path} has {self.size:,} bytes, but bytes {offset:,} to {offset + length:,} are needed: "
                "the file is truncated or its index belongs to another file; log the model again"
            )
        if length >= _READ_AHEAD:
            return self._fetch(offset, length)
        at = offset - self._start
        if at < 0 or at + length > len(self._buffer):
            self._buffer = self._fetch(offset, min(_READ_AHEAD, self.size - offset))
            self._start, at = offset, 0
        return self._buffer[at : at + length]

    def blocks(self, start: int, end: int, size: int) -> Iterator[tuple[int, bytes]]:
        """Yields (offset, bytes) of the range, `size` bytes at a time."""
        for offset in range(start, end, size):
            yield offset, self.read(offset, min(size, end - offset))

    def close(self) -> None:
        """Closes the file."""
        self._stream.close()

    def __enter__(self) -> ByteFile:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _fetch(self, offset: int, length: int) -> bytes:
        self._stream.seek(offset)
        parts = []
        missing = length
        while missing:
            part = self._stream.read(missing)
            if not part:
                raise TruncatedFileError(
                    f"{self.path} ended at byte {offset + length - missing:,} while it was read: "
                    "it was replaced or cut; log the model again"
                )
            parts.append(part)
            missing -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


class OpenFile(Protocol):
    """How a format reader opens a file; `open_file` in a pipeline, anything alike elsewhere."""

    def __call__(self, path: str) -> ByteFile:
        """Opens the file at `path`; raises ArtifactMissingError when there is none."""
        ...


def open_file(path: str) -> ByteFile:
    """Opens a local path or a `gs://` URI.

    Raises:
        ArtifactMissingError: there is no such file.
    """
    from apache_beam.io.filesystem import CompressionTypes
    from apache_beam.io.filesystems import FileSystems

    try:
        # `size` rather than `match`: an id or a folder name may hold characters that a glob would interpret.
        size = FileSystems.get_filesystem(path).size(path)
        stream = FileSystems.open(path, compression_type=CompressionTypes.UNCOMPRESSED)
    except Exception as error:  # Each file system fails in its own way, and all mean the same to the job.
        reason = "does not exist" if _is_missing(error) else f"cannot be read: {error}"
        raise ArtifactMissingError(f"{path} {reason}") from error
    return ByteFile(path, stream, size)


def list_folder(path: str) -> list[str]:
    """Returns the names of the files in a folder, local or on Cloud Storage, sorted; of no folder, none.

    Raises:
        ArtifactMissingError: it cannot be read.
    """
    from apache_beam.io.filesystems import FileSystems

    try:
        if not path.startswith("gs://"):  # Its name may hold characters that a glob would interpret.
            return sorted(entry.name for entry in os.scandir(path) if entry.is_file()) if os.path.isdir(path) else []
        (found,) = FileSystems.match([f"{path}/*"])
    except Exception as error:  # As with `open_file`.
        raise ArtifactMissingError(f"{path} cannot be listed: {error}") from error
    names = (metadata.path.removeprefix(f"{path}/") for metadata in found.metadata_list)
    return sorted(name for name in names if name and "/" not in name)


def join(folder: str, *names: str) -> str:
    """Joins path components the way the file system of `folder` does."""
    return "/".join([folder.rstrip("/"), *names])


def _is_missing(error: BaseException) -> bool:
    """Whether a file system's error means that the file is not there: each wraps it in its own way."""
    details = getattr(error, "exception_details", None) or {}
    causes = [error, *(details.values() if isinstance(details, dict) else [details])]
    return any(isinstance(cause, FileNotFoundError) or getattr(cause, "code", None) == 404 for cause in causes)
