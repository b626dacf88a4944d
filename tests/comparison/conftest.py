"""A history of models that are made, not trained, in emulators; and the command that compares them."""

import os
import re

import pytest
from history import History


@pytest.fixture
def history(warehouse, request):
    """Tables of a dataset that is created for this test."""
    from google.cloud import bigquery

    client = bigquery.Client(project=warehouse.project)
    dataset = re.sub(r"\W", "_", request.node.name)[:80] + f"_{os.getpid()}"
    client.create_dataset(dataset)
    yield History(client, dataset, f"{warehouse.temp_location}/{dataset}")
    client.delete_dataset(dataset, delete_contents=True)
