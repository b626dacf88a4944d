"""The MLflow side: which run is meant, and where its model is. Only the launcher asks; workers never do."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlparse

from beam_pipeline.errors import (
    ArtifactMissingError,
    ConfigError,
    PartitionTakenError,
    PipelineError,
    RunNotFoundError,
)
from beam_pipeline.formats.artifact import Tower

if TYPE_CHECKING:
    from mlflow import entities
    from mlflow.tracking import MlflowClient

DEFAULT_PATH = "model"
"""Name of the model in a run, unless said otherwise."""

# MLflow's own defaults (7 retries, 120 s each) let a wrong host take many minutes to fail.
_PATIENCE = 10

_RUNS_URI = re.compile(r"runs:/+([^/]+)/(.+?)/*")
_LOGGED_URI = re.compile(r"models:/(m-[^/@]+)")
_REGISTERED_URI = re.compile(r"models:/([^/]+)/([0-9]+)|models:/([^/]+)@([^/@]+)")

# What a folder holds that is a model, by itself or as MLflow lays it out.
_MARKS = ("MLmodel", "saved_model.pb")


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


@dataclass(frozen=True)
class Model:
    """Where a model's files are.

    Attributes:
        name: for a person: its folder in the run, the name it was logged by, or its URI.
        root: URI of a folder, as MLflow has it.
        path: the model's folder (or file) below it; empty for the folder itself. Not quoted, unlike the URI.
        notable: whether it was found otherwise than by its name in the run.
    """

    name: str
    root: str
    path: str = ""
    notable: bool = False

    @property
    def uri(self) -> str:
        """Where it is, in one piece."""
        return "/".join(filter(None, (self.root.rstrip("/"), self.path)))


def find_run(
    *,
    run_id: str | None = None,
    experiment_name: str | None = None,
    run_name: str | None = None,
    model_uri: str | None = None,
    tracking_uri: str | None = None,
) -> Run:
    """Returns the run of that id, the latest FINISHED run of an experiment (of that name), or the run of a model.

    Raises:
        RunNotFoundError: no such run, experiment or model, none FINISHED, or the tracking server does not answer.
        ConfigError: MLflow is not installed, the server wants credentials, or no run is behind the model.
    """
    uri = store_uri(tracking_uri)
    _require_store(uri)
    wanted = f"{model_uri}, or its run," if model_uri else f"run {run_id!r}"
    with asking(uri, f"no {wanted} in {_shown(uri)}; check {'--model_uri' if model_uri else '--run_id'}"):
        client = _client(uri)
        if model_uri:
            run_id, _ = _resolve(client, model_uri)
        if run_id:
            run = client.get_run(run_id)
            experiment = client.get_experiment(run.info.experiment_id)
        else:
            experiment = _experiment(client, uri, experiment_name or "")
            latest = next(_finished(client, experiment.experiment_id, run_name), None)
            if latest is None:
                called = f" named {run_name!r}" if run_name else ""
                raise RunNotFoundError(
                    f"experiment {experiment_name!r} in {_shown(uri)} has no FINISHED run{called}; "
                    "let a training finish, or name one with --run_id"
                )
            run = latest
    info = run.info
    if info.lifecycle_stage == "deleted":
        raise RunNotFoundError(f"run {info.run_id!r} is deleted in {_shown(uri)}; restore it or name another")
    return _run(run, experiment)


def find_runs(
    experiment_name: str,
    *,
    run_name: str | None = None,
    since: date | None = None,
    until: date | None = None,
    tracking_uri: str | None = None,
) -> list[Run]:
    """Returns every FINISHED run of an experiment (of that name, between two dates in UTC), oldest first.

    Raises:
        RunNotFoundError: no such experiment, no such run, or the tracking server does not answer.
        ConfigError: MLflow is not installed, or the server wants credentials.
    """
    uri = store_uri(tracking_uri)
    _require_store(uri)
    with asking(uri, f"no experiment {experiment_name!r} in {_shown(uri)}; check --experiment_name"):
        client = _client(uri)
        experiment = _experiment(client, uri, experiment_name)
        runs = [_run(run, experiment) for run in _finished(client, experiment.experiment_id, run_name)]
    chosen = [r for r in runs if (not since or r.train_date >= since) and (not until or r.train_date <= until)]
    if not chosen:
        called = f" named {run_name!r}" if run_name else ""
        when = (f" since {since}" if since else "") + (f" until {until}" if until else "")
        raise RunNotFoundError(
            f"experiment {experiment_name!r} in {_shown(uri)} has no FINISHED run{called}{when}; it has {len(runs):,}"
        )
    return chosen[::-1]


def choose(
    runs: Sequence[Run], published: Collection[str], if_partition_taken: str
) -> tuple[list[Run], list[tuple[Run, Run]]]:
    """Returns the runs to publish, and those whose place a later run of the same date takes, each with that run.

    Args:
        runs: oldest first.
        published: ids of those that are published already; they are left out.
        if_partition_taken: "keep" publishes all runs of a date, "replace" the latest, "fail" refuses several.

    Raises:
        PartitionTakenError: several runs of one date, and "fail".
    """
    if if_partition_taken == "keep":
        return [run for run in runs if run.run_id not in published], []
    latest = {run.train_date: run for run in runs}
    superseded = [(run, latest[run.train_date]) for run in runs if latest[run.train_date] != run]
    if if_partition_taken == "fail":
        for earlier, later in superseded:
            if {earlier.run_id, later.run_id} - set(published):
                raise PartitionTakenError(
                    f"runs {earlier.run_id} and {later.run_id} are both of {later.train_date}, and a partition holds "
                    "one model; --if_partition_taken=replace publishes the latest run of each date, keep all of them"
                )
    return [run for run in latest.values() if run.run_id not in published], superseded


def tag_run(run_id: str, tags: dict[str, str], tracking_uri: str | None = None) -> None:
    """Sets tags of a run.

    Raises:
        RunNotFoundError: there is no such run, or the tracking server does not answer.
        ConfigError: it wants credentials.
    """
    uri = store_uri(tracking_uri)
    with asking(uri, f"no run {run_id!r} in {_shown(uri)}; check --run_id"):
        client = _client(uri)
        for name, value in tags.items():
            client.set_tag(run_id, name, value)


def log_comparison(
    run_id: str, values: Mapping[str, float], files: Sequence[str], folder: str, tracking_uri: str | None = None
) -> None:
    """Logs metrics of a run, and files as artifacts below a folder.

    Raises:
        RunNotFoundError: there is no such run, or the tracking server does not answer.
        ConfigError: it wants credentials.
    """
    uri = store_uri(tracking_uri)
    with asking(uri, f"no run {run_id!r} in {_shown(uri)}; check --to"):
        client = _client(uri)
        for name, value in values.items():
            client.log_metric(run_id, name, value)
        for file in files:
            client.log_artifact(run_id, file, folder)


def find_model(
    run: Run, *, artifact_path: str | None = None, model_uri: str | None = None, tracking_uri: str | None = None
) -> Model:
    """Returns where a run's model is, wherever MLflow 2 or 3 has put it.

    Args:
        run: the training.
        artifact_path: the model's name in the run: a folder of its artifacts, or the name it was logged by. None takes
            `DEFAULT_PATH`, or the run's only model whatever its name.
        model_uri: an MLflow URI of the model instead.
        tracking_uri: MLflow server or store.

    Raises:
        ArtifactMissingError: the run has no such model, or its upload was not finished.
        ConfigError: it has several, which are listed.
        RunNotFoundError: the tracking server does not answer.
    """
    uri = store_uri(tracking_uri)
    with asking(uri, f"the artifacts of run {run.run_id} are not in {_shown(uri)}; check {model_uri or 'the run'}"):
        client = _client(uri)
        if model_uri:
            _, found = _resolve(client, model_uri)
            if found.root:
                return found
            artifact_path = found.path
        return _model_of(client, uri, run, artifact_path)


def readable_folder(model: Model) -> str | None:
    """Returns the model's folder as a path that Beam opens, local or `gs://`; None if it has to be copied first."""
    uri = urlparse(model.root)
    if uri.scheme == "gs":
        root = model.root.rstrip("/")
    elif uri.scheme == "file":
        root = unquote(uri.path).rstrip("/")
    elif uri.scheme == "":
        root = os.path.abspath(model.root)
    else:
        return None
    return f"{root}/{model.path}" if model.path else root


def store_uri(tracking_uri: str | None) -> str:
    """Returns the MLflow server or store that is meant; MLFLOW_TRACKING_URI unless it is named.

    Raises:
        ConfigError: MLflow is not installed.
    """
    try:
        from mlflow.tracking import get_tracking_uri
    except ImportError as error:
        raise ConfigError("MLflow is not installed; pip install 'beam-pipeline[launcher]'") from error
    return tracking_uri or get_tracking_uri()


@contextmanager
def asking(uri: str, missing: str, *, seconds: int | None = None, retries: int = 1) -> Iterator[None]:
    """Asks MLflow with limited patience, and makes one line of whatever it raises.

    Args:
        uri: server or store, as `store_uri` returns it.
        missing: what to say when there is no such thing.
        seconds: longest silence of the server, unless MLFLOW_HTTP_REQUEST_TIMEOUT says otherwise; None for a question.
        retries: unless MLFLOW_HTTP_REQUEST_MAX_RETRIES says otherwise.

    Raises:
        ConfigError: the server wants credentials.
        RunNotFoundError: there is no such thing, or the server does not answer.
    """
    from mlflow.exceptions import MlflowException

    wanted = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(retries), "MLFLOW_HTTP_REQUEST_TIMEOUT": str(seconds or _PATIENCE)}
    # Its bars would tear the lines of the terminal and fill a log.
    wanted["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    own = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(own)
    try:
        yield
    except PipelineError:
        raise
    except Exception as error:  # Stores raise what their database or HTTP library raises.
        code = getattr(error, "error_code", None)
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = _reason(error, uri)
        if code in ("UNAUTHENTICATED", "PERMISSION_DENIED") or status in (401, 403) or "valid JSON" in reason:
            # A sign-in page is no JSON.
            raise ConfigError(
                f"MLflow at {_shown(uri)} lets nobody in with these credentials ({reason}); set MLFLOW_TRACKING_TOKEN, "
                "or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD; behind IAP or Cloud Run use "
                "--tracking_audience"
            ) from error
        if code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise RunNotFoundError(f"{missing} and --tracking_uri ({reason})") from error
        failed = "does not answer" if isinstance(error, MlflowException) else "failed"
        raise RunNotFoundError(f"MLflow at {_shown(uri)} {failed}: {reason}; check --tracking_uri") from error
    finally:
        for name in own:
            os.environ.pop(name, None)


def _client(uri: str) -> MlflowClient:
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri)


def _resolve(client: MlflowClient, model_uri: str) -> tuple[str, Model]:
    """Returns the run behind an MLflow URI and where the model is; for `runs:/` the root is empty."""
    if match := _RUNS_URI.fullmatch(model_uri):
        return match[1], Model(model_uri, "", match[2])
    if match := _LOGGED_URI.fullmatch(model_uri):
        logged = client.get_logged_model(match[1])
        if str(logged.status) != "READY":
            raise ArtifactMissingError(
                f"{model_uri} ({logged.name}) is {logged.status}: its upload was not finished; log the model again"
            )
        run_id, model = logged.source_run_id, Model(f"{model_uri} ({logged.name})", logged.artifact_location)
    elif match := _REGISTERED_URI.fullmatch(model_uri):
        name = match[1] or match[3]
        version = match[2] or _version_of_alias(client, name, match[4])
        registered = client.get_model_version(name, version)
        run_id, location = registered.run_id, client.get_model_version_download_uri(name, version)
        if location.startswith(("runs:/", "models:/")):
            behind, model = _resolve(client, location)
            run_id = run_id or behind
        else:
            if not run_id and registered.model_id:
                run_id = client.get_logged_model(registered.model_id).source_run_id
            model = Model("", location)
        model = Model(f"models:/{name}/{version}", model.root, model.path)
    else:
        raise ConfigError(
            f"--model_uri={model_uri!r}: runs:/RUN_ID/PATH, models:/NAME/VERSION, models:/NAME@ALIAS or models:/m-ID"
        )
    if not run_id:
        raise ConfigError(
            f"{model_uri} was logged outside of any run, and the run says the experiment and the date; log the model "
            "in a run, or register it with run_id"
        )
    return run_id, Model(model.name, model.root, model.path, notable=True)


def _version_of_alias(client: MlflowClient, name: str, alias: str) -> str:
    aliases = client.get_registered_model(name).aliases
    if alias not in aliases:
        there = ", ".join(f"{known} (version {version})" for known, version in sorted(aliases.items()))
        raise RunNotFoundError(
            f"registered model {name!r} has no alias {alias!r}; there are: {there or 'none'}; check --model_uri"
        )
    return str(aliases[alias])


def _model_of(client: MlflowClient, uri: str, run: Run, artifact_path: str | None) -> Model:
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    path = DEFAULT_PATH if artifact_path is None else artifact_path
    if path in ("", "."):
        return Model(".", run.artifact_uri)
    # Not the client's own list_artifacts, which mixes in the models that are logged elsewhere.
    artifacts = get_artifact_repository(run.artifact_uri, tracking_uri=uri)
    if any(file.path == path for file in artifacts.list_artifacts(path.rpartition("/")[0] or None)):
        return Model(path, run.artifact_uri, path)
    logged = _logged_models(client, run)
    name, _, below = path.partition("/")
    named = [model for model in logged if model.name == name]
    if len(named) == 1:
        return Model(name, named[0].artifact_location, below)
    folders = []
    for file in artifacts.list_artifacts():
        inside = {f.path.rpartition("/")[2] for f in artifacts.list_artifacts(file.path)} if file.is_dir else set()
        if inside.intersection(_MARKS) or file.path.endswith(".keras"):
            folders.append(file.path)
        elif file.path in _MARKS:
            folders.append(".")
    if artifact_path is None and len(folders) + len(logged) == 1:
        if logged:
            return Model(logged[0].name, logged[0].artifact_location, notable=True)
        return Model(folders[0], run.artifact_uri, "" if folders[0] == "." else folders[0], notable=True)
    there = ", ".join([*folders, *(f"{model.name} (models:/{model.model_id})" for model in logged)])
    if named or (artifact_path is None and there):
        several = f"{len(named)} models named {name!r}" if named else f"{len(folders) + len(logged)} models"
        raise ConfigError(
            f"run {run.run_id} has {several}: {there}; choose with --artifact_path=NAME or --model_uri=models:/m-ID"
        )
    raise ArtifactMissingError(
        f"{run.artifact_uri.rstrip('/')}/{path} does not hold a model: it does not exist; models of run {run.run_id}: "
        f"{there or 'none'}; choose with --artifact_path or --model_uri"
    )


def _logged_models(client: MlflowClient, run: Run) -> list[entities.LoggedModel]:
    """Returns the models that MLflow 3 keeps beside the run, those whose files are all there."""
    from mlflow.exceptions import MlflowException

    found: list[entities.LoggedModel] = []
    token = None
    while True:
        try:
            page = client.search_logged_models(
                [run.experiment_id], f"source_run_id = '{run.run_id}'", max_results=50, page_token=token
            )
        except MlflowException as error:
            if error.error_code == "ENDPOINT_NOT_FOUND":  # a server of MLflow 2, which has no such models
                return []
            raise
        found += [model for model in page if str(model.status) == "READY"]
        token = page.token
        if not token:
            return found


def _experiment(client: MlflowClient, uri: str, name: str) -> entities.Experiment:
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        known = ", ".join(sorted(e.name for e in client.search_experiments(max_results=20)))
        raise RunNotFoundError(f"no experiment {name!r} in {_shown(uri)}; there are: {known or 'none'}")
    return experiment


def _run(run: entities.Run, experiment: entities.Experiment) -> Run:
    info = run.info
    return Run(
        run_id=info.run_id,
        run_name=info.run_name or "",
        experiment_id=experiment.experiment_id,
        experiment_name=experiment.name,
        train_date=datetime.fromtimestamp(info.start_time / 1000, UTC).date(),
        artifact_uri=info.artifact_uri,
    )


def _finished(client: MlflowClient, experiment_id: str, run_name: str | None) -> Iterator[entities.Run]:
    """Yields the FINISHED runs of an experiment (of that name), latest first."""
    token = None
    while True:
        page = client.search_runs(
            [experiment_id],
            "attributes.status = 'FINISHED'",
            order_by=["attributes.start_time DESC"],
            max_results=100,
            page_token=token,
        )
        # A name is compared here rather than in the filter, whose quoting does not allow every name.
        yield from (run for run in page if not run_name or run.info.run_name == run_name)
        token = page.token
        if not token:
            return


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
    return _without_password(uri, uri)


def _reason(error: Exception, uri: str) -> str:
    """What an error says, on one line; it often quotes the URI."""
    return _without_password(" ".join(str(error).split())[:300] or type(error).__name__, uri)


def _without_password(text: str, uri: str) -> str:
    password = urlparse(uri).password
    return text.replace(f":{password}@", ":…@") if password else text
