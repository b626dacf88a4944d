"""What all unit tests share: no emulator, whatever another test of the same process has started."""

import pytest


@pytest.fixture(autouse=True)
def _no_emulators(monkeypatch):
    for name in ("BIGQUERY_EMULATOR_HOST", "STORAGE_EMULATOR_HOST", "BIGQUERY_STORAGE_EMULATOR_HOST"):
        monkeypatch.delenv(name, raising=False)
