"""Which runs are published, and which towers of their models."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import replace

from google.cloud import bigquery

from beam_pipeline.bigquery.tables import Destination
from beam_pipeline.errors import ArtifactMissingError, ConfigError, NotAModelError
from beam_pipeline.files import open_file
from beam_pipeline.formats import open_artifact
from beam_pipeline.formats.model import Artifact, Tower
from beam_pipeline.launch import preflight
from beam_pipeline.launch.console import Terminal
from beam_pipeline.launch.options import DEFAULT_TOWERS, Config
from beam_pipeline.reading.pieces import cover
from beam_pipeline.tracking import download
from beam_pipeline.tracking.runs import choose, find_latest_run, find_model, find_run, find_runs, readable_folder
from beam_pipeline.training import Run, Training, by_name

_SAYS = {"user": ("user", "query"), "item": ("item", "candidate")}


def wanted_runs(config: Config, terminal: Terminal) -> list[Run]:
    """Returns the run that is meant, or all of an experiment, oldest first."""
    if config.all_runs:
        return find_runs(
            config.experiment_name or "",
            run_name=config.run_name,
            since=config.since,
            until=config.until,
            tracking_uri=config.tracking_uri,
        )
    if config.experiment_name:
        latest, passed = find_latest_run(
            config.experiment_name,
            run_name=config.run_name,
            artifact_path=config.artifact_path,
            tracking_uri=config.tracking_uri,
        )
        for run, reason in passed:
            terminal.left_out(run, reason)
        return [latest]
    return [find_run(run_id=config.run_id, model_uri=config.model_uri, tracking_uri=config.tracking_uri)]


def unpublished(
    config: Config, runs: list[Run], client: bigquery.Client, destination: Destination, terminal: Terminal
) -> list[Run]:
    """Returns those of the runs that are to be published; one that was named itself is published again."""
    if not config.all_runs:
        return runs
    days = [run.train_date for run in runs]
    there = [preflight.partitions(client, destination.table(tower), min(days), max(days)) for tower in config.towers]
    published = {run.run_id for run in runs if all(run.run_id in found.get(run.train_date, {}) for found in there)}
    left, superseded = choose(runs, published, config.if_partition_taken)
    for run, later in superseded:
        terminal.left_out(run, f"run {later.run_id} of the same date takes its place (--if_partition_taken=replace)")
    terminal.chosen(len(left), len(published))
    return left


def read_training(config: Config, run: Run, copies_to: str, stack: ExitStack, terminal: Terminal) -> Training | None:
    """Returns the run's training, its model copied if workers could not read it; None if it is left out."""
    try:
        folder, model_uri = model_folder(config, run, copies_to, stack, terminal)
        if not config.reads_local_files and not folder.startswith("gs://"):
            sharing = ", --shared_files if the workers can read it" if config.waits else ""
            raise ConfigError(
                f"{config.runner} cannot read the local folder {folder} of run {run.run_id}; use a run whose "
                f"artifacts are on gs://{sharing}, or --runner=DirectRunner"
            )
        with closing(open_artifact(folder, open_file, unnamed_layers(config))) as artifact:
            towers = _towers(config, artifact, terminal)
    except (ArtifactMissingError, NotAModelError) as error:
        if not config.all_runs:
            raise
        terminal.left_out(run, str(error))  # An experiment has runs that evaluate, or were tried by hand.
        return None
    return Training(run, model_uri, by_name(towers))


def model_folder(config: Config, run: Run, copies_to: str, stack: ExitStack, terminal: Terminal) -> tuple[str, str]:
    """Returns where the run's model is read, copied if it has to be, and where it comes from."""
    model = find_model(
        run, artifact_path=config.artifact_path, model_uri=config.model_uri, tracking_uri=config.tracking_uri
    )
    if model.notable:
        terminal.found(model)
    folder = readable_folder(model)
    if folder:
        return folder, folder
    to = f"{copies_to}/{run.run_id}"
    return stack.enter_context(download.copied(model, to, config.tracking_uri, terminal)), model.uri


def unnamed_layers(config: Config) -> tuple[str, ...]:
    """Returns the layers that may stand for a tower whose name the artifact does not keep: the default ones alone.

    A layer that was named otherwise has to be there under its name: it may be misspelt.
    """
    return tuple(config.towers.values()) if dict(config.towers) == DEFAULT_TOWERS else ()


def _towers(config: Config, artifact: Artifact, terminal: Terminal) -> tuple[Tower, ...]:
    """Returns the towers that were named, or those that the model shows without doubt."""
    wanted = config.towers
    if config.discover and (found := discover(artifact.tower_layers())) and found != wanted:
        wanted = found
        terminal.discovered(found)
    towers = [artifact.tower(name, layer, include_oov=config.include_oov) for name, layer in wanted.items()]
    tails = artifact.tails(wanted)
    return cover([replace(tower, tail=tails[tower.name]) for tower in towers])


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
