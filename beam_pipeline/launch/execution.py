"""Runs a pipeline, or submits it: Beam's options, waiting, cleaning up after a failure, and what its error means."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import apache_beam as beam
import grpc
from apache_beam.options.pipeline_options import (
    GoogleCloudOptions,
    PipelineOptions,
    PortableOptions,
    SetupOptions,
    StandardOptions,
    WorkerOptions,
)

from beam_pipeline import __version__, emulators, errors, metrics, workers
from beam_pipeline.errors import ConfigError, JobActiveError, PipelineError
from beam_pipeline.launch.options import JobConfig
from beam_pipeline.launch.session import Session

_CONNECT_SECONDS = 10

Build = Callable[[beam.Pipeline], object]
"""Builds a graph into a pipeline."""


def given_options(config: JobConfig) -> PipelineOptions:
    """Returns Beam's options as they were given.

    Raises:
        ConfigError: there is no such --setup_file.
    """
    options = PipelineOptions(list(config.beam_args))
    # DirectRunner itself is a switch, which on a machine with internet downloads another runner and runs there.
    options.view_as(StandardOptions).runner = "FnApiRunner" if config.local else config.runner
    setup = options.view_as(SetupOptions)
    if setup.setup_file:
        # Beam changes into the file's folder: it cannot to "", the folder of setup.py, nor twice to a relative one.
        setup.setup_file = os.path.abspath(setup.setup_file)
        if not os.path.isfile(setup.setup_file):
            raise ConfigError(f"--setup_file={setup.setup_file}: there is no such file; leave it out with an image")
    return options


def job_options(config: JobConfig, session: Session, name: str, labels: Sequence[str]) -> PipelineOptions:
    """Returns Beam's options for a job: those that were given, and what its session and its name add.

    Args:
        config: what was asked for.
        session: of the launch.
        name: from `job_name`.
        labels: of a Dataflow job, as `key=value`.
    """
    options = given_options(config)
    cloud = options.view_as(GoogleCloudOptions)
    # As it was given, if it was: a Flex Template's launcher may not change it.
    cloud.project = session.project
    cloud.temp_location = session.temp_location
    if emulators.emulated():  # They have no accounts, and Beam would ask Google for a token all the same.
        cloud.impersonate_service_account = None
    cloud.job_name = name
    # Of two labels with one key, Beam takes the later.
    cloud.labels = [*labels, *(cloud.labels or [])]
    cloud.dataflow_kms_key = cloud.dataflow_kms_key or config.kms_key
    return options


def job_name(config: JobConfig, token: str, given: PipelineOptions, subject: str) -> str:
    """Returns the job's name: --job_name, or one that is the same for every launch of a subject.

    Dataflow refuses a second active job of a name. Where this process waits for the job, the name ends in the launch's
    token, by which Beam's temporary tables are told from those of another launch.

    The rule is `[a-z]([-a-z0-9]{0,1022}[a-z0-9])?`
    (https://cloud.google.com/dataflow/docs/reference/rest/v1b3/projects.jobs); MLflow's ids are 32 hexadecimal digits,
    but a store may have others.
    """
    name = given.view_as(GoogleCloudOptions).job_name or re.sub("[^a-z0-9]+", "-", subject.lower())[:100].rstrip("-")
    return f"{name}-{token}" if config.waits else name


def job_labels(config: JobConfig, run_id: str | None, experiment: str | None) -> tuple[str, ...]:
    """Returns labels that say what a Dataflow job is about, as `key=value`, of letters that Dataflow takes.

    Args:
        config: what was asked for.
        run_id: of the run, if it is about one.
        experiment: the run's, or that of all runs.
    """
    values = {"run_id": run_id, "experiment": experiment, "dataset": config.dataset, "pipeline_version": __version__}
    return tuple(
        f"{key}={re.sub('[^a-z0-9_-]', '-', value.lower())[:63]}" for key, value in values.items() if value is not None
    )


def require_job_service(options: PipelineOptions) -> None:
    """Connects to the job service that the options name, for which Beam would wait five minutes.

    Raises:
        ConfigError: nothing answers there.
    """
    endpoint = options.view_as(PortableOptions).job_endpoint
    if not endpoint or endpoint == "embed":  # in this process
        return
    host, _, port = endpoint.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--job_endpoint={endpoint}: no job service answers there ({error}); start one, or correct HOST:PORT"
        ) from error


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


def submit(build: Build, options: PipelineOptions) -> Any:
    """Submits a job, which must be the only active one of its name; returns Beam's result.

    Raises:
        JobActiveError: another launch is under way.
    """
    pipeline = beam.Pipeline(options=options)
    build(pipeline)
    try:
        return pipeline.run()
    except Exception as error:
        # Dataflow's own wording, with gRPC and REST, and Beam's when it recognises another launch in the response.
        if "active job named" in str(error):
            name = options.view_as(GoogleCloudOptions).job_name
            raise JobActiveError(
                f"a job {name} is active on Dataflow already; wait until it has ended, or cancel it, and start again"
            ) from error
        raise


def run(
    build: Build,
    options: PipelineOptions,
    *,
    progress: AbstractContextManager[None],
    clean_up: Callable[[], None],
    cancel: bool,
    whole: str,
) -> Any:
    """Runs a job and waits for it; cleans up after it if it fails; returns Beam's result.

    Args:
        build: the graph.
        options: Beam's, the runner among them.
        progress: shows how far the job is.
        clean_up: removes what a failed job has left.
        cancel: the job runs outside of this process, and has to be cancelled when this process is interrupted.
        whole: what is said of the tables after an error that is not ours.

    Raises:
        PipelineError: why the job failed.
    """
    result: Any = None
    dead: list[str] = []
    try:
        require_job_service(options)
        pipeline = beam.Pipeline(runner=workers.runner(options), options=options)
        build(pipeline)
        metrics.end_phase("build the job graph")
        with progress, _noticing_dead_workers(dead):
            result = pipeline.run()
            result.wait_until_finish()
        metrics.end_phase("clean up, end the job")
    except BaseException as error:
        if cancel and result and not isinstance(error, Exception):
            _cancel(result)
        try:
            clean_up()
        except Exception as left:  # What stopped the job is what has to be reported.
            logging.getLogger(__name__).warning("staging tables and files remain until they expire: %s", left)
        if dead:
            raise PipelineError(f"the job failed: {dead[0]}; {whole}") from error
        if isinstance(error, Exception):
            raise reason(error, whole) from error
        raise
    return result


@contextmanager
def _noticing_dead_workers(dead: list[str]) -> Iterator[None]:
    """Interrupts a job of DirectRunner's multi_processing whose worker died; appends Beam's message about it.

    Beam raises it in the thread that watches the worker, while the job waits forever for that worker's answer, and then
    for the other workers to end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Only the main thread can be interrupted.
        return
    main, before = threading.get_ident(), threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if isinstance(args.exc_value, grpc.RpcError):  # The main thread, which waits at the same place, reports it.
            logging.getLogger(__name__).info("a connection of the job ended", exc_info=args.exc_value)
            return
        if not isinstance(args.exc_value, RuntimeError) or "Worker subprocess exited" not in str(args.exc_value):
            before(args)
            return
        dead.append(str(args.exc_value))
        if len(dead) == 1:
            end_workers()
            signal.pthread_kill(main, signal.SIGUSR1)

    # Not SIGINT: a shell makes what it starts in the background ignore that.
    handler = signal.signal(signal.SIGUSR1, signal.default_int_handler)
    threading.excepthook = hook
    try:
        with workers.watching_the_job() as end_workers:
            yield
    finally:
        threading.excepthook = before
        signal.signal(signal.SIGUSR1, handler)


def _cancel(result: Any) -> None:
    try:
        result.cancel()
    except Exception as error:  # The job cannot publish without its staging tables, which are dropped next.
        logging.getLogger(__name__).warning("the job was not cancelled: %s", error)


_STEP = re.compile(r"(?: \[while running '[^']*'\])+$", re.MULTILINE)
"""What Beam appends to the message of an exception, once for each step that it passes."""


def reason(error: Exception, whole: str) -> PipelineError:
    """Returns the error that stopped a job, which Beam hands over as the text of a traceback.

    Args:
        error: what running the job raised.
        whole: what is said of the tables after an error that is not ours.
    """
    if isinstance(error, PipelineError):
        return error
    if isinstance(error, grpc.RpcError):  # Only a call that answers has details.
        details = error.details() if isinstance(error, grpc.Call) else type(error).__name__
        return PipelineError(f"the job service ended, or cannot be reached any more ({details}); {whole}")
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
