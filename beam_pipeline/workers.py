"""DirectRunner's worker processes (`--direct_running_mode=multi_processing`): how they start, and end with their job.

Beam waits for each of its workers forever. A worker that had not connected yet when its job was abandoned would never
hear of that, so workers also watch a file of the launcher's.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from apache_beam.options.pipeline_options import DirectOptions, PipelineOptions, SetupOptions, StandardOptions
from apache_beam.portability.api import beam_provision_api_pb2
from apache_beam.runners.portability.fn_api_runner.fn_runner import ExtendedProvisionInfo, FnApiRunner
from apache_beam.runners.portability.portable_runner import JobServiceHandle

from beam_pipeline import emulators

_PLUGIN = "beam_pipeline.worker_start"
_JOB_FILE = "BEAM_PIPELINE_JOB_FILE"
_EVERY = 0.5  # Seconds between two looks: what a worker may outlive its job by.


def runner(options: PipelineOptions) -> FnApiRunner | None:
    """Returns the runner for a job whose workers are processes of DirectRunner's; None for any other runner.

    The one that Beam creates by the option's name starts its workers without any options: with another account than the
    launcher's, and without the plugin that ends them with the job. With emulators, the workers of all runners connect
    as they start: the `setup` of this package's DoFns comes too late for workers that run one of Beam's own first.
    """
    in_processes = (
        options.view_as(StandardOptions).runner == "FnApiRunner"
        and options.view_as(DirectOptions).direct_running_mode == "multi_processing"
    )
    if in_processes or emulators.emulated():
        setup = options.view_as(SetupOptions)
        setup.beam_plugins = [*(setup.beam_plugins or []), _PLUGIN]
    if not in_processes:
        return None
    encoded = JobServiceHandle.encode_pipeline_options(options.get_all_options(drop_default=True))
    info = beam_provision_api_pb2.ProvisionInfo(pipeline_options=encoded)
    return FnApiRunner(provision_info=ExtendedProvisionInfo(info))


@contextmanager
def watching_the_job() -> Iterator[Callable[[], None]]:
    """Ties the worker processes that start inside the block to it; yields a function that ends them earlier."""
    before = os.environ.get(_JOB_FILE)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "job")
        file.touch()
        os.environ[_JOB_FILE] = str(file)  # Which worker processes inherit.
        try:
            yield lambda: file.unlink(missing_ok=True)
        finally:
            if before is None:
                del os.environ[_JOB_FILE]
            else:
                os.environ[_JOB_FILE] = before


def end_with_job() -> None:
    """Ends this process when the file of its job is gone; does nothing where no job named one."""
    if path := os.environ.get(_JOB_FILE):
        threading.Thread(target=_watch, args=(path,), name="end with job", daemon=True).start()


def _watch(path: str) -> None:
    while os.path.exists(path):
        time.sleep(_EVERY)
    os._exit(1)  # sys.exit would end this thread alone.
