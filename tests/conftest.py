"""What many tests need: real models, made once for a session, and copies of them to damage."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest


@dataclass(frozen=True)
class Model:
    """A SavedModel and what Keras says is in it."""

    folder: Path

    def ids(self, tower):
        return json.loads((self.folder.parent / f"{self.folder.name}.{tower}.json").read_text(encoding="utf-8"))

    def vectors(self, tower):
        return np.load(self.folder.parent / f"{self.folder.name}.{tower}.npy")

    def rows(self, tower):
        """Returns id → vector, as a list of float64."""
        return dict(zip(self.ids(tower), self.vectors(tower).tolist(), strict=True))


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A function from a name in make_models.py to a Model; not to be written to."""
    folder = tmp_path_factory.mktemp("models")
    script = Path(__file__).parent / "make_models.py"
    done = subprocess.run([sys.executable, str(script), str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return lambda name: Model(folder / name)


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
    for name in ("BIGQUERY_EMULATOR_HOST", "STORAGE_EMULATOR_HOST", "MLFLOW_TRACKING_URI", "GOOGLE_CLOUD_PROJECT"):
        os.environ.pop(name, None)
