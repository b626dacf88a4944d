"""Stores that MLflow names by URI: how a message shows one, which local folder it is, and why one cannot be read."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlparse

from beam_pipeline import emulators
from beam_pipeline.credentials import credentials
from beam_pipeline.errors import ConfigError, PipelineError

if TYPE_CHECKING:
    from mlflow.store.artifact.artifact_repo import ArtifactRepository

# What MLflow's client imports for a kind of store, and installs only as an extra.
_LIBRARIES = {
    "s3": "boto3",
    "r2": "boto3",
    "b2": "boto3",
    "wasbs": "azure-storage-blob azure-identity",
    "abfss": "azure-storage-file-datalake azure-identity",
    "sftp": "pysftp",
}

# Served by the tracking server itself: a failure there is reported as the server's.
_SERVED = ("mlflow-artifacts", "http", "https")

_WINDOWS = re.compile(r"(file:/*)?[A-Za-z]:[\\/]")


def repository(root: str, tracking_uri: str) -> ArtifactRepository:
    """Returns MLflow's client for a folder of artifacts.

    Args:
        root: the folder's URI, or its path, as MLflow has it.
        tracking_uri: MLflow server or store.

    Raises:
        ConfigError: a library or a setting that this kind of store needs is missing.
    """
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    if urlparse(root).scheme == "mlflow-artifacts" and urlparse(tracking_uri).scheme not in ("http", "https"):
        raise ConfigError(
            f"{root} is read through the tracking server, and {shown(tracking_uri)} is the store behind it; name the "
            "server, http://… or https://…, with --tracking_uri"
        )
    folder = local_folder(root)
    with reading(root):
        if urlparse(root).scheme == "gs" and not emulators.emulated():
            from google.cloud import storage
            from mlflow.store.artifact.gcs_artifact_repo import GCSArtifactRepository

            # MLflow's client would not know --impersonate_service_account.
            client = storage.Client(project=None, credentials=credentials())
            return GCSArtifactRepository(root, client, tracking_uri=tracking_uri)
        return get_artifact_repository(root if folder is None else Path(folder).as_uri(), tracking_uri=tracking_uri)


@contextmanager
def reading(root: str) -> Iterator[None]:
    """Attributes what fails in the block to the store at `root` instead of the tracking server.

    Raises:
        ConfigError: the store cannot be read from here.
    """
    try:
        yield
    except PipelineError:
        raise
    except Exception as error:  # Every store's library has exceptions of its own.
        if urlparse(root).scheme in _SERVED:
            raise
        raise ConfigError(_remedy(error, root)) from error


def local_folder(root: str) -> str | None:
    """Returns the path of a folder of this machine; None for any other place.

    MLflow's client treats every path as quoted: what is logged to `/data/a%20b` is written to `/data/a b`. The
    folder whose name really is `a%20b` is returned only if the unquoted one does not exist.
    """
    from mlflow.utils.file_utils import local_file_uri_to_path

    uri = urlparse(root)
    if uri.scheme not in ("", "file") and not _WINDOWS.match(root):
        return None
    unquoted = os.path.abspath(local_file_uri_to_path(root))
    literal = os.path.abspath(uri.path if uri.scheme == "file" else root)
    return literal if os.path.exists(literal) and not os.path.exists(unquoted) else unquoted


def elsewhere(root: str) -> str:
    """Returns the remedy for a local folder that this machine does not have."""
    if _WINDOWS.match(root):
        return (
            f"{root} is a folder of a Windows machine; let the tracking server serve artifacts (mlflow server "
            "--serve-artifacts) or keep them in a bucket, and log the model again"
        )
    return (
        f"{root} does not exist on this machine; mount that folder here, start the job on the machine that has it, or "
        "log the model if it was never logged"
    )


def shown(uri: str) -> str:
    """Returns the URI without a password that it may hold."""
    return _without_password(uri, uri)


def reason(error: Exception, uri: str) -> str:
    """Returns the message of an error, on one line, without the password of the URI that it often quotes."""
    return _without_password(" ".join(str(error).split())[:300] or type(error).__name__, uri)


def _without_password(text: str, uri: str) -> str:
    password = urlparse(uri).password
    return text.replace(f":{password}@", ":…@") if password else text


def _remedy(error: Exception, root: str) -> str:
    scheme, where, why = urlparse(root).scheme, shown(root), reason(error, root)
    if isinstance(error, ImportError):
        install = f"; pip install {_LIBRARIES[scheme]}" if scheme in _LIBRARIES else ""
        return f"{where} is read with a library that cannot be imported: {why}{install}"
    if scheme in ("hdfs", "viewfs") and re.search("libjvm|libhdfs", why):
        return (
            f"{where} is read with a Hadoop client, and libhdfs or a JVM was not found; install them and set "
            "JAVA_HOME, HADOOP_HOME and CLASSPATH"
        )
    if scheme == "dbfs" and "credentials" in why:
        return (
            f"{where} is read with the credentials of Databricks: {why}; set MLFLOW_TRACKING_URI=databricks, "
            "DATABRICKS_HOST and DATABRICKS_TOKEN"
        )
    if "registered artifact repository" in why:
        return f"MLflow's client cannot read {scheme}://, where {where} is; install the MLflow plugin for it"
    return f"{where} cannot be read: {why}; check that this machine reaches it and has credentials for it"
