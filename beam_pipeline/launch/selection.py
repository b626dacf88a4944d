"""Which runs are published, and which towers of their models."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass

from beam_pipeline.errors import ConfigError
from beam_pipeline.files import open_file
from beam_pipeline.formats import open_artifact
from beam_pipeline.launch import preflight
from beam_pipeline.launch.options import DEFAULT_TOWERS, Config
from beam_pipeline.launch.session import Session
from beam_pipeline.launch.sources import Sources
from beam_pipeline.reading.pieces import cover
from beam_pipeline.tracking import download
from beam_pipeline.tracking.models import Model, find_model, readable_folder
from beam_pipeline.tracking.runs import choose, find_latest_run, find_run, find_runs
from beam_pipeline.training import Run, Training, by_name

_SAYS = {"user": ("user", "query"), "item": ("item", "candidate")}


@dataclass(frozen=True)
class LeftOut:
    """A run that is not published, and why."""

    run: Run
    reason: str


@dataclass(frozen=True)
class Selected:
    """The training of a run, and what was chosen for it without being named.

    Attributes:
        training: the run and its towers.
        discovered: tower → layer, if the towers were found by the names of the model's layers.
    """

    training: Training
    discovered: Mapping[str, str] | None = None


def wanted_runs(config: Config) -> tuple[list[Run], list[LeftOut]]:
    """Returns the run that is meant, or all of an experiment, oldest first; and later ones that cannot be taken."""
    if config.all_runs:
        runs = find_runs(
            config.experiment_name or "",
            run_name=config.run_name,
            since=config.since,
            until=config.until,
            tracking_uri=config.tracking_uri,
        )
        return runs, []
    if config.experiment_name:
        latest, passed = find_latest_run(
            config.experiment_name,
            run_name=config.run_name,
            artifact_path=config.artifact_path,
            tracking_uri=config.tracking_uri,
            files=[file.path for file in config.vectors.values() if not file.path.startswith("gs://")],
            needs_model=bool(config.layers),
        )
        return [latest], [LeftOut(run, reason) for run, reason in passed]
    return [find_run(run_id=config.run_id, model_uri=config.model_uri, tracking_uri=config.tracking_uri)], []


def unpublished(config: Config, runs: Sequence[Run], session: Session) -> tuple[list[Run], list[LeftOut], int]:
    """Returns the runs of --all_runs that are to be published, those that others replace, and how many are published.

    They are published if every tower's table has rows of theirs.
    """
    days = [run.train_date for run in runs]
    tables = [session.destination.table(tower) for tower in config.towers]
    found = [preflight.partitions(session.client, table, min(days), max(days)) for table in tables]
    published = {run.run_id for run in runs if all(run.run_id in each.get(run.train_date, {}) for each in found)}
    left, superseded = choose(runs, published, config.if_partition_taken)
    replaced = [
        LeftOut(run, f"run {later.run_id} of the same date takes its place (--if_partition_taken=replace)")
        for run, later in superseded
    ]
    return left, replaced, len(published)


def read_files(config: Config, run: Run, sources: Sources) -> Selected:
    """Returns the training of a run whose towers' vectors are all in files that the trainer logged.

    Raises:
        ArtifactError: a file is not what was asked for.
    """
    towers = sources.towers_of_files(config.towers)
    return Selected(Training(run, run.artifact_uri, by_name(cover(towers))))


def read_training(config: Config, run: Run, model: Model, folder: str, sources: Sources) -> Selected:
    """Returns the training of a run whose model can be read in a folder.

    Args:
        config: what was asked for.
        run: the run.
        model: its model.
        folder: where that can be read.
        sources: the run's files beside the model.

    Raises:
        ConfigError: the workers could not read that folder.
        ArtifactError: the model, or a file, is not what was asked for.
    """
    if not config.reads_local_files and not folder.startswith("gs://"):
        sharing = ", --shared_files if the workers can read it" if config.waits else ""
        raise ConfigError(
            f"{config.runner} cannot read the local folder {folder} of run {run.run_id}; use a run whose "
            f"artifacts are on gs://{sharing}, or --runner=DirectRunner"
        )
    with closing(open_artifact(folder, open_file, unnamed_layers(config))) as artifact:
        layers = config.layers
        if config.discover:
            without_ids = artifact.embeddings_without_ids() if config.ids else []
            layers = discover([*artifact.tower_layers(), *without_ids]) or layers
        of_model = sources.towers_of_model(artifact, layers, include_oov=config.include_oov)
    found = by_name([*of_model, *sources.towers_of_files(config.towers)])
    towers = cover([found[name] for name in config.towers])
    # A folder that is no copy says where the model is more plainly than its URI.
    model_uri = readable_folder(model) or model.uri
    return Selected(Training(run, model_uri, by_name(towers)), layers if layers != config.layers else None)


def model_of(config: Config, run: Run) -> Model:
    """Returns the model of a run."""
    return find_model(
        run, artifact_path=config.artifact_path, model_uri=config.model_uri, tracking_uri=config.tracking_uri
    )


@contextmanager
def readable(config: Config, run: Run, model: Model, copies_to: str, progress: download.Progress) -> Iterator[str]:
    """Gives a folder in which this process and the workers can read a model, copied there if it has to be.

    Args:
        config: what was asked for.
        run: the model's run.
        model: the model.
        copies_to: folder for copies; removed if what follows fails.
        progress: shows the copying.
    """
    if folder := readable_folder(model):
        yield folder
        return
    with download.copied(model, f"{copies_to}/{run.run_id}", config.tracking_uri, progress) as folder:
        yield folder


def unnamed_layers(config: Config) -> tuple[str, ...]:
    """Returns the layers that may stand for a tower whose name the artifact does not keep: the default ones alone.

    A layer that was named otherwise has to be there under its name: it may be misspelt.
    """
    return tuple(config.towers.values()) if dict(config.towers) == DEFAULT_TOWERS else ()


def discover(layers: Sequence[str]) -> dict[str, str] | None:
    """Returns tower → layer for a model whose layers were not named, if there is no doubt about them.

    These are the default layers where the model has them; else the only two layers there are, if the name of one says
    user (or query) and that of the other item (or candidate). The name is the layer's own: `user_layer.city_embedding`
    is a part of a tower, not the tower of users.
    """
    if {*DEFAULT_TOWERS.values()} <= {*layers}:
        return dict(DEFAULT_TOWERS)
    found = {
        tower: [layer for layer in layers if any(word in _own_name(layer) for word in words)]
        for tower, words in _SAYS.items()
    }
    if len(layers) == 2 and all(len(those) == 1 for those in found.values()) and found["user"] != found["item"]:
        return {tower: those[0] for tower, those in found.items()}
    return None


def _own_name(layer: str) -> str:
    return re.split(r"[./]", layer)[-1].lower()
