"""Places of artifacts that need a whole job or a bucket; the others are in tests/unit/tracking."""

import shutil

import pytest
from job import MARCH_1
from mlflow.tracking import MlflowClient

from beam_pipeline.errors import ConfigError
from beam_pipeline.tracking.models import find_model
from beam_pipeline.tracking.runs import find_run


def test_the_job_reads_such_folders(job, models, tmp_path):
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.create_experiment("escapes", f"{tmp_path}/a%20b")
    run = client.create_run(experiment, start_time=int(MARCH_1.timestamp() * 1000)).info.run_id
    shutil.copytree(models("longer").folder, tmp_path / "a%20b" / run / "artifacts" / "c%20d")
    flags = f"--tracking_uri=sqlite:///{tmp_path}/mlflow.db", "--artifact_path=c%20d"
    assert job.run(run, *flags) == 0
    assert job.rows("user") == {("2026-03-01", run): models("longer").rows("user")}


def test_a_bucket_that_may_not_be_read(warehouse, tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(uri)
    run = client.create_run(client.create_experiment("unreadable", "gs://no-such-bucket/mlruns")).info.run_id
    with pytest.raises(
        ConfigError, match=r"gs://no-such-bucket/mlruns/\S* cannot be read: 404 .*; check that this machine"
    ):
        find_model(find_run(run_id=run, tracking_uri=uri), tracking_uri=uri)
