"""What worker processes know before any DoFn of the package is set up there, and how they end."""

import subprocess
import sys

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.testing.util import assert_that, equal_to

from beam_pipeline import workers

PROCESSES = ["--runner=FnApiRunner", "--direct_running_mode=multi_processing", "--direct_num_workers=1"]


def _seen(_):
    """Imports nothing of the package, as Beam's own DoFns."""
    import google.auth
    from apache_beam.io.filesystems import FileSystems

    location = FileSystems._pipeline_options.get_all_options()["temp_location"]
    return type(google.auth.default()[0]).__name__, location


def test_worker_processes_find_emulators_and_options(monkeypatch):
    for name in ("BIGQUERY_EMULATOR_HOST", "STORAGE_EMULATOR_HOST"):
        monkeypatch.setenv(name, "localhost:1")
    options = PipelineOptions([*PROCESSES, "--temp_location=gs://bucket/tmp"])
    with workers.watching_the_job(), beam.Pipeline(runner=workers.runner(options), options=options) as pipeline:
        seen = pipeline | beam.Create([1]) | beam.Map(_seen)
        assert_that(seen, equal_to([("AnonymousCredentials", "gs://bucket/tmp")]))


@pytest.mark.parametrize(
    "flags", [["--runner=FnApiRunner"], ["--runner=PrismRunner", *PROCESSES[1:]], ["--runner=DataflowRunner"]]
)
def test_other_runners_are_left_alone(flags):
    options = PipelineOptions(flags)
    before = options.get_all_options()
    assert workers.runner(options) is None
    assert options.get_all_options() == before


def test_a_process_ends_with_its_job():
    code = (
        "import time; from beam_pipeline import workers; workers.end_with_job(); print(1, flush=True); time.sleep(60)"
    )
    with workers.watching_the_job() as end:
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        process.stdout.readline()
        assert process.poll() is None
        end()
        assert process.wait(10) == 1
        process.stdout.close()
