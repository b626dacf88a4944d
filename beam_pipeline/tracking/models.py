"""Models in MLflow: where one is, by its name in a run or by its URI, wherever MLflow 2 or 3 keeps it."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from beam_pipeline.errors import (
    ArtifactMissingError,
    ConfigError,
    RunNotFoundError,
    SeveralModelsError,
    UnfinishedUploadError,
)
from beam_pipeline.formats import is_hdf5, refuse_hdf5
from beam_pipeline.tracking import stores
from beam_pipeline.tracking.client import connected
from beam_pipeline.tracking.stores import shown
from beam_pipeline.training import Run

if TYPE_CHECKING:
    from mlflow import entities
    from mlflow.entities import FileInfo
    from mlflow.tracking import MlflowClient

DEFAULT_PATH = "model"
"""Name of the model in a run, unless said otherwise."""

_RUNS_URI = re.compile(r"runs:/+([^/]+)/(.+?)/*")
_LOGGED_URI = re.compile(r"models:/(m-[^/@]+)")
_REGISTERED_URI = re.compile(r"models:/([^/]+)/([0-9]+)|models:/([^/]+)@([^/@]+)")

# Files by which a folder is known to be a model, as TensorFlow or MLflow lays it out.
_MARKS = ("MLmodel", "saved_model.pb")


@dataclass(frozen=True)
class Model:
    """Where a model's files are.

    Attributes:
        name: for a person: its folder in the run, the name it was logged by, or its URI.
        root: URI of a folder, as MLflow has it.
        path: the model's folder (or file) below it; empty for the folder itself. Not quoted, unlike the URI.
        notable: whether it was found by anything but its name in the run, which a person should see.
    """

    name: str
    root: str
    path: str = ""
    notable: bool = False

    @property
    def uri(self) -> str:
        """Where it is, in one piece."""
        return "/".join(filter(None, (self.root.rstrip("/"), self.path)))


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
        SeveralModelsError: it has several, which are listed.
        ConfigError: its store cannot be read from here.
        TrackingServerError: there is no server at that address, or it does not respond.
    """
    with connected(tracking_uri, f"the artifacts of run {run.run_id} are not", model_uri or "the run") as (client, uri):
        if model_uri:
            _, found = resolve(client, model_uri)
            if found.root:
                _require_mounted(client, run, found.root)
                return found
            artifact_path = found.path
        return choose_model(client, Artifacts(run, uri), artifact_path)


def readable_folder(model: Model) -> str | None:
    """Returns the model's folder as a path that Beam opens, local or `gs://`; None if it has to be copied first."""
    root = model.root.rstrip("/") if model.root.startswith("gs://") else stores.local_folder(model.root)
    if root is None:
        return None
    return f"{root}/{model.path}" if model.path else root


def resolve(client: MlflowClient, model_uri: str) -> tuple[str, Model]:
    """Returns the id of the run behind an MLflow URI and where the model is; for `runs:/` the root is empty.

    Raises:
        RunNotFoundError: there is no such alias.
        UnfinishedUploadError: the upload of the model was not finished.
        ConfigError: it is not the URI of a model, or no run is behind the model.
    """
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
            behind, model = resolve(client, location)
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
            f"{model_uri} was logged outside of any run, and the experiment and the date come from the run; log "
            "the model in a run, or register it with run_id"
        )
    return run_id, Model(model.name, model.root, model.path, notable=True)


def _version_of_alias(client: MlflowClient, name: str, alias: str) -> str:
    aliases = client.get_registered_model(name).aliases
    if alias not in aliases:
        known_aliases = ", ".join(f"{known} (version {version})" for known, version in sorted(aliases.items()))
        raise RunNotFoundError(
            f"registered model {name!r} has no alias {alias!r}; there are: {known_aliases or 'none'}; check --model_uri"
        )
    return str(aliases[alias])


class Artifacts:
    """The artifacts of a run, listed folder by folder.

    Attributes:
        run: the run.
        requests: the number of requests to its store.
    """

    def __init__(self, run: Run, uri: str) -> None:
        self.run = run
        self.requests = 0
        # Not the client's list_artifacts, which mixes in the models that are logged elsewhere.
        self._repository = stores.repository(run.artifact_uri, uri)

    def listed(self, folder: str = "") -> list[FileInfo]:
        """Returns the files and folders of a folder."""
        self.requests += 1
        with stores.reading(self.run.artifact_uri):
            return list(self._repository.list_artifacts(folder or None))

    def absent(self, paths: Sequence[str]) -> str | None:
        """Returns the first of these paths that is not there; of a pattern, its folder is looked for."""
        for path in paths:
            parent, _, last = path.rpartition("/")
            wanted = parent if "*" in last else path
            if wanted and wanted not in (file.path for file in self.listed(wanted.rpartition("/")[0])):
                return path
        return None


def choose_model(client: MlflowClient, artifacts: Artifacts, artifact_path: str | None) -> Model:
    """Returns where the model of a run is: the one of that name, or the only one.

    Raises:
        PipelineError: what `find_model` raises.
    """
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
    choices = ", ".join([*folders, *(f"{model.name} (models:/{model.model_id})" for model in ready)])
    if named or (artifact_path is None and choices):
        several = f"{len(named)} models named {name!r}" if named else f"{len(folders) + len(ready)} models"
        raise SeveralModelsError(
            f"run {run.run_id} has {several}: {choices}; choose with --artifact_path=NAME or --model_uri=models:/m-ID, "
            "or one for each tower with --tower=TOWER=NAME:LAYER",
            () if named else (*folders, *(model.name for model in ready)),
        )
    for model in logged:
        if model not in ready and (artifact_path is None or model.name == name):
            raise UnfinishedUploadError(_unfinished(f"models:/{model.model_id}", model))
    if artifact_path is None and hdf5s:
        raise refuse_hdf5(shown(f"{run.artifact_uri}/{hdf5s[0]}"))
    raise ArtifactMissingError(
        f"{run.artifact_uri.rstrip('/')}/{path} does not hold a model: it does not exist; models of run {run.run_id}: "
        f"{choices or 'none'}; choose with --artifact_path or --model_uri"
    )


def is_readable(model: Model, artifacts: Artifacts, uri: str) -> bool:
    """Returns whether a model, which a run has under another name, can be a two-tower model at all."""
    if model.root != artifacts.run.artifact_uri:
        artifacts = Artifacts(replace(artifacts.run, artifact_uri=model.root), uri)
    names = {_name(file) for file in artifacts.listed(model.path)}
    if "data" in names:  # Where MLflow puts a Keras model, as a folder or a file, and many another kind.
        names |= {f"data/{_name(file)}" for file in artifacts.listed(f"{model.path}/data".lstrip("/"))}
    return not names.isdisjoint(("saved_model.pb", "data/model")) or any(
        name.endswith(".keras") or is_hdf5(name) for name in (model.path, *names)
    )


def _name(file: FileInfo) -> str:
    return str(file.path).rpartition("/")[2]


def _only_hdf5(files: Sequence[FileInfo]) -> str | None:
    """Returns the path of an HDF5 file, if nothing beside it could be a model."""
    names = {_name(file): file.path for file in files}
    if not {"data", *_MARKS}.isdisjoint(names) or any(name.endswith(".keras") for name in names):
        return None
    return next((path for name, path in names.items() if is_hdf5(name)), None)


def _unfinished(uri: str, model: entities.LoggedModel) -> str:
    return (
        f"{uri} ({model.name}) is {model.status}: its upload was not finished; log the model of run "
        f"{model.source_run_id} again, or name another"
    )


def _require_mounted(client: MlflowClient, run: Run, root: str) -> None:
    """Raises ConfigError for a folder that only another machine has: its run would seem to have logged nothing."""
    folder = stores.local_folder(root)
    if folder is None or os.path.exists(folder):
        return
    experiment = stores.local_folder(client.get_experiment(run.experiment_id).artifact_location)
    if experiment is None or not os.path.exists(experiment):
        raise ConfigError(f"the artifacts of run {run.run_id} cannot be read: {stores.elsewhere(root)}")


def _logged_models(client: MlflowClient, run: Run) -> list[entities.LoggedModel]:
    """Returns the models that MLflow 3 keeps beside the run, including those whose upload was not finished."""
    from mlflow.exceptions import MlflowException

    found: list[entities.LoggedModel] = []
    page_token = None
    while True:
        try:
            page = client.search_logged_models(
                [run.experiment_id], f"source_run_id = '{run.run_id}'", max_results=50, page_token=page_token
            )
        except MlflowException as error:
            if error.error_code == "ENDPOINT_NOT_FOUND":  # a server of MLflow 2, which has no such models
                return []
            raise
        found += page
        page_token = page.token
        if not page_token:
            return found
