"""DirectRunner's worker processes (`--direct_running_mode=multi_processing`): how they start, and end with their job.

Beam waits for each of its workers without end. One that was not connected yet when its job was given up would never
hear of it, so workers also watch a file of the launcher's.
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
_EVERY = 0.5


def runner(options: PipelineOptions) -> FnApiRunner | None:
    """Returns what runs a job whose workers are processes of DirectRunner's; None for any other runner.

    Named by the options, it would start the workers without any: as another account than the launcher's, and without
    what ends them with the job. With emulators, workers of all runners are told to connect as they start: the `setup`
    of a DoFn of this package comes too late for those that run Beam's own first.
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
    """Lets worker processes that start meanwhile end with the job; yields what ends them before."""
    before = os.environ.get(_JOB_FILE)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "job")
        file.touch()
        os.environ[_JOB_FILE] = str(file)
        try:
            yield lambda: file.unlink(missing_ok=True)
        finally:
            if before is None:
                del os.environ[_JOB_FILE]
            else:
                os.environ[_JOB_FILE] = before


def end_with_job() -> None:
    """Ends this process when the file of its job is gone; where it starts without one, nothing is done."""
    if path := os.environ.get(_JOB_FILE):
        threading.Thread(target=_watch, args=(path,), name="end with job", daemon=True).start()


def _watch(path: str) -> None:
    while os.path.exists(path):
        time.sleep(_EVERY)
    os._exit(1)
