"""Which runs are published, and which towers of their models."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace

from beam_pipeline.computing import model as computing
from beam_pipeline.computing.tower import ComputedTower, computed_tower
from beam_pipeline.errors import ConfigError, SeveralModelsError, TowerMissingError
from beam_pipeline.files import open_file
from beam_pipeline.formats import model_path, open_artifact
from beam_pipeline.formats.model import Artifact, Tower
from beam_pipeline.launch import preflight
from beam_pipeline.launch.options import DEFAULT_TOWERS, Config
from beam_pipeline.launch.session import Session
from beam_pipeline.launch.sources import Sources
from beam_pipeline.reading.pieces import cover
from beam_pipeline.tracking import download
from beam_pipeline.tracking.models import Model, find_model, readable_folder
from beam_pipeline.tracking.runs import choose, find_latest_run, find_run, find_runs
from beam_pipeline.training import Run, Training, by_name

_WORDS = {"user": ("user", "query"), "item": ("item", "candidate")}
"""What the name of a tower's layer or model says; TensorFlow's own tutorials say query and candidate."""


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
    """Returns the run that is meant, or all of an experiment, oldest first; and later ones that were passed over."""
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
            artifact_path=config.artifact_path or next(filter(None, map(_path, config.layers.values())), None),
            tracking_uri=config.tracking_uri,
            files=[file.path for file in config.vectors.values() if not file.path.startswith("gs://")],
            needs_model=bool(config.layers),
            is_one_for_each_tower=lambda names: _pair_of(config, names) is not None,
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


def read_training(
    config: Config,
    run: Run,
    models: Mapping[str, Model],
    folders: Mapping[str, str],
    sources: Sources,
    session: Session,
) -> Selected:
    """Returns the training of a run whose models can be read in folders.

    Args:
        config: what was asked for.
        run: the run.
        models: tower → its model, as `models_of` returns them.
        folders: tower → folder of its model.
        sources: files of the run that hold ids, or the vectors of towers that are in no model.
        session: asks BigQuery what a query for features returns.

    Raises:
        ConfigError: the workers could not read such a folder.
        ArtifactError: a model or a file is not what was asked for.
    """
    towers, layers = dict[str, Tower](), dict[str, str]()
    together = dict.fromkeys(folders.values())
    for folder in together:
        _require_shared(config, run, folder)
        names = [name for name in config.layers if folders[name] == folder]
        with closing(open_artifact(folder, open_file, unnamed_layers(config))) as artifact:
            chosen: Mapping[str, str]
            if len(together) > 1:
                chosen = {name: _only_layer(artifact, name, models[name], config) for name in names}
            else:
                chosen = _layers(config, artifact)
            read = {name: layer for name, layer in chosen.items() if name not in config.compute}
            computed = [
                _computed(config, session, artifact, folder, name, layer)
                for name, layer in chosen.items()
                if name in config.compute
            ]
            for tower in (
                *(sources.towers_of_model(artifact, read, include_oov=config.include_oov) if read else ()),
                *computed,
            ):
                path = f"{models[tower.name].name}:" if len(together) > 1 else ""
                layers[tower.name] = f"{path}{chosen[tower.name]}"
                towers[tower.name] = replace(
                    tower, layer=layers[tower.name], model_uri=_model_uri(models[tower.name]) if path else ""
                )
    towers |= by_name(sources.towers_of_files(config.towers))
    # In the order of the flags: the first tower of a file also reads what belongs to none, for the checksum.
    found = by_name(cover([towers[name] for name in config.towers]))
    model_uri = ", ".join(dict.fromkeys(_model_uri(models[name]) for name in config.layers))
    discovered = config.discover and (len(together) > 1 or layers != config.layers)
    return Selected(Training(run, model_uri or run.artifact_uri, found), layers if discovered else None)


def _require_shared(config: Config, run: Run, folder: str) -> None:
    if not config.reads_local_files and not folder.startswith("gs://"):
        raise ConfigError(
            f"{config.runner} cannot read the local folder {folder} of run {run.run_id}; use a run whose "
            f"artifacts are on gs://{config.sharing}, or --runner=DirectRunner"
        )


def _model_uri(model: Model) -> str:
    # A folder that is not a copy says where the model is more plainly than its URI.
    return readable_folder(model) or model.uri


def models_of(config: Config, run: Run) -> dict[str, Model]:
    """Returns the model of each tower of a run that is in one: one for all, unless towers are in models of their own.

    Without flags that is where the run has two models alone, and the name of one says user (or query) and that of the
    other item (or candidate).

    Raises:
        SeveralModelsError: the run has several models, and nothing says which is meant.
        PipelineError: what `find_model` raises.
    """
    paths = {name: _path(layer) for name, layer in config.layers.items()}
    try:
        found = {
            path: find_model(
                run,
                artifact_path=path or config.artifact_path,
                model_uri=None if path else config.model_uri,
                tracking_uri=config.tracking_uri,
            )
            for path in dict.fromkeys(paths.values())
        }
    except SeveralModelsError as error:
        pair = _pair_of(config, error.names)
        if pair is None:
            raise
        models = {
            name: find_model(run, artifact_path=path, tracking_uri=config.tracking_uri) for name, path in pair.items()
        }
        return {name: replace(model, notable=True) for name, model in models.items()}
    return {name: found[path] for name, path in paths.items()}


def _pair_of(config: Config, names: Sequence[str]) -> dict[str, str] | None:
    """Returns tower → name where a run's models are one for each tower, and no tower or model was named."""
    named = not config.discover or config.artifact_path is not None
    return _pair(names) if len(names) == 2 and not named else None


def _path(layer: str) -> str | None:
    """Returns the artifact path of a tower's own model in what --tower says."""
    path, colon, _ = layer.partition(":")
    return path.strip("/") if colon else None


def _layers(config: Config, artifact: Artifact) -> Mapping[str, str]:
    """Returns the layers of towers that are in one model."""
    if config.discover:
        without_ids = artifact.embeddings_without_ids() if config.ids else []
        return discover([*artifact.tower_layers(), *without_ids], artifact.index_layers()) or config.layers
    return {
        name: _only_layer(artifact, name, None, config) if _path(layer) else layer
        for name, layer in config.layers.items()
    }


def _only_layer(artifact: Artifact, name: str, model: Model | None, config: Config) -> str:
    """Returns the layer that was named for a tower in a model of its own, or the only one that can be meant."""
    asked = "" if config.discover else config.towers[name].rpartition(":")[2]
    if asked:
        return asked
    layers = artifact.embeddings_without_ids() if name in config.ids else artifact.tower_layers()
    if len(layers) != 1:
        layers = [layer for layer in layers if name in _WORDS and _says(layer, name)] or layers
    if len(layers) != 1:
        path = model.name if model else _path(config.towers[name])
        raise TowerMissingError(
            f"tower {name!r}: the model {path!r} has {len(layers) or 'no'} layers that are towers"
            f"{': ' if layers else ''}{', '.join(layers)}; choose with --tower={name}={path}:LAYER"
        )
    return layers[0]


@contextmanager
def readable(config: Config, run: Run, model: Model, copies_to: str, progress: download.Progress) -> Iterator[str]:
    """Yields a folder in which this process and the workers can read a model, copied there if it has to be.

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


def computed_parts(config: Config, folder: str, towers: Mapping[str, str]) -> Iterator[str]:
    """Yields lines about the parts of a model that --compute could name, if it was given, and loads it for that."""
    named = [name for name in config.compute if name in towers]
    if not named:
        return
    model = computing.loaded(model_path(folder, open_file))
    for name in named:
        yield f"computed    {name} by {towers[name]}: {model.part(name, towers[name]).signature}"
    yield from (f"could be    {part}" for part in model.parts())


def _computed(
    config: Config, session: Session | None, artifact: Artifact, folder: str, name: str, layer: str
) -> ComputedTower:
    """Returns a tower that the workers compute."""
    return computed_tower(
        name,
        layer,
        model_path(folder, open_file),
        artifact,
        config.features.get(name),
        session.client if session else None,
        session.destination.job_project if session else "",
    )


def discover(layers: Sequence[str], indexes: Collection[str] = ()) -> dict[str, str] | None:
    """Returns tower → layer for a model whose layers were not named, if there is no doubt about them.

    These are the default layers where the model has them; else the only two layers there are beside search indexes, if
    the name of one says user (or query) and that of the other item (or candidate); else the only layer there is beside
    one index, which is what the index is asked with. The name is the layer's own: `user_layer.city_embedding` is a
    part of a tower, not the tower of users.

    Args:
        layers: of the model.
        indexes: those of them that are search indexes.
    """
    if {*DEFAULT_TOWERS.values()} <= {*layers}:
        return dict(DEFAULT_TOWERS)
    beside = [layer for layer in layers if layer not in indexes]
    if len(beside) == 2 and (pair := _pair(beside)):
        return pair
    if len(beside) == len(indexes) == 1:
        (query,), (index,) = beside, indexes
        if not _says(query, "item") and not _says(index, "user"):
            return {"user": query, "item": index}
    return None


def _pair(names: Sequence[str]) -> dict[str, str] | None:
    """Returns tower → name where one name says user and another says item."""
    found = {tower: [name for name in names if _says(name, tower)] for tower in _WORDS}
    if all(len(matches) == 1 for matches in found.values()) and found["user"] != found["item"]:
        return {tower: matches[0] for tower, matches in found.items()}
    return None


def _says(layer: str, tower: str) -> bool:
    return any(word in _last_part(layer) for word in _WORDS[tower])


def _last_part(path: str) -> str:
    return re.split(r"[./]", path)[-1].lower()
