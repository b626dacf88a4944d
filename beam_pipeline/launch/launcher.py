"""What runs where the job is started: from options to a job that was submitted, or is done."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import (
    GoogleCloudOptions,
    PipelineOptions,
    SetupOptions,
    StandardOptions,
    WorkerOptions,
)
from google.cloud import bigquery

from beam_pipeline import __version__, command, credentials, emulators, errors, metrics, tag
from beam_pipeline.bigquery import publication
from beam_pipeline.bigquery.publication import Publication
from beam_pipeline.errors import ConfigError, JobActiveError, PipelineError, RunNotFoundError
from beam_pipeline.files import open_file
from beam_pipeline.formats import open_artifact
from beam_pipeline.launch import inspection, preflight, selection
from beam_pipeline.launch.console import Terminal, set_up_logging
from beam_pipeline.launch.options import Config
from beam_pipeline.pipeline import Job, build
from beam_pipeline.tracking import auth
from beam_pipeline.training import Run


def launch(config: Config) -> int:
    """Runs the command line; returns the exit code: 0, or 1 with one line on stderr."""
    set_up_logging()
    return command.exit_code(lambda: run(config), interrupted=f"interrupted; {_WHOLE}")


_WHOLE = "the tables hold this training whole or not at all, start the job again"


def run(config: Config) -> None:
    """Finds the models, checks the destination, runs the job.

    Raises:
        PipelineError: whatever stopped it; nothing was published and nothing is left behind.
    """
    terminal = Terminal(as_json=config.plan == "json", started=config.started)
    options = _beam_options(config)
    credentials.follow(options)
    auth.authorize(config.tracking_uri, config.tracking_audience)
    found = selection.wanted_runs(config, terminal)
    if config.inspect:
        _inspect(config, found[-1], terminal)
        return
    with ExitStack() as stack:
        cloud = options.view_as(GoogleCloudOptions)
        if config.warehouse:
            warehouse = stack.enter_context(emulators.Warehouse(config.warehouse))
            cloud.temp_location = warehouse.temp_location
        emulators.connect_if_emulated()
        # --project stays as it was given: a Flex Template's launcher may not change it.
        cloud.project, project = preflight.find_projects(cloud.project, config.dataset_project)
        if not (cloud.temp_location or "").startswith("gs://"):
            raise ConfigError("load files need a bucket: --temp_location=gs://BUCKET/FOLDER")
        destination = preflight.find_destination(
            project,
            config.dataset,
            config.table_prefix,
            billing_project=config.project,
            suffix=config.table_suffix,
            staging_dataset=config.staging_dataset,
            make_dataset=bool(config.warehouse),
        )
        client = publication.make_client(destination)
        runs = selection.unpublished(config, found, client, destination, terminal)
        token = uuid.uuid4().hex[:12]
        name = cloud.job_name or _job_name(config, found)
        # Here a job's name tells its temporary tables from those of another launch; on Dataflow it is left as asked.
        cloud.job_name = f"{name}-{token}" if config.waits else name
        # Of two labels with one key, Beam takes the later.
        cloud.labels = [*_labels(config, found), *(cloud.labels or [])]
        cloud.dataflow_kms_key = cloud.dataflow_kms_key or config.kms_key
        copies_to = publication.copies_folder(cloud.temp_location, token)
        read = (selection.read_training(config, run, copies_to, stack, terminal) for run in runs)
        trainings = [training for training in read if training]
        if not trainings:
            if len(runs) == len(found):
                raise RunNotFoundError(f"none of {len(runs):,} runs of {config.experiment_name!r} has a model")
            terminal.nothing_to_do(len(found) - len(runs), len(runs))
            if not config.plan:
                submit_nothing(options)
            return
        what = Publication(
            destination=destination,
            trainings=tuple(trainings),
            temp_location=cloud.temp_location,
            if_partition_taken=config.if_partition_taken,
            token=token,
            job_name=cloud.job_name,
            partition_expiration_days=config.partition_expiration_days,
            require_partition_filter=config.require_partition_filter,
            kms_key=config.kms_key,
        )
        findings = preflight.examine(
            client,
            what,
            allow_dimension_change=config.allow_dimension_change,
            distributed=not config.local,
            region=cloud.region if config.runner == "DataflowRunner" else None,
            dataflow_kms_key=cloud.dataflow_kms_key,
            embedding_rows=config.embedding_rows,
            discovered=config.discover,
            dataflow=not config.waits,
        )
        terminal.report(what, findings)
        if config.plan:
            terminal.sql(what)
        if findings.error:
            raise findings.error
        if config.plan:
            publication.discard_copy(what.copy)
            return
        if config.warehouse:
            publication.discard_all(client, what)
        job = Job(what, config.writer)
        if config.waits:
            _run(job, options, client, terminal, cancel=not config.local)
            if config.tag_run:
                _tag(config, job, client)
        else:
            pipeline = beam.Pipeline(options=options)
            build(pipeline, job)
            terminal.submitted(submit(pipeline, name), config.runner)


def _job_name(config: Config, runs: Sequence[Run]) -> str:
    """Returns a name that Dataflow takes, the same for every launch of a run, so that it refuses a second active one.

    The rule is `[a-z]([-a-z0-9]{0,1022}[a-z0-9])?`
    (https://cloud.google.com/dataflow/docs/reference/rest/v1b3/projects.jobs); MLflow's ids are 32 hexadecimal digits,
    but a store may have others.
    """
    what = f"experiment-{runs[0].experiment_id}" if config.all_runs else runs[0].run_id
    return f"{publication.JOB_NAME}-{re.sub('[^a-z0-9]+', '-', what.lower())}"[:100].rstrip("-")


def _labels(config: Config, runs: Sequence[Run]) -> list[str]:
    """Returns labels that say what a Dataflow job publishes, as `key=value` of letters that Dataflow takes."""
    labels = {
        **({} if config.all_runs else {"run_id": runs[0].run_id}),
        "experiment": runs[0].experiment_name,
        "dataset": config.dataset,
        "pipeline_version": __version__,
    }
    return [f"{key}={re.sub('[^a-z0-9_-]', '-', value.lower())[:63]}" for key, value in labels.items()]


def _inspect(config: Config, run: Run, terminal: Terminal) -> None:
    with ExitStack() as stack:
        copies_to = stack.enter_context(tempfile.TemporaryDirectory())
        folder, _ = selection.model_folder(config, run, copies_to, stack, terminal)
        artifact = stack.enter_context(closing(open_artifact(folder, open_file, selection.unnamed_layers(config))))
        terminal.inspected(run, folder, inspection.describe(artifact, folder, open_file, config.towers))


def submit_nothing(options: PipelineOptions) -> None:
    """Submits an empty job where a template's launcher has to write one, and nothing elsewhere.

    A Flex Template whose launcher writes no job is reported as FAILED, although this launch found all work done.
    """
    if not options.view_as(GoogleCloudOptions).template_location:
        return
    options.view_as(WorkerOptions).num_workers = 1
    pipeline = beam.Pipeline(options=options)
    _ = pipeline | "Nothing to do" >> beam.Create([])
    pipeline.run()


def submit(pipeline: beam.Pipeline, name: str) -> Any:
    """Submits a job, which must be the only active one of its name; returns Beam's result.

    Raises:
        JobActiveError: another launch is under way.
    """
    try:
        return pipeline.run()
    except Exception as error:
        # Dataflow's own words, with gRPC and REST, and Beam's when it recognises another launch in the answer.
        if "active job named" in str(error):
            raise JobActiveError(
                f"a job {name} is active on Dataflow already; wait until it has ended, or cancel it, and start again"
            ) from error
        raise


def _run(job: Job, options: PipelineOptions, client: bigquery.Client, terminal: Terminal, *, cancel: bool) -> None:
    """Runs the job and waits for it; cleans up after it if it fails.

    Args:
        job: what is run.
        options: Beam's, the runner among them.
        client: for the dataset.
        terminal: shows how far the job is.
        cancel: the job runs outside of this process, and has to be told when this process is interrupted.
    """
    result: Any = None
    dead: list[str] = []
    try:
        pipeline = beam.Pipeline(options=options)
        build(pipeline, job)
        with terminal.progress(job.publication), _noticing_dead_workers(dead):
            result = pipeline.run()
            result.wait_until_finish()
    except BaseException as error:
        if cancel and result and not isinstance(error, Exception):
            _cancel(result)
        job_name = options.view_as(GoogleCloudOptions).job_name
        try:
            publication.discard(client, job.publication, job_name)
        except Exception as left:  # What stopped the job is what has to be told.
            logging.getLogger(__name__).warning("staging tables and load files are left, they expire: %s", left)
        if dead:
            raise PipelineError(f"the job failed: {dead[0]}; {_WHOLE}") from error
        if isinstance(error, Exception):
            raise reason(error, _WHOLE) from error
        raise
    rows = {tower: metrics.committed(result, f"write-rows-{tower}") for tower in job.publication.towers}
    terminal.summary(job.publication, rows)


@contextmanager
def _noticing_dead_workers(dead: list[str]) -> Iterator[None]:
    """Interrupts a job of DirectRunner's multi_processing whose worker died; appends what Beam says of it.

    Beam raises that in the thread that watches the worker, and waits for the worker's answer for ever.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Only the main thread can be interrupted.
        return
    main, before = threading.get_ident(), threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if not isinstance(args.exc_value, RuntimeError) or "Worker subprocess exited" not in str(args.exc_value):
            before(args)
            return
        dead.append(str(args.exc_value))
        if len(dead) == 1:
            signal.pthread_kill(main, signal.SIGUSR1)

    # Not SIGINT: a shell starts what it runs in the background deaf to that.
    handler = signal.signal(signal.SIGUSR1, signal.default_int_handler)
    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before
        signal.signal(signal.SIGUSR1, handler)


def _cancel(result: Any) -> None:
    try:
        result.cancel()
    except Exception as error:  # The job cannot publish without its staging tables, which are dropped next.
        logging.getLogger(__name__).warning("the job was not cancelled: %s", error)


def _tag(config: Config, job: Job, client: bigquery.Client) -> None:
    """Tags the runs; what is published stays published if MLflow refuses."""
    for training in job.publication.trainings:
        try:
            tag.tag(client, job.publication.destination, training.run.run_id, config.tracking_uri)
        except PipelineError as error:
            print(f"warning: published, but the run has no tags: {error}", file=sys.stderr)


def _beam_options(config: Config) -> PipelineOptions:
    options = PipelineOptions(list(config.beam_args))
    # DirectRunner itself is a switch, which on a machine with internet downloads another runner and runs there.
    options.view_as(StandardOptions).runner = "FnApiRunner" if config.local else config.runner
    setup = options.view_as(SetupOptions)
    if setup.setup_file:
        # Beam changes to the file's folder, and neither to "", the folder of setup.py, nor twice to a relative one.
        setup.setup_file = os.path.abspath(setup.setup_file)
        if not os.path.isfile(setup.setup_file):
            raise ConfigError(f"--setup_file={setup.setup_file}: there is no such file; leave it out with an image")
    return options


_STEP = re.compile(r"(?: \[while running '[^']*'\])+$", re.MULTILINE)
"""What Beam adds to the message of an exception, once for each step that it passes."""


def reason(error: Exception, whole: str) -> PipelineError:
    """Returns the error that stopped a job, which Beam hands over as the text of a traceback.

    Args:
        error: what running the job raised.
        whole: what is said of the tables after an error that is not ours.
    """
    if isinstance(error, PipelineError):
        return error
    lines = [line for line in _STEP.sub("", str(error)).splitlines() if line.strip()]
    for line in reversed(lines):
        if named := re.match(r"beam_pipeline\.errors\.(\w+): (.*)", line):
            return getattr(errors, named[1], PipelineError)(named[2])
    last = _last_exception(lines) or type(error).__name__
    if last.startswith("KeyboardInterrupt"):
        raise KeyboardInterrupt from error
    logging.getLogger(__name__).info("the job failed", exc_info=error)
    return PipelineError(f"the job failed: {last}; {whole}")


def _last_exception(lines: list[str]) -> str:
    """Returns the exception at the end of a traceback, whose message may have several lines; all of another text."""
    frames = [number for number, line in enumerate(lines) if re.match(r'\s+File "', line)]
    message = lines[frames[-1] + 1 :] if frames else lines
    while frames and message and message[0][0].isspace():  # the frame's code
        message = message[1:]
    return " ".join(line.strip() for line in message)
