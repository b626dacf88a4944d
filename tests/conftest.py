"""What many tests need: real models, copies of them to damage, emulators and a real MLflow store."""

import gc
import os
import re
import shutil
import signal
import sys

import pytest
from hypothesis import settings
from models import Model, made_by
from store import Store

# A shell starts what it runs in the background (`make test &`) deaf to Ctrl-C, and so would be all jobs of the tests.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Parallel workers share processors with emulators and jobs: a slow example says nothing of the code.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")


@pytest.fixture(scope="session")
def models():
    return made_by("make_models.py")


@pytest.fixture(scope="session")
def keras_files():
    """Here the folder of a Model holds model.keras."""
    return made_by("make_keras_files.py")


@pytest.fixture(scope="session")
def tables():
    return made_by("make_tables.py")


@pytest.fixture
def damaged(models, tmp_path):
    """A function that copies a model so that a test can damage it."""

    def copy(name):
        shutil.copytree(models(name).folder, tmp_path / name)
        for beside in models(name).folder.parent.glob(f"{name}.*"):
            shutil.copy(beside, tmp_path)
        return Model(tmp_path / name)

    return copy


@pytest.fixture(scope="session", autouse=True)
def _clean_environment():
    """Tests see no emulator and no tracking server but their own."""
    for name in (
        "BIGQUERY_EMULATOR_HOST",
        "STORAGE_EMULATOR_HOST",
        "BIGQUERY_STORAGE_EMULATOR_HOST",
        "MLFLOW_TRACKING_URI",
        "GOOGLE_CLOUD_PROJECT",
    ):
        os.environ.pop(name, None)


def pytest_collection_finish():
    """What was imported stays: collecting garbage need not look at it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _beam_caches():
    """Tests that were collected have imported Beam, or none of them needs it."""
    if "apache_beam" in sys.modules:
        import beam_caches

        beam_caches.install()


@pytest.fixture(scope="session")
def warehouse(tmp_path_factory):
    """Emulators for the session; this process and its children talk to them."""
    from beam_pipeline import emulators

    with emulators.Warehouse(str(tmp_path_factory.mktemp("warehouse"))) as running:
        emulators.connect()
        yield running


@pytest.fixture(scope="session")
def store(tmp_path_factory, warehouse):
    """An MLflow store for the session."""
    return Store(tmp_path_factory.mktemp("mlflow"), warehouse)


@pytest.fixture(scope="session")
def commands():
    """Starts commands in processes of their own."""
    from commands import Commands

    with Commands() as running:
        yield running


@pytest.fixture
def job(warehouse, store, commands, request):
    """Runs the job, into a dataset that is made for this test."""
    from google.cloud import bigquery
    from job import Job

    client = bigquery.Client(project=warehouse.project)
    dataset = re.sub(r"\W", "_", request.node.name)[:80] + f"_{os.getpid()}"
    client.create_dataset(dataset)
    yield Job(client, dataset, store, f"{warehouse.temp_location}/{dataset}", commands)
    client.delete_dataset(dataset, delete_contents=True)


@pytest.fixture
def history(warehouse, commands, request):
    """Tables of a dataset that is created for this test."""
    from google.cloud import bigquery
    from history import History

    client = bigquery.Client(project=warehouse.project)
    dataset = re.sub(r"\W", "_", request.node.name)[:80] + f"_{os.getpid()}"
    client.create_dataset(dataset)
    yield History(client, dataset, f"{warehouse.temp_location}/{dataset}", commands)
    client.delete_dataset(dataset, delete_contents=True)
