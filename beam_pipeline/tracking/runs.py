"""Runs in MLflow: the ones to publish, and the tags and metrics that a job adds to them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import UTC, date, datetime
from itertools import islice
from typing import TYPE_CHECKING

from beam_pipeline.errors import (
    ArtifactMissingError,
    PartitionTakenError,
    RunNotFoundError,
    SeveralModelsError,
    UnfinishedUploadError,
)
from beam_pipeline.tracking.client import connected
from beam_pipeline.tracking.models import Artifacts, choose_model, is_readable, resolve
from beam_pipeline.tracking.stores import shown
from beam_pipeline.training import Run

if TYPE_CHECKING:
    from mlflow import entities
    from mlflow.tracking import MlflowClient

# How far back the latest run that has the model is looked for. A run without artifacts takes two requests, any other
# one more for each of its folders.
_MOST_RUNS = 20
_MOST_REQUESTS = 100


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
        TrackingServerError: there is no server at that address, or it does not respond.
        ConfigError: MLflow is not installed, the server wants credentials, or no run is behind the model.
        PipelineError: what `find_latest_run` raises.
    """
    if not run_id and not model_uri:
        run, _ = find_latest_run(
            experiment_name or "", run_name=run_name, artifact_path=artifact_path, tracking_uri=tracking_uri
        )
        return run
    wanted, flag = (f"{model_uri}, or its run,", "--model_uri") if model_uri else (f"run {run_id!r}", "--run_id")
    with connected(tracking_uri, f"no {wanted}", flag) as (client, uri):
        run_id = resolve(client, model_uri)[0] if model_uri else run_id or ""
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
    is_one_for_each_tower: Callable[[Sequence[str]], bool] = lambda _: False,
) -> tuple[Run, list[tuple[Run, str]]]:
    """Returns an experiment's latest FINISHED run (of that name) that has the model, and the later runs without it.

    An experiment has runs that evaluate, or try something, and log no model: each is returned with the reason why it
    was passed over. A model that cannot be published (its upload was not finished, it is an HDF5 file, it is one of
    several) is an error instead, since nobody would notice that an older training is published in its place.

    The latest 20 FINISHED runs are looked at, or fewer if their folders take more than 100 requests. Of several models
    `is_one_for_each_tower` says, by their names, that they are meant together.

    Args:
        experiment_name: the experiment.
        run_name: of the run.
        artifact_path: as `find_model` takes it.
        tracking_uri: MLflow server or store.
        files: paths of artifacts that the run has to have, too; of a pattern, its folder.
        needs_model: False if these files are all that is wanted.
        is_one_for_each_tower: whether several models, by their names, are meant together.

    Raises:
        RunNotFoundError: no such experiment, or no FINISHED run.
        TrackingServerError: there is no server at that address, or it does not respond.
        ArtifactMissingError: none of the latest runs has the model, or the upload of the latest was not finished.
        UnsupportedModelError: the latest has it as an HDF5 file.
        ConfigError: MLflow is not installed, a store wants credentials or a library, or the latest has several models.
    """
    called = f" named {run_name!r}" if run_name else ""
    passed: list[tuple[Run, str]] = []
    missing: ArtifactMissingError | None = None
    with connected(tracking_uri, f"no experiment {experiment_name!r}", "--experiment_name") as (client, uri):
        experiment = _experiment(client, uri, experiment_name)
        requests = 0
        for found in islice(_finished(client, experiment.experiment_id, run_name), _MOST_RUNS):
            run = _run(found, experiment)
            artifacts = Artifacts(run, uri)
            if absent := artifacts.absent(files):
                missing = missing or ArtifactMissingError(f"{run.artifact_uri}/{absent} does not exist")
                passed.append((run, f"no {absent}"))
                requests += artifacts.requests + 1
                continue
            if not needs_model:
                return run, passed
            try:
                model = choose_model(client, artifacts, artifact_path)
                by_name = not model.notable and model.name != "."
                if by_name or is_readable(model, artifacts, uri):
                    return run, passed
                passed.append((run, f"{model.name} holds neither a SavedModel nor a .keras file"))
            except SeveralModelsError as error:
                if not is_one_for_each_tower(error.names):
                    raise
                return run, passed
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
        TrackingServerError: there is no server at that address, or it does not respond.
        ConfigError: MLflow is not installed, or the server wants credentials.
    """
    with connected(tracking_uri, f"no experiment {experiment_name!r}", "--experiment_name") as (client, uri):
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
        TrackingServerError: there is no server at that address, or it does not respond.
        ConfigError: it rejected the credentials.
    """
    with connected(tracking_uri, f"no run {run_id!r}", "--run_id") as (client, _):
        for name, value in tags.items():
            client.set_tag(run_id, name, value)


def log_comparison(
    run_id: str, values: Mapping[str, float], files: Sequence[str], folder: str, tracking_uri: str | None = None
) -> None:
    """Logs metrics of a run, and files as artifacts below a folder.

    Raises:
        RunNotFoundError: there is no such run.
        TrackingServerError: there is no server at that address, or it does not respond.
        ConfigError: it rejected the credentials.
    """
    with connected(tracking_uri, f"no run {run_id!r}", "--to") as (client, _):
        for name, value in values.items():
            client.log_metric(run_id, name, value)
        for file in files:
            client.log_artifact(run_id, file, folder)


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
    started = datetime.fromtimestamp(info.start_time / 1000, UTC)
    return Run(
        run_id=info.run_id,
        run_name=info.run_name or "",
        experiment_id=experiment.experiment_id,
        experiment_name=experiment.name,
        train_date=started.date(),
        started=started,
        artifact_uri=info.artifact_uri,
        status=info.status,
    )


def _finished(client: MlflowClient, experiment_id: str, run_name: str | None) -> Iterator[entities.Run]:
    """Yields the FINISHED runs of an experiment (of that name), latest first."""
    page_token = None
    while True:
        page = client.search_runs(
            [experiment_id],
            "attributes.status = 'FINISHED'",
            order_by=["attributes.start_time DESC"],
            max_results=100,
            page_token=page_token,
        )
        # A name is compared here rather than in the filter, whose quoting does not allow every name.
        yield from (run for run in page if not run_name or run.info.run_name == run_name)
        page_token = page.token
        if not page_token:
            return
