"""What runs where the job is started: finds the model, checks the destination, submits or runs the graph."""

from __future__ import annotations

import logging
import re
import signal
import sys
import uuid
from contextlib import ExitStack, closing
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import GoogleCloudOptions, PipelineOptions, StandardOptions

from beam_pipeline import emulators, errors, metrics, preflight, publication
from beam_pipeline.errors import ConfigError, JobActiveError, PipelineError
from beam_pipeline.files import open_file
from beam_pipeline.formats.saved_model import SavedModel
from beam_pipeline.options import Config
from beam_pipeline.pipeline import Job, build
from beam_pipeline.publication import Publication
from beam_pipeline.runs import Run, artifact_folder, find_run
from beam_pipeline.terminal import Terminal


def launch(config: Config) -> int:
    """Runs the command line; returns the exit code: 0, or 1 with one line on stderr."""
    # Airflow and container engines stop a task with SIGTERM; it deserves the clean-up that Ctrl-C gets.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run(config)
    except PipelineError as error:
        return _stopped(str(error), 1)
    except KeyboardInterrupt:
        return _stopped(f"interrupted; {_WHOLE}", 130)
    except Exception as error:
        logging.getLogger(__name__).info("stopped by", exc_info=error)
        return _stopped(f"{type(error).__name__}: {error}", 1)
    return 0


_WHOLE = "the tables hold this training whole or not at all, start the job again"


def _stopped(message: str, code: int) -> int:
    print("error:", " ".join(message.split()), file=sys.stderr)
    return code


def run(config: Config) -> None:
    """Finds the model, checks the destination, runs the job.

    Raises:
        PipelineError: whatever stopped it; nothing was published and nothing is left behind.
    """
    terminal = Terminal()
    mlflow_run = find_run(
        run_id=config.run_id,
        experiment_name=config.experiment_name,
        run_name=config.run_name,
        tracking_uri=config.tracking_uri,
    )
    folder = artifact_folder(mlflow_run, config.artifact_path)
    if not config.local and not folder.startswith("gs://"):
        raise ConfigError(
            f"{config.runner} cannot read the local folder {folder} of run {mlflow_run.run_id}; use a run whose "
            "artifacts are on gs://, or --runner=DirectRunner"
        )
    with ExitStack() as stack:
        options = _beam_options(config)
        cloud = options.view_as(GoogleCloudOptions)
        if config.warehouse:
            warehouse = stack.enter_context(emulators.Warehouse(config.warehouse))
            cloud.temp_location = warehouse.temp_location
            cloud.project = config.project or warehouse.project
        if emulators.emulated():
            emulators.connect()
        cloud.project = _project(config, cloud)
        if not (cloud.temp_location or "").startswith("gs://"):
            raise ConfigError("load files need a bucket: --temp_location=gs://BUCKET/FOLDER")
        job = _plan(config, mlflow_run, folder, cloud)
        terminal.found(mlflow_run, job.towers, job.publication.destination)
        name = cloud.job_name or f"{publication.JOB_NAME}-{mlflow_run.run_id}"[:50]
        # Here a job's name tells its temporary tables from those of another launch; on Dataflow it is left as asked.
        cloud.job_name = f"{name}-{job.publication.token}" if config.local else name
        if config.local:
            _run_here(job, options, terminal)
        else:
            pipeline = beam.Pipeline(options=options)
            build(pipeline, job)
            terminal.submitted(_submit(pipeline, name), config.runner)


def _plan(config: Config, mlflow_run: Run, folder: str, cloud: GoogleCloudOptions) -> Job:
    """Reads the model's towers and checks that they can be published; writes nothing."""
    with closing(SavedModel(folder, open_file)) as model:
        towers = tuple(
            model.tower(name, layer, include_oov=config.include_oov) for name, layer in config.towers.items()
        )
    destination = preflight.find_destination(
        cloud.project, config.dataset, config.table_prefix, make_dataset=bool(config.warehouse)
    )
    client = publication.make_client(destination)
    for tower in towers:
        preflight.check_table(
            client,
            destination,
            tower,
            mlflow_run,
            if_partition_taken=config.if_partition_taken,
            allow_dimension_change=config.allow_dimension_change,
        )
    what = Publication(
        destination=destination,
        run=mlflow_run,
        towers=tuple(tower.name for tower in towers),
        temp_location=cloud.temp_location,
        if_partition_taken=config.if_partition_taken,
        partition_expiration_days=config.partition_expiration_days,
        token=uuid.uuid4().hex[:12],
    )
    if config.warehouse:
        publication.discard_all(client, what)
    return Job(towers, what, config.writer)


def _submit(pipeline: beam.Pipeline, name: str) -> Any:
    try:
        return pipeline.run()
    except Exception as error:
        # Dataflow's own words, with gRPC and REST, and Beam's when it recognises another launch in the answer.
        if "active job named" in str(error):
            raise JobActiveError(
                f"a job {name} is active on Dataflow already; wait until it has ended, or cancel it, and start again"
            ) from error
        raise


def _run_here(job: Job, options: PipelineOptions, terminal: Terminal) -> None:
    """Runs the job in this process and waits for it; cleans up after it if it fails."""
    destination = job.publication.destination
    try:
        pipeline = beam.Pipeline(options=options)
        build(pipeline, job)
        with terminal.progress(job.towers):
            result = pipeline.run()
            result.wait_until_finish()
    except BaseException as error:
        job_name = options.view_as(GoogleCloudOptions).job_name
        try:
            publication.discard(publication.make_client(destination), job.publication, job_name)
        except Exception as left:  # What stopped the job is what has to be told.
            logging.getLogger(__name__).warning("staging tables and load files are left, they expire: %s", left)
        if isinstance(error, Exception):
            raise _reason(error) from error
        raise
    rows = {tower.name: metrics.committed(result, f"write-rows-{tower.name}") for tower in job.towers}
    terminal.summary(job.publication.run, rows, destination)


def _beam_options(config: Config) -> PipelineOptions:
    options = PipelineOptions(list(config.beam_args))
    # DirectRunner itself is a switch, which on a machine with internet downloads another runner and runs there.
    options.view_as(StandardOptions).runner = "FnApiRunner" if config.local else config.runner
    return options


def _project(config: Config, cloud: GoogleCloudOptions) -> str:
    project = config.project or cloud.project
    if not project and emulators.emulated():
        project = emulators.PROJECT
    if not project:
        raise ConfigError(
            "where to? --warehouse=DIR for a warehouse on this machine, or --project=PROJECT with "
            "--temp_location=gs://BUCKET/FOLDER for BigQuery"
        )
    return project


def _reason(error: Exception) -> PipelineError:
    """Returns the error that stopped the job, which Beam hands over as the text of a traceback."""
    if isinstance(error, PipelineError):
        return error
    lines = [line for line in str(error).splitlines() if line.strip()]
    for line in reversed(lines):
        named = re.match(r"beam_pipeline\.errors\.(\w+): (.*?)(?: \[while running .*\])?$", line)
        if named:
            return getattr(errors, named[1], PipelineError)(named[2])
    last = lines[-1] if lines else type(error).__name__
    if last.startswith("KeyboardInterrupt"):
        raise KeyboardInterrupt from error
    logging.getLogger(__name__).info("the job failed", exc_info=error)
    return PipelineError(f"the job failed: {last}; {_WHOLE}")
