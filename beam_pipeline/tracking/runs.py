"""The MLflow side: which run is meant, and where its model is. Only the launcher asks; workers never do."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from beam_pipeline.errors import (
    ArtifactMissingError,
    ConfigError,
    PartitionTakenError,
    PipelineError,
    RunNotFoundError,
    TrackingServerError,
    UnfinishedUploadError,
)
from beam_pipeline.formats import is_hdf5, refuse_hdf5
from beam_pipeline.tracking import stores
from beam_pipeline.tracking.stores import shown
from beam_pipeline.training import Run

if TYPE_CHECKING:
    from mlflow import entities
    from mlflow.entities import FileInfo
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

# How far back the latest run that has the model is looked for. A run without artifacts takes two requests, any other
# one more for each of its folders.
_MOST_RUNS = 20
_MOST_REQUESTS = 100


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
    artifact_path: str | None = None,
    tracking_uri: str | None = None,
) -> Run:
    """Returns the run of that id, the run of a model, or the run of an experiment that `find_latest_run` returns.

    Raises:
        RunNotFoundError: no such run, experiment or model, or none is FINISHED.
        TrackingServerError: there is none at that place, or it does not respond.
        ConfigError: MLflow is not installed, the server wants credentials, or no run is behind the model.
        PipelineError: what `find_latest_run` raises.
    """
    if not run_id and not model_uri:
        run, _ = find_latest_run(
            experiment_name or "", run_name=run_name, artifact_path=artifact_path, tracking_uri=tracking_uri
        )
        return run
    uri = store_uri(tracking_uri)
    _require_store(uri)
    wanted = f"{model_uri}, or its run," if model_uri else f"run {run_id!r}"
    with asking(uri, f"no {wanted} in {shown(uri)}; check {'--model_uri' if model_uri else '--run_id'}"):
        client = _client(uri)
        run_id = _resolve(client, model_uri)[0] if model_uri else run_id or ""
        found = client.get_run(run_id)
        experiment = client.get_experiment(found.info.experiment_id)
    if found.info.lifecycle_stage == "deleted":
        _require_active(experiment, uri)  # It took its runs with it, and takes them back.
        raise RunNotFoundError(
            f"run {run_id!r} is deleted in {shown(uri)}; restore it (mlflow runs restore --run-id {run_id}) or name "
            "another"
        )
    return _run(found, experiment)


def find_latest_run(
    experiment_name: str,
    *,
    run_name: str | None = None,
    artifact_path: str | None = None,
    tracking_uri: str | None = None,
    files: Sequence[str] = (),
    needs_model: bool = True,
) -> tuple[Run, list[tuple[Run, str]]]:
    """Returns an experiment's latest FINISHED run (of that name) that has the model, and the later runs without it.

    An experiment has runs that evaluate, or try something, and log no model: each is returned with the reason why it
    was passed over. A model that cannot be published (its upload was not finished, it is an HDF5 file, it is one of
    several) is an error instead, since nobody would notice that an older training is published in its place.

    The latest 20 FINISHED runs are looked at, or fewer if their folders take more than 100 requests.

    Args:
        experiment_name: the experiment.
        run_name: of the run.
        artifact_path: as `find_model` takes it.
        tracking_uri: MLflow server or store.
        files: paths of artifacts that the run has to have, too; of a pattern, its folder.
        needs_model: False if these files are all that is wanted.

    Raises:
        RunNotFoundError: no such experiment, or no FINISHED run.
        TrackingServerError: there is none at that place, or it does not respond.
        ArtifactMissingError: none of the latest runs has the model, or the upload of the latest was not finished.
        UnsupportedModelError: the latest has it as an HDF5 file.
        ConfigError: MLflow is not installed, a store wants credentials or a library, or the latest has several models.
    """
    uri = store_uri(tracking_uri)
    _require_store(uri)
    called = f" named {run_name!r}" if run_name else ""
    passed: list[tuple[Run, str]] = []
    missing: ArtifactMissingError | None = None
    with asking(uri, f"no experiment {experiment_name!r} in {shown(uri)}; check --experiment_name"):
        client = _client(uri)
        experiment = _experiment(client, uri, experiment_name)
        requests = 0
        for found in islice(_finished(client, experiment.experiment_id, run_name), _MOST_RUNS):
            run = _run(found, experiment)
            artifacts = _Artifacts(run, uri)
            if missing_file := _missing(artifacts, files):
                passed.append((run, f"no {missing_file}"))
                requests += artifacts.requests + 1
                continue
            if not needs_model:
                return run, passed
            try:
                model = _model_of(client, artifacts, artifact_path)
                by_name = not model.notable and model.name != "."
                if by_name or _is_readable(model, artifacts, uri):
                    return run, passed
                passed.append((run, f"{model.name} holds neither a SavedModel nor a .keras file"))
            except UnfinishedUploadError:
                raise
            except ArtifactMissingError as error:
                missing = missing or error
                passed.append((run, f"no model {artifact_path!r}" if artifact_path else "no model"))
            requests += artifacts.requests + 1
            if requests >= _MOST_REQUESTS:
                break
    if not passed:
        raise RunNotFoundError(
            f"experiment {experiment_name!r} in {shown(uri)} has no FINISHED run{called}; "
            "let a training finish, or name one with --run_id"
        )
    if len(passed) == 1 and missing:
        raise missing
    run, why = passed[0]
    raise ArtifactMissingError(
        f"none of the latest {len(passed)} FINISHED runs{called} of experiment {experiment_name!r} has "
        f"{'the model' if needs_model else files[0]}; the latest, {run.run_name} ({run.run_id}): {why}; choose with "
        "--run_id, --run_name or --artifact_path"
    )


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
        RunNotFoundError: no such experiment, or no such run.
        TrackingServerError: there is none at that place, or it does not respond.
        ConfigError: MLflow is not installed, or the server wants credentials.
    """
    uri = store_uri(tracking_uri)
    _require_store(uri)
    with asking(uri, f"no experiment {experiment_name!r} in {shown(uri)}; check --experiment_name"):
        client = _client(uri)
        experiment = _experiment(client, uri, experiment_name)
        runs = [_run(run, experiment) for run in _finished(client, experiment.experiment_id, run_name)]
    chosen = [r for r in runs if (not since or r.train_date >= since) and (not until or r.train_date <= until)]
    if not chosen:
        called = f" named {run_name!r}" if run_name else ""
        when = (f" since {since}" if since else "") + (f" until {until}" if until else "")
        raise RunNotFoundError(
            f"experiment {experiment_name!r} in {shown(uri)} has no FINISHED run{called}{when}; it has {len(runs):,}"
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
        RunNotFoundError: there is no such run.
        TrackingServerError: there is none at that place, or it does not respond.
        ConfigError: it wants credentials.
    """
    uri = store_uri(tracking_uri)
    with asking(uri, f"no run {run_id!r} in {shown(uri)}; check --run_id"):
        client = _client(uri)
        for name, value in tags.items():
            client.set_tag(run_id, name, value)


def log_comparison(
    run_id: str, values: Mapping[str, float], files: Sequence[str], folder: str, tracking_uri: str | None = None
) -> None:
    """Logs metrics of a run, and files as artifacts below a folder.

    Raises:
        RunNotFoundError: there is no such run.
        TrackingServerError: there is none at that place, or it does not respond.
        ConfigError: it wants credentials.
    """
    uri = store_uri(tracking_uri)
    with asking(uri, f"no run {run_id!r} in {shown(uri)}; check --to"):
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
        UnsupportedModelError: it is an HDF5 file.
        ConfigError: it has several, which are listed; or its store cannot be read from here.
        TrackingServerError: there is none at that place, or it does not respond.
    """
    uri = store_uri(tracking_uri)
    with asking(uri, f"the artifacts of run {run.run_id} are not in {shown(uri)}; check {model_uri or 'the run'}"):
        client = _client(uri)
        if model_uri:
            _, found = _resolve(client, model_uri)
            if found.root:
                _require_mounted(client, run, found.root)
                return found
            artifact_path = found.path
        return _model_of(client, _Artifacts(run, uri), artifact_path)


def readable_folder(model: Model) -> str | None:
    """Returns the model's folder as a path that Beam opens, local or `gs://`; None if it has to be copied first."""
    root = model.root.rstrip("/") if model.root.startswith("gs://") else stores.local_folder(model.root)
    if root is None:
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
    uri = tracking_uri or get_tracking_uri()
    folder = stores.local_folder(uri) if "%" in uri else None
    return uri if folder is None else Path(folder).as_uri()


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
        RunNotFoundError: there is no such thing.
        TrackingServerError: there is none at that place, or it does not respond.
    """
    from mlflow.exceptions import MlflowException

    wanted = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(retries), "MLFLOW_HTTP_REQUEST_TIMEOUT": str(seconds or _PATIENCE)}
    # Its bars would tear the lines of the terminal and fill a log.
    wanted["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    # Some artifact stores (dbfs:/) ask the default server for credentials, and would create an empty store here for it.
    wanted["MLFLOW_TRACKING_URI"] = uri
    own = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(own)
    try:
        yield
    except PipelineError:
        raise
    except Exception as error:  # Stores raise what their database or HTTP library raises.
        code = getattr(error, "error_code", None)
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = stores.reason(error, uri)
        if code in ("UNAUTHENTICATED", "PERMISSION_DENIED") or status in (401, 403) or "valid JSON" in reason:
            # A sign-in page is no JSON.
            raise ConfigError(
                f"MLflow at {shown(uri)} lets nobody in with these credentials ({reason}); set MLFLOW_TRACKING_TOKEN, "
                "or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD; behind IAP or Cloud Run use "
                "--tracking_audience"
            ) from error
        if code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise RunNotFoundError(f"{missing} and --tracking_uri ({reason})") from error
        failed = "does not respond" if isinstance(error, MlflowException) else "failed"
        raise TrackingServerError(f"MLflow at {shown(uri)} {failed}: {reason}; check --tracking_uri") from error
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
            raise UnfinishedUploadError(_unfinished(model_uri, logged))
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


class _Artifacts:
    """The artifacts of a run, listed folder by folder.

    Attributes:
        run: the run.
        requests: how often its store was asked.
    """

    def __init__(self, run: Run, uri: str) -> None:
        self.run = run
        self.requests = 0
        # Not the client's own list_artifacts, which mixes in the models that are logged elsewhere.
        self._repository = stores.repository(run.artifact_uri, uri)

    def listed(self, folder: str = "") -> list[FileInfo]:
        """Returns the files and folders of a folder."""
        self.requests += 1
        with stores.reading(self.run.artifact_uri):
            return list(self._repository.list_artifacts(folder or None))


def _missing(artifacts: _Artifacts, files: Sequence[str]) -> str | None:
    """Returns the first of these paths that is not among the artifacts."""
    for path in files:
        parent, _, last = path.rpartition("/")
        wanted = parent if "*" in last else path
        listed = artifacts.listed(wanted.rpartition("/")[0])
        if wanted and wanted not in (file.path for file in listed):
            return path
    return None


def _model_of(client: MlflowClient, artifacts: _Artifacts, artifact_path: str | None) -> Model:
    run = artifacts.run
    path = DEFAULT_PATH if artifact_path is None else artifact_path
    _require_mounted(client, run, run.artifact_uri)
    if path in ("", "."):
        return Model(".", run.artifact_uri)
    parent = path.rpartition("/")[0]
    beside = artifacts.listed(parent)
    for file in beside:
        if file.path == path:
            inside = artifacts.listed(path) if file.is_dir else [file]
            if hdf5 := _only_hdf5(inside):
                raise refuse_hdf5(shown(f"{run.artifact_uri}/{hdf5}"))
            return Model(path, run.artifact_uri, path)
    logged = _logged_models(client, run)
    ready = [model for model in logged if str(model.status) == "READY"]
    name, _, below = path.partition("/")
    named = [model for model in ready if model.name == name]
    if len(named) == 1:
        _require_mounted(client, run, named[0].artifact_location)
        return Model(name, named[0].artifact_location, below)
    folders, hdf5s = [], []
    for file in artifacts.listed() if parent else beside:
        inside = artifacts.listed(file.path) if file.is_dir else []
        if {_name(f) for f in inside}.intersection(_MARKS) or file.path.endswith(".keras"):
            folders.append(file.path)
        elif file.path in _MARKS:
            folders.append(".")
        elif hdf5 := _only_hdf5(inside or [file]):
            hdf5s.append(hdf5)
    if artifact_path is None and len(folders) + len(ready) == 1:
        if ready:
            _require_mounted(client, run, ready[0].artifact_location)
            return Model(ready[0].name, ready[0].artifact_location, notable=True)
        return Model(folders[0], run.artifact_uri, "" if folders[0] == "." else folders[0], notable=True)
    there = ", ".join([*folders, *(f"{model.name} (models:/{model.model_id})" for model in ready)])
    if named or (artifact_path is None and there):
        several = f"{len(named)} models named {name!r}" if named else f"{len(folders) + len(ready)} models"
        raise ConfigError(
            f"run {run.run_id} has {several}: {there}; choose with --artifact_path=NAME or --model_uri=models:/m-ID"
        )
    for model in logged:
        if model not in ready and (artifact_path is None or model.name == name):
            raise UnfinishedUploadError(_unfinished(f"models:/{model.model_id}", model))
    if artifact_path is None and hdf5s:
        raise refuse_hdf5(shown(f"{run.artifact_uri}/{hdf5s[0]}"))
    raise ArtifactMissingError(
        f"{run.artifact_uri.rstrip('/')}/{path} does not hold a model: it does not exist; models of run {run.run_id}: "
        f"{there or 'none'}; choose with --artifact_path or --model_uri"
    )


def _name(file: FileInfo) -> str:
    return str(file.path).rpartition("/")[2]


def _only_hdf5(files: Sequence[FileInfo]) -> str | None:
    """Returns the path of an HDF5 file, if nothing beside it could be a model."""
    names = {_name(file): file.path for file in files}
    if not {"data", *_MARKS}.isdisjoint(names) or any(name.endswith(".keras") for name in names):
        return None
    return next((path for name, path in names.items() if is_hdf5(name)), None)


def _is_readable(model: Model, artifacts: _Artifacts, uri: str) -> bool:
    """Returns whether a model, which a run has under another name, can be a two-tower model at all."""
    if model.root != artifacts.run.artifact_uri:
        artifacts = _Artifacts(replace(artifacts.run, artifact_uri=model.root), uri)
    names = {_name(file) for file in artifacts.listed(model.path)}
    if "data" in names:  # Where MLflow puts a Keras model, as a folder or a file, and many another kind.
        names |= {f"data/{_name(file)}" for file in artifacts.listed(f"{model.path}/data".lstrip("/"))}
    return not names.isdisjoint(("saved_model.pb", "data/model")) or any(
        name.endswith(".keras") or is_hdf5(name) for name in (model.path, *names)
    )


def _unfinished(uri: str, model: entities.LoggedModel) -> str:
    return (
        f"{uri} ({model.name}) is {model.status}: its upload was not finished; log the model of run "
        f"{model.source_run_id} again, or name another"
    )


def _require_mounted(client: MlflowClient, run: Run, root: str) -> None:
    """A folder that only another machine has would look like a run that has logged nothing."""
    folder = stores.local_folder(root)
    if folder is None or os.path.exists(folder):
        return
    experiment = stores.local_folder(client.get_experiment(run.experiment_id).artifact_location)
    if experiment is None or not os.path.exists(experiment):
        raise ConfigError(f"the artifacts of run {run.run_id} cannot be read: {stores.elsewhere(root)}")


def _logged_models(client: MlflowClient, run: Run) -> list[entities.LoggedModel]:
    """Returns the models that MLflow 3 keeps beside the run, those too whose files are not all there."""
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
        found += page
        token = page.token
        if not token:
            return found


def _experiment(client: MlflowClient, uri: str, name: str) -> entities.Experiment:
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        known = ", ".join(sorted(e.name for e in client.search_experiments(max_results=20)))
        raise RunNotFoundError(f"no experiment {name!r} in {shown(uri)}; there are: {known or 'none'}")
    _require_active(experiment, uri)
    return experiment


def _require_active(experiment: entities.Experiment, uri: str) -> None:
    if experiment.lifecycle_stage == "deleted":
        number = experiment.experiment_id
        raise RunNotFoundError(
            f"experiment {experiment.name!r} in {shown(uri)} is deleted, and its runs with it; restore them (mlflow "
            f"experiments restore --experiment-id {number}) or name another"
        )


def _run(run: entities.Run, experiment: entities.Experiment) -> Run:
    info = run.info
    return Run(
        run_id=info.run_id,
        run_name=info.run_name or "",
        experiment_id=experiment.experiment_id,
        experiment_name=experiment.name,
        train_date=datetime.fromtimestamp(info.start_time / 1000, UTC).date(),
        artifact_uri=info.artifact_uri,
        status=info.status,
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
    elif uri == "databricks":  # MLflow's word for the workspace that the environment names
        exists = True
    else:
        folder = stores.local_folder(uri)
        exists = folder is None or os.path.exists(folder)
    if not exists:
        raise TrackingServerError(f"no MLflow store at {uri}; check --tracking_uri")
