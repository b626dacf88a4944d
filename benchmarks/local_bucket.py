"""`gs://bench/…` as a local folder: takes the place of Beam's `apache_beam.io.gcp.gcsfilesystem`.

Beam finds a file system by the scheme of its class, so this module has to be there instead of Beam's, not beside it.
Paths are translated, and nothing else is done: no copy, no server, no upload.
"""

import importlib.abc
import importlib.util
import os
import sys

BUCKET = "gs://bench/"
REPLACED = "apache_beam.io.gcp.gcsfilesystem"


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_file_location(name, __file__) if name == REPLACED else None


def install():
    """Makes Beam import this module as its own; imports nothing of Beam, so start-up keeps its order."""
    sys.meta_path.insert(0, _Finder())


def local(path):
    """Returns the local path of an object of the bucket."""
    return path.replace(BUCKET, f"{os.environ['BENCH_BUCKET']}/", 1)


if __name__ == REPLACED:
    # What Beam's module imports; importing takes part in the time measured.
    from apache_beam.io.filesystem import CompressionTypes, FileMetadata
    from apache_beam.io.gcp import gcsio  # noqa: F401 - what it costs to import belongs to the start-up
    from apache_beam.io.localfilesystem import LocalFileSystem

    class GCSFileSystem(LocalFileSystem):
        """The bucket. The name is that of Beam's class, which other modules of Beam import."""

        @classmethod
        def scheme(cls):
            """Returns the scheme that is served."""
            return "gs"

        def split(self, path):
            """Returns (folder, name)."""
            folder, _, name = path.rpartition("/")
            return folder, name

        def mkdirs(self, path):
            """Makes a folder; Cloud Storage knows none."""
            os.makedirs(local(path), exist_ok=True)

        def _list(self, dir_or_prefix):
            folder = os.environ["BENCH_BUCKET"]
            for file in super()._list(local(dir_or_prefix)):
                path = BUCKET + os.path.relpath(file.path, folder)
                yield FileMetadata(path, file.size_in_bytes, file.last_updated_in_seconds)

        def create(self, path, mime_type="application/octet-stream", compression_type=CompressionTypes.AUTO):
            """Opens a file for writing."""
            return super().create(local(path), mime_type, compression_type)

        def open(self, path, mime_type="application/octet-stream", compression_type=CompressionTypes.AUTO):
            """Opens a file for reading."""
            return super().open(local(path), mime_type, compression_type)

        def copy(self, source_file_names, destination_file_names):
            """Copies files."""
            super().copy([local(path) for path in source_file_names], [local(path) for path in destination_file_names])

        def rename(self, source_file_names, destination_file_names):
            """Renames files."""
            super().rename(
                [local(path) for path in source_file_names], [local(path) for path in destination_file_names]
            )

        def exists(self, path):
            """Whether a file is there."""
            return super().exists(local(path))

        def size(self, path):
            """Returns bytes."""
            return super().size(local(path))

        def last_updated(self, path):
            """Returns seconds since 1970."""
            return super().last_updated(local(path))

        def metadata(self, path):
            """Returns path, size and age."""
            found = super().metadata(local(path))
            return FileMetadata(path, found.size_in_bytes, found.last_updated_in_seconds)

        def delete(self, paths):
            """Deletes what matches."""
            for match in self.match(paths):
                for file in match.metadata_list:
                    os.remove(local(file.path))
