"""What runs where the job is started: from options to a job that was submitted, or is done."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing

from beam_pipeline import command, credentials, metrics, tag
from beam_pipeline.bigquery import publication
from beam_pipeline.errors import (
    ArtifactMissingError,
    NotAModelError,
    PipelineError,
    RunNotFoundError,
    UnsupportedModelError,
)
from beam_pipeline.files import open_file
from beam_pipeline.formats import open_artifact
from beam_pipeline.launch import execution, inspection, selection
from beam_pipeline.launch.console import Terminal, set_up_logging
from beam_pipeline.launch.options import Config
from beam_pipeline.launch.plan import Plan, job_name, labels, make_plan
from beam_pipeline.launch.session import Session, open_session
from beam_pipeline.launch.sources import find_sources
from beam_pipeline.pipeline import Job, build
from beam_pipeline.tracking import auth
from beam_pipeline.tracking.models import Model
from beam_pipeline.training import Run, Training

WHOLE = "the tables hold this training whole or not at all, start the job again"


def launch(config: Config) -> int:
    """Runs the command line; returns the exit code: 0, or 1 with one line on stderr."""
    set_up_logging()
    return command.exit_code(lambda: run(config), interrupted=f"interrupted; {WHOLE}")


def run(config: Config) -> None:
    """Finds the models, checks the destination, runs the job.

    Raises:
        PipelineError: whatever stopped it; nothing was published and nothing is left behind.
    """
    metrics.end_phase("import Beam and the Google clients")
    terminal = Terminal(as_json=config.plan == "json", started=config.started)
    given = execution.given_options(config)
    credentials.follow(given)
    auth.authorize(config.tracking_uri, config.tracking_audience)
    runs, left_out = selection.wanted_runs(config)
    metrics.end_phase("import MLflow, find the run")
    terminal.left_out(left_out)
    if config.inspect:
        _inspect(config, runs[-1], terminal)
        return
    with open_session(config, given, create_dataset=True) as session, ExitStack() as copies:
        metrics.end_phase("find the dataset")
        wanted = _unpublished(config, runs, session, terminal)
        trainings = [*_trainings(config, wanted, session, copies, terminal)]
        metrics.end_phase("read the graph and the index")
        if not trainings:
            if len(wanted) == len(runs):
                raise RunNotFoundError(f"none of {len(runs):,} runs of {config.experiment_name!r} has a model")
            terminal.nothing_to_do(len(runs) - len(wanted), len(wanted))
            if not config.plan:
                name = job_name(config, session.token, given, runs)
                execution.submit_nothing(execution.job_options(config, session, name, labels(config, runs)))
            return
        plan = make_plan(config, session, given, runs, trainings)
        metrics.end_phase("check the tables")
        terminal.report(plan, with_sql=config.plan is not None)
        if plan.findings.error:
            raise plan.findings.error
        if config.plan:
            publication.discard_copy(plan.publication.copy)
            return
        _execute(config, session, plan, terminal)


def _inspect(config: Config, run: Run, terminal: Terminal) -> None:
    models = selection.models_of(config, run)
    with ExitStack() as stack:
        copies_to = stack.enter_context(tempfile.TemporaryDirectory())
        folders = _folders(config, run, models, copies_to, stack, terminal)
        sources = find_sources(config, run, copies_to, stack, terminal.copying)
        for folder in dict.fromkeys(folders.values()):
            artifact = stack.enter_context(closing(open_artifact(folder, open_file, selection.unnamed_layers(config))))
            towers = {
                name: layer.rpartition(":")[2] for name, layer in config.layers.items() if folders[name] == folder
            }
            lines = [
                *inspection.describe(artifact, folder, open_file, towers, sources),
                *selection.computed_parts(config, folder, towers),
            ]
            terminal.inspected(run, folder, lines)
        if config.vectors:
            of_files = sources.towers_of_files(config.towers)
            terminal.inspected(run, run.artifact_uri, inspection.describe_files(of_files, open_file))


def _folders(
    config: Config, run: Run, models: Mapping[str, Model], copies_to: str, copies: ExitStack, terminal: Terminal
) -> dict[str, str]:
    """Returns tower → folder in which its model can be read; copies stay until `copies` is closed."""
    folders = dict[Model, str]()
    several = len({*models.values()}) > 1
    for number, model in enumerate(dict.fromkeys(models.values())):
        terminal.found(model)
        to = f"{copies_to}/{number}" if several else copies_to
        folders[model] = copies.enter_context(selection.readable(config, run, model, to, terminal.copying))
    return {name: folders[model] for name, model in models.items()}


def _unpublished(config: Config, runs: Sequence[Run], session: Session, terminal: Terminal) -> Sequence[Run]:
    """Returns those of the runs that are to be published; one that was named itself is published again."""
    if not config.all_runs:
        return runs
    wanted, replaced, published = selection.unpublished(config, runs, session)
    terminal.left_out(replaced)
    terminal.chosen(len(wanted), published)
    return wanted


def _trainings(
    config: Config, runs: Sequence[Run], session: Session, copies: ExitStack, terminal: Terminal
) -> Iterator[Training]:
    """Yields the trainings of runs, as each was looked at; copies of models stay until `copies` is closed."""
    copies_to = publication.copies_folder(session.temp_location, session.token)
    for run in runs:
        try:
            models = selection.models_of(config, run)
            folders = _folders(config, run, models, copies_to, copies, terminal)
            sources = find_sources(config, run, copies_to, copies, terminal.copying)
            selected = selection.read_training(config, run, models, folders, sources, session)
        except (ArtifactMissingError, NotAModelError, UnsupportedModelError) as error:
            if not config.all_runs:
                raise
            # An experiment has runs that evaluate, or were tried by hand.
            terminal.left_out([selection.LeftOut(run, str(error))])
            continue
        terminal.discovered(selected.discovered)
        yield selected.training


def _execute(config: Config, session: Session, plan: Plan, terminal: Terminal) -> None:
    """Runs the job and waits for it, or submits it where it runs without this process."""
    options = execution.job_options(config, session, plan.job_name, plan.labels)
    job = Job(plan.publication, config.writer)
    if not config.waits:
        terminal.submitted(execution.submit(lambda pipeline: build(pipeline, job), options), config.runner)
        return
    if config.warehouse:  # Nobody else is here, and nothing expires.
        publication.discard_all(session.client, plan.publication)
    result = execution.run(
        lambda pipeline: build(pipeline, job),
        options,
        progress=terminal.progress(plan.publication),
        clean_up=lambda: publication.discard(session.client, plan.publication, plan.job_name),
        cancel=not config.local,
        whole=WHOLE,
    )
    terminal.summary(
        plan.publication,
        {tower: metrics.committed(result, f"write-rows-{tower}") for tower in plan.publication.towers},
    )
    if config.tag_run:
        _tag(config, session, plan.publication.trainings)


def _tag(config: Config, session: Session, trainings: Sequence[Training]) -> None:
    """Tags the runs; what is published stays published if MLflow refuses."""
    for training in trainings:
        try:
            tag.tag(session.client, session.destination, training.run.run_id, config.tracking_uri)
        except PipelineError as error:
            print(f"warning: published, but the run has no tags: {error}", file=sys.stderr)
