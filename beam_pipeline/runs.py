"""The MLflow side: which run is meant, and where its artifacts are. Only the launcher asks; workers never do."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlparse

from beam_pipeline.errors import ConfigError, RunNotFoundError
from beam_pipeline.formats.artifact import Tower

if TYPE_CHECKING:
    from mlflow import entities
    from mlflow.tracking import MlflowClient

# MLflow's own defaults (7 retries, 120 s each) let a wrong host take many minutes to fail.
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


@dataclass(frozen=True)
class Run:
    """A training.

    Attributes:
        run_id, run_name, experiment_id, experiment_name: as MLflow has them.
        train_date: day on which the run started, in UTC.
        artifact_uri: root of the run's artifacts.
    """

    run_id: str
    run_name: str
    experiment_id: str
    experiment_name: str
    train_date: date
    artifact_uri: str


@dataclass(frozen=True)
class Training:
    """A run and the towers of its model.

    Attributes:
        run: the run.
        model_uri: where the model lies.
        towers: what is read of it.
    """

    run: Run
    model_uri: str
    towers: tuple[Tower, ...]


def find_run(
    *,
    run_id: str | None = None,
    experiment_name: str | None = None,
    run_name: str | None = None,
    tracking_uri: str | None = None,
) -> Run:
    """Returns the run of that id, or the latest FINISHED run of an experiment (of that name).

    Raises:
        RunNotFoundError: no such run or experiment, none FINISHED, or the tracking server does not answer.
        ConfigError: MLflow is not installed.
    """
    for name, value in _PATIENCE.items():
        os.environ.setdefault(name, value)
    try:
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient, get_tracking_uri
    except ImportError as error:
        raise ConfigError("MLflow is not installed; pip install 'beam-pipeline[launcher]'") from error

    uri = tracking_uri or get_tracking_uri()
    _require_store(uri)
    try:
        client = MlflowClient(tracking_uri=uri)
        if run_id:
            run = client.get_run(run_id)
            experiment = client.get_experiment(run.info.experiment_id)
        else:
            named = client.get_experiment_by_name(experiment_name or "")
            if named is None:
                known = ", ".join(sorted(e.name for e in client.search_experiments(max_results=20)))
                raise RunNotFoundError(
                    f"no experiment {experiment_name!r} in {_shown(uri)}; there are: {known or 'none'}"
                )
            experiment = named
            latest = _latest_finished(client, experiment.experiment_id, run_name)
            if latest is None:
                called = f" named {run_name!r}" if run_name else ""
                raise RunNotFoundError(
                    f"experiment {experiment_name!r} in {_shown(uri)} has no FINISHED run{called}; "
                    "let a training finish, or name one with --run_id"
                )
            run = latest
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST" or error.error_code == "INVALID_PARAMETER_VALUE":
            raise RunNotFoundError(f"no run {run_id!r} in {_shown(uri)}; check --run_id and --tracking_uri") from error
        raise RunNotFoundError(
            f"MLflow at {_shown(uri)} does not answer: {_first_line(error)}; check --tracking_uri"
        ) from error
    except RunNotFoundError:
        raise
    except Exception as error:  # Stores raise what their database or HTTP library raises.
        raise RunNotFoundError(f"MLflow at {_shown(uri)} failed: {_first_line(error)}; check --tracking_uri") from error
    info = run.info
    if info.lifecycle_stage == "deleted":
        raise RunNotFoundError(f"run {info.run_id!r} is deleted in {_shown(uri)}; restore it or name another")
    return Run(
        run_id=info.run_id,
        run_name=info.run_name or "",
        experiment_id=experiment.experiment_id,
        experiment_name=experiment.name,
        train_date=datetime.fromtimestamp(info.start_time / 1000, UTC).date(),
        artifact_uri=info.artifact_uri,
    )


def tag_run(run_id: str, tags: dict[str, str], tracking_uri: str | None = None) -> None:
    """Sets tags of a run.

    Raises:
        RunNotFoundError: the tracking server does not answer, or refuses.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    try:
        client = MlflowClient(tracking_uri=tracking_uri)
        for name, value in tags.items():
            client.set_tag(run_id, name, value)
    except MlflowException as error:
        raise RunNotFoundError(f"run {run_id!r} cannot be tagged: {_first_line(error)}") from error


def artifact_folder(run: Run, artifact_path: str) -> str:
    """Returns the model folder as a path that Beam's file systems open: local or `gs://`.

    Raises:
        ConfigError: the artifacts are in a place that cannot be read.
    """
    uri = urlparse(run.artifact_uri)
    if uri.scheme == "gs":
        root = run.artifact_uri.rstrip("/")
    elif uri.scheme == "file":
        root = unquote(uri.path).rstrip("/")
    elif uri.scheme == "":
        root = os.path.abspath(run.artifact_uri)
    else:
        raise ConfigError(
            f"run {run.run_id} keeps its artifacts at {uri.scheme}://…, which cannot be read; "
            "gs:// and local folders can"
        )
    return f"{root}/{artifact_path}" if artifact_path else root


def _latest_finished(client: MlflowClient, experiment_id: str, run_name: str | None) -> entities.Run | None:
    token = None
    while True:
        page = client.search_runs(
            [experiment_id],
            "attributes.status = 'FINISHED'",
            order_by=["attributes.start_time DESC"],
            # A name is compared here rather than in the filter, whose quoting does not allow every name.
            max_results=100 if run_name else 1,
            page_token=token,
        )
        for run in page:
            if not run_name or run.info.run_name == run_name:
                return run
        token = page.token
        if not token or not run_name:
            return None


def _require_store(uri: str) -> None:
    """A mistyped path would make MLflow create an empty store there."""
    scheme, _, path = uri.partition(":///")
    if scheme == "sqlite":
        exists = os.path.exists(unquote(path).split("?")[0])
    elif urlparse(uri).scheme in ("", "file"):
        exists = os.path.exists(unquote(urlparse(uri).path) if uri.startswith("file:") else uri)
    else:
        exists = True
    if not exists:
        raise RunNotFoundError(f"no MLflow store at {uri}; check --tracking_uri")


def _shown(uri: str) -> str:
    """The URI without a password that it may hold."""
    parts = urlparse(uri)
    if not parts.password:
        return uri
    return uri.replace(f":{parts.password}@", ":…@")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
