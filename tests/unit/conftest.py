"""What all unit tests share: no emulator, whatever another test of the same process has started."""

import json
import os
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items):
    """Under `make mutants`, puts quick tests first: a change fails most of the tests that reach it, and one is enough."""
    stats = Path("mutmut-stats.json")
    if os.environ.get("MUTANT_UNDER_TEST") and stats.exists():
        seconds = json.loads(stats.read_text())["duration_by_test"]
        items.sort(key=lambda item: seconds.get(item.nodeid, 0))


@pytest.fixture(autouse=True)
def _no_emulators(monkeypatch):
    for name in ("BIGQUERY_EMULATOR_HOST", "STORAGE_EMULATOR_HOST", "BIGQUERY_STORAGE_EMULATOR_HOST"):
        monkeypatch.delenv(name, raising=False)
