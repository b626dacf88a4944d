"""Two environments, as in production: this process is Airflow's; the pipeline has the project's, BEAM_PIPELINE_PYTHON.

`make test-airflow` makes both. The parent's conftest.py is the project's and stays out of this one (--confcutdir).
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from google.auth.credentials import AnonymousCredentials
from google.cloud import bigquery

ROOT = Path(__file__).parents[2]
PYTHON = os.environ.setdefault("BEAM_PIPELINE_PYTHON", str(ROOT / ".venv/bin/python"))

# Airflow reads these when it is first imported.
_home = tempfile.TemporaryDirectory()
for name in [name for name in os.environ if name.startswith(("AIRFLOW_", "MLFLOW_"))]:
    del os.environ[name]
os.environ.update(
    AIRFLOW_HOME=_home.name,
    AIRFLOW__CORE__LOAD_EXAMPLES="False",
    AIRFLOW__CORE__DAGS_FOLDER=str(ROOT / "examples/airflow"),
    AIRFLOW__CORE__UNIT_TEST_MODE="False",
    AIRFLOW_CONN_GOOGLE_CLOUD_DEFAULT='{"conn_type": "google_cloud_platform", "extra": {"is_anonymous": true}}',
    no_proxy=f"{os.environ.get('no_proxy', '')},127.0.0.1,localhost",
)


@pytest.fixture(scope="session")
def database():
    subprocess.run([sys.executable, "-m", "airflow", "db", "migrate"], check=True, capture_output=True)


@pytest.fixture
def dag(database):
    """The DAG as Airflow reads it from the DAGs folder; a test may change its tasks."""
    from airflow.dag_processing.dagbag import DagBag

    bag = DagBag()
    assert bag.import_errors == {}
    return bag.dags["two_tower"]


@pytest.fixture(scope="session")
def cloud(tmp_path_factory):
    """Emulators, an MLflow store with two runs of a model, and the model's rows; see serve.py."""
    command = [PYTHON, str(Path(__file__).parent / "serve.py"), str(tmp_path_factory.mktemp("cloud"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        found = json.loads(process.stdout.readline())
        os.environ.update(
            BIGQUERY_EMULATOR_HOST=found["bigquery"],
            STORAGE_EMULATOR_HOST=found["storage"],
            BIGQUERY_STORAGE_EMULATOR_HOST=found["read"],
            MLFLOW_TRACKING_URI=found["tracking_uri"],
        )
        client = bigquery.Client(
            found["project"], AnonymousCredentials(), client_options={"api_endpoint": found["bigquery"]}
        )
        for dataset in ("raw_dev", "raw_stg"):
            client.create_dataset(dataset)
        yield SimpleNamespace(client=client, **found)
        process.stdin.close()
