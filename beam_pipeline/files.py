"""Files of an artifact, local or on Cloud Storage, read by byte range: what is fetched is what is needed.

A file on Cloud Storage is read with Google's own client, as whom Beam's clients of the process act; its retries are the
client's. Other schemes than `gs://` are left to Beam's `FileSystems`.
"""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol, cast

from beam_pipeline import emulators
from beam_pipeline.errors import ArtifactMissingError, FileReplacedError, PipelineError, TruncatedFileError

if TYPE_CHECKING:
    from google.cloud import storage

_PAGE = 16 << 10
"""Bytes from which on a read is a request of its own, and in which a file is kept that is read in smaller parts."""
_MOST_AHEAD = 64
"""Pages that a request fetches at most."""
_MOST_PAGES = 256
"""Pages kept of a file: readers of graphs and HDF5 go back and forth."""


class ByteFile:
    """One file, read by byte range.

    Small reads that follow one another, as those of a graph, share requests: from the second one on, pages are fetched
    and kept, twice as many ahead as long as the reads continue. Any other read fetches exactly what is asked for.

    Attributes:
        path: of the file, as given.
        size: bytes in the file.
    """

    def __init__(self, path: str, stream: BinaryIO, size: int) -> None:
        """Takes a stream that fetches what is read from it and nothing else, if fetching costs anything."""
        self.path = path
        self.size = size
        self._stream = stream
        self._pages: dict[int, bytes] = {}  # by number, the latest last
        self._ahead = 1
        self._end: int | None = None  # of the last read, if it was small and its bytes were not kept

    def read(self, offset: int, length: int) -> bytes:
        """Returns exactly `length` bytes from `offset`.

        Raises:
            TruncatedFileError: the file ends before.
            FileReplacedError: the file is another one than was opened.
        """
        if offset < 0 or length < 0 or offset + length > self.size:
            raise TruncatedFileError(
                f"{self.path} has {self.size:,} bytes, but bytes {offset:,} to {offset + length:,} are needed: "
                "the file is truncated or its index belongs to another file; log the model again"
            )
        first, last = offset // _PAGE, (offset + length - 1) // _PAGE
        is_near = bool(self._pages) or (self._end is not None and 0 <= offset - self._end < _PAGE)
        if not (is_near and length < _PAGE) and any(n not in self._pages for n in range(first, last + 1)):
            self._end = offset + length if length < _PAGE else None
            return self._fetch(offset, length)
        data = b"".join(self._page(number) for number in range(first, last + 1))
        return data[offset - first * _PAGE :][:length]

    def blocks(self, start: int, end: int, size: int) -> Iterator[tuple[int, bytes]]:
        """Yields (offset, bytes) of the range, `size` bytes at a time."""
        for offset in range(start, end, size):
            yield offset, self.read(offset, min(size, end - offset))

    def stream(self) -> io.RawIOBase:
        """Returns the file as a seekable binary stream, for libraries that read one; closing it leaves the file open.

        Each read is a request of its own, unless it is small and near the one before.
        """
        return _View(self)

    def close(self) -> None:
        """Closes the file."""
        self._stream.close()

    def __enter__(self) -> ByteFile:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _page(self, number: int) -> bytes:
        if number not in self._pages:
            self._ahead = min(2 * self._ahead, _MOST_AHEAD) if number - 1 in self._pages else 1
            end = next((n for n in range(number + 1, number + self._ahead) if n in self._pages), number + self._ahead)
            start = number * _PAGE
            data = self._fetch(start, min(end * _PAGE, self.size) - start)
            self._pages.update((number + at // _PAGE, data[at : at + _PAGE]) for at in range(0, len(data), _PAGE))
            while len(self._pages) > _MOST_PAGES:
                del self._pages[next(iter(self._pages))]
        return self._pages[number]

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


class _Positioned(io.RawIOBase):
    """A readable stream with a position, of something that has a size."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        if at < 0:
            raise OSError(f"seek to {at}")
        self._at = at
        return at

    def read(self, size: int | None = -1, /) -> bytes:
        left = max(0, self._size - self._at)
        length = left if size is None or size < 0 else min(size, left)
        data = self._range(self._at, length) if length else b""
        self._at += len(data)
        return data

    def readall(self) -> bytes:
        return self.read()

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)

    def _range(self, offset: int, length: int) -> bytes:
        """Returns these bytes, all of which are there; each subclass has its own place to take them from."""
        raise NotImplementedError


class _View(_Positioned):
    """A `ByteFile` as a stream."""

    def __init__(self, file: ByteFile) -> None:
        super().__init__(file.size)
        self._file = file

    def _range(self, offset: int, length: int) -> bytes:
        return self._file.read(offset, length)


class _Object(_Positioned):
    """An object on Cloud Storage as it is when it is opened: one request for its size, and one for each read."""

    def __init__(self, path: str) -> None:
        bucket, _, name = path.removeprefix("gs://").partition("/")
        found = _client().bucket(bucket).get_blob(name)
        if found is None:
            raise FileNotFoundError(path)
        super().__init__(found.size)
        self._path = path
        self._generation = found.generation
        # Not `found`: its link names the generation, and a bucket that keeps old ones would still serve it.
        self._blob = found.bucket.blob(name)

    @property
    def size(self) -> int:
        """Bytes in the object."""
        return self._size

    def _range(self, offset: int, length: int) -> bytes:
        from google.api_core.exceptions import NotFound, PreconditionFailed

        try:
            # As it is stored, since that is what the size counts. A checksum is only sent for whole objects.
            data: bytes = self._blob.download_as_bytes(
                start=offset,
                end=offset + length - 1,
                raw_download=True,
                if_generation_match=self._generation,
                checksum=None,
            )
        except (NotFound, PreconditionFailed) as error:
            raise FileReplacedError(
                f"{self._path} was replaced or deleted while it was read (generation {self._generation} was opened); "
                "leave a model that is being published where it is, and start the job again"
            ) from error
        return data


_clients: dict[tuple[int, str | None], storage.Client] = {}
_lock = threading.Lock()


def _client() -> storage.Client:
    """Returns the Cloud Storage client of this process, which is kept for its life.

    A client for each file would look for credentials and open a connection each time.
    """
    emulator = emulators.storage_url()
    key = os.getpid(), emulator  # Connections do not outlive a fork.
    with _lock:
        if key not in _clients:
            from google.auth.credentials import AnonymousCredentials
            from google.cloud import storage

            if emulator:
                endpoint = {"api_endpoint": emulator}
                client = storage.Client(project=None, credentials=AnonymousCredentials(), client_options=endpoint)
            else:
                from beam_pipeline import credentials

                client = storage.Client(project=None, credentials=credentials.credentials())
            _clients[key] = client
        return _clients[key]


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
    try:
        return _open(path)
    except PipelineError:
        raise
    except Exception as error:  # Each file system fails in its own way, and all mean the same to the job.
        reason = "does not exist" if _is_missing(error) else f"cannot be read: {error}"
        raise ArtifactMissingError(f"{path} {reason}") from error


def _open(path: str) -> ByteFile:
    if path.startswith("gs://"):
        found = _Object(path)
        return ByteFile(path, cast(BinaryIO, found), found.size)
    if "://" not in path:
        file = open(path, "rb", buffering=0)  # noqa: SIM115 - the ByteFile closes it
        return ByteFile(path, cast(BinaryIO, file), os.fstat(file.fileno()).st_size)
    from apache_beam.io.filesystem import CompressionTypes
    from apache_beam.io.filesystems import FileSystems

    # `size` rather than `match`: an id or a folder name may hold characters that a glob would interpret.
    size = FileSystems.get_filesystem(path).size(path)
    return ByteFile(path, FileSystems.open(path, compression_type=CompressionTypes.UNCOMPRESSED), size)


def list_folder(path: str) -> list[str]:
    """Returns the names of the files in a folder, local or on Cloud Storage, sorted; of no folder, none.

    Raises:
        ArtifactMissingError: it cannot be read.
    """
    from apache_beam.io.filesystems import FileSystems

    try:
        if "://" not in path:  # Its name may hold characters that a glob would interpret.
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
