"""Copies of models that workers cannot read where they are, such as behind a tracking server and its password.

The launcher copies the files, one at a time, to the temp location. The job's last step removes them; a launch that
dies before leaves them to the sweep of a later one, as it does with load files.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from apache_beam.io.filesystem import CompressionTypes
from apache_beam.io.filesystems import FileSystems

from beam_pipeline.bigquery import publication
from beam_pipeline.errors import ArtifactMissingError, TruncatedFileError
from beam_pipeline.files import join
from beam_pipeline.tracking import stores
from beam_pipeline.tracking.client import asking, store_uri
from beam_pipeline.tracking.models import Model

if TYPE_CHECKING:
    from mlflow.entities import FileInfo
    from mlflow.store.artifact.artifact_repo import ArtifactRepository

# A server that has the artifacts elsewhere fetches a whole file before it sends the first byte.
_PATIENCE = 600
_BLOCK = 4 << 20

Progress = Callable[[int, int, str, Callable[[], int]], AbstractContextManager[None]]
"""Shows the progress of a copy while a block runs: of so many files and bytes, to a folder, by the bytes done."""


@contextmanager
def copied(model: Model, folder: str, tracking_uri: str | None, progress: Progress) -> Iterator[str]:
    """Copies a model's files into a folder and yields the path of the copy, which is removed if the block fails.

    The block starts the job, which removes the copy itself when it is done.

    Args:
        model: where they are: any place that MLflow's own client reads, with its credentials.
        folder: where to, as Beam's file systems write it.
        tracking_uri: MLflow server or store.
        progress: called once, with the number of files, their bytes, the folder, and what returns the bytes copied.

    Raises:
        ArtifactMissingError: there are no files.
        TruncatedFileError: less arrived than was announced.
        TrackingServerError: there is no server at that address, or it does not respond.
        ConfigError: a store wants credentials or a library.
    """
    try:
        uri = store_uri(tracking_uri)
        with asking(uri, f"the files of model {model.name!r} are gone; check it", seconds=_PATIENCE, retries=3):
            path = _Copy(model, folder, uri).run(progress)
        yield path
    except BaseException:
        try:
            publication.discard_copy(folder)
        except Exception as left:  # The error that stopped the launch is the one to report.
            logging.getLogger(__name__).warning("the copied model remains, a later job sweeps it: %s", left)
        raise


class _Copy:
    def __init__(self, model: Model, folder: str, uri: str) -> None:
        self._model = model
        self._folder = folder
        self._repository: ArtifactRepository = stores.repository(model.root, uri)
        self._finished = self._sent = 0
        self._arriving: Path | None = None

    def run(self, progress: Progress) -> str:
        """Copies all files; returns the path of the model's folder, or of its one file."""
        files, base = list(self._files(self._model.path)), self._model.path
        if not files:  # The model is a file itself, or not there.
            base = self._model.path.rpartition("/")[0]
            files = [file for file in self._files(base) if file.path == self._model.path]
        if not files:
            raise ArtifactMissingError(f"model {self._model.name!r} has no files at {self._model.root}")
        total = sum(file.file_size or 0 for file in files)
        with progress(len(files), total, self._folder, self._done):
            for file in files:
                # The disk holds one file at a time.
                with tempfile.TemporaryDirectory() as temporary:
                    to = join(self._folder, file.path.removeprefix(base).lstrip("/"))
                    self._copy(file, Path(temporary, "file"), to)
        return self._folder if base == self._model.path else join(self._folder, self._model.path.rpartition("/")[2])

    def _files(self, path: str) -> Iterator[FileInfo]:
        with stores.reading(self._model.root):
            listed = self._repository.list_artifacts(path or None)
        for file in listed:
            if file.is_dir:
                yield from self._files(file.path)
            else:
                yield file

    def _copy(self, file: FileInfo, local: Path, to: str) -> None:
        self._sent, self._arriving = 0, local
        # What every store implements; its public wrapper downloads in threads, for which an interrupted process waits.
        with stores.reading(self._model.root):
            self._repository._download_file(file.path, str(local))
        size = local.stat().st_size
        if file.file_size is not None and size != file.file_size:
            raise TruncatedFileError(
                f"{size:,} of the {file.file_size:,} bytes of {file.path} came from {self._model.root}; start the job "
                "again"
            )
        with (
            local.open("rb") as source,
            FileSystems.create(to, compression_type=CompressionTypes.UNCOMPRESSED) as target,
        ):
            while block := source.read(_BLOCK):
                target.write(block)
                self._sent += len(block)
        self._finished, self._sent, self._arriving = self._finished + size, 0, None

    def _done(self) -> int:
        """Bytes copied; a byte that has come and was not yet sent on counts for half."""
        arriving = self._arriving
        try:
            arrived = arriving.stat().st_size if arriving else 0
        except OSError:
            arrived = 0
        return self._finished + (arrived + self._sent) // 2
