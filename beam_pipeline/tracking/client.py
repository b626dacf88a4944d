"""MLflow's client: which server or store it asks, for how long, and what its errors mean. Workers never ask."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote

from beam_pipeline.errors import ConfigError, PipelineError, RunNotFoundError, TrackingServerError
from beam_pipeline.tracking import stores
from beam_pipeline.tracking.stores import shown

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

# MLflow's own defaults (7 retries, 120 s each) take many minutes to fail at a wrong host.
_PATIENCE = 10


class Connection(NamedTuple):
    """MLflow's client, and the URI of the server or store that it asks."""

    client: MlflowClient
    uri: str


@contextmanager
def connected(tracking_uri: str | None, missing: str, check: str) -> Iterator[Connection]:
    """Yields a connection to a server or store.

    Args:
        tracking_uri: MLFLOW_TRACKING_URI unless it is named.
        missing: start of the message if MLflow has no such thing; the place follows.
        check: the flag to check in that case.

    Raises:
        ConfigError: MLflow is not installed, or the server rejected the credentials.
        RunNotFoundError: there is no such thing.
        TrackingServerError: there is no server at that address, or it does not respond.
    """
    uri = store_uri(tracking_uri)
    require_store(uri)
    with asking(uri, f"{missing} in {shown(uri)}; check {check}"):
        from mlflow.tracking import MlflowClient

        yield Connection(MlflowClient(tracking_uri=uri), uri)


def store_uri(tracking_uri: str | None) -> str:
    """Returns the URI of the MLflow server or store: MLFLOW_TRACKING_URI unless it is named.

    Raises:
        ConfigError: MLflow is not installed.
    """
    try:
        from mlflow.tracking import get_tracking_uri
    except ImportError as error:
        raise ConfigError("MLflow is not installed; pip install 'beam-pipeline[launcher]'") from error
    uri = tracking_uri or get_tracking_uri()
    folder = stores.local_folder(uri) if "%" in uri else None
    return uri if folder is None else Path(folder).as_uri()


def require_store(uri: str) -> None:
    """Checks that a store exists: MLflow would create an empty one where a path is mistyped.

    Raises:
        TrackingServerError: it does not.
    """
    scheme, _, path = uri.partition(":///")
    if scheme == "sqlite":
        exists = os.path.exists(unquote(path).split("?")[0])
    elif uri == "databricks":  # MLflow's name for the workspace that the environment names
        exists = True
    else:
        folder = stores.local_folder(uri)
        exists = folder is None or os.path.exists(folder)
    if not exists:
        raise TrackingServerError(f"no MLflow store at {uri}; check --tracking_uri")


@contextmanager
def asking(uri: str, missing: str, *, seconds: int | None = None, retries: int = 1) -> Iterator[None]:
    """Limits the patience of MLflow's client while the block runs, and turns whatever it raises into one line.

    Args:
        uri: server or store, as `store_uri` returns it.
        missing: the message if MLflow has no such thing.
        seconds: longest silence of the server, unless MLFLOW_HTTP_REQUEST_TIMEOUT says otherwise; None for a short
            request.
        retries: of a failed request, unless MLFLOW_HTTP_REQUEST_MAX_RETRIES says otherwise.

    Raises:
        ConfigError: the server rejected the credentials.
        RunNotFoundError: there is no such thing.
        TrackingServerError: there is no server at that address, or it does not respond.
    """
    from mlflow.exceptions import MlflowException

    settings = {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(retries),
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(seconds or _PATIENCE),
        # Its bars would tear the lines of the terminal and fill a log.
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        # Some artifact stores (dbfs:/) ask the default server for credentials, and would create an empty store here.
        "MLFLOW_TRACKING_URI": uri,
    }
    added = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    except PipelineError:
        raise
    except Exception as error:  # Stores raise whatever their database or HTTP library raises.
        code = getattr(error, "error_code", None)
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = stores.reason(error, uri)
        if code in ("UNAUTHENTICATED", "PERMISSION_DENIED") or status in (401, 403) or "valid JSON" in reason:
            # A sign-in page is not JSON.
            raise ConfigError(
                f"MLflow at {shown(uri)} rejected these credentials ({reason}); set MLFLOW_TRACKING_TOKEN, "
                "or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD; behind IAP or Cloud Run use "
                "--tracking_audience"
            ) from error
        if code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise RunNotFoundError(f"{missing} and --tracking_uri ({reason})") from error
        failed = "does not respond" if isinstance(error, MlflowException) else "failed"
        raise TrackingServerError(f"MLflow at {shown(uri)} {failed}: {reason}; check --tracking_uri") from error
    finally:
        for name in added:
            os.environ.pop(name, None)
