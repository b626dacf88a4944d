"""What opening a session does to the process."""

import gc

import pytest
from apache_beam.options.pipeline_options import PipelineOptions

from beam_pipeline.errors import ConfigError
from beam_pipeline.launch import options, session


def test_garbage_is_collected_from_the_session_on(monkeypatch):
    """`run_process` turns the collector off for start-up: all that a job of hours leaves would stay."""
    for name in ("BIGQUERY_EMULATOR_HOST", "STORAGE_EMULATOR_HOST"):
        monkeypatch.delenv(name, raising=False)
    config = options.parse(["--run_id=r", "--dataset=d"])
    gc.disable()
    try:
        with pytest.raises(ConfigError, match="which project"):
            session.open_session(config, PipelineOptions([]), create_dataset=False).__enter__()
        assert gc.isenabled()
    finally:
        gc.enable()
        gc.unfreeze()
