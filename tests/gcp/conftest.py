"""A real project instead of emulators: `make test-gcp PROJECT=… DATASET=… BUCKET=…` with application credentials.

The dataset must exist, the bucket too, in a location that fits. Tables and files are made under a prefix of this session
and deleted at the end.
"""

import os
import uuid
from dataclasses import dataclass

import pytest
from google.cloud import bigquery, storage

from beam_pipeline.launch import session


@dataclass(frozen=True)
class Cloud:
    """Where the tests run; takes the place of the embedded warehouse."""

    project: str
    dataset: str
    bucket: str
    prefix: str

    @property
    def folder(self):
        return f"tmp/{self.prefix}"

    @property
    def temp_location(self):
        return f"gs://{self.bucket}/{self.folder}"


@pytest.fixture(scope="session")
def warehouse():
    names = ("PROJECT", "DATASET", "BUCKET")
    values = [os.environ.get(f"BEAM_PIPELINE_GCP_{name}") for name in names]
    assert all(values), "make test-gcp PROJECT=… DATASET=… BUCKET=…"
    cloud = Cloud(*values, prefix=f"test_{uuid.uuid4().hex[:8]}")
    os.environ["GOOGLE_CLOUD_PROJECT"] = cloud.project  # For clients that MLflow and Beam make without a project.
    yield cloud
    client = bigquery.Client(project=cloud.project)
    for table in client.list_tables(f"{cloud.project}.{cloud.dataset}"):
        if table.table_id.startswith(cloud.prefix):
            client.delete_table(table, not_found_ok=True)
    bucket = storage.Client(project=cloud.project).bucket(cloud.bucket)
    bucket.delete_blobs([*bucket.list_blobs(prefix=f"{cloud.folder}/")], on_error=lambda blob: None)


@pytest.fixture(scope="session")
def destination(warehouse):
    return session.find_destination(warehouse.project, warehouse.dataset, warehouse.prefix)


@pytest.fixture(scope="session")
def client(destination):
    return bigquery.Client(project=destination.project, location=destination.location)
