"""Models that the tests read, created by real Keras and TensorFlow in a process of their own, and kept from run to run."""

import fcntl
import hashlib
import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

SUPPORT = Path(__file__).parent
ROOT = SUPPORT.parents[1]
CACHE = ROOT / ".cache/models"


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


def made_by(script, *names, cache=CACHE):
    """Runs a script that creates models, unless its models are cached.

    Args:
        script: its file name in this folder.
        names: of models in it; all if none are given.
        cache: the folder of all cached models.

    Returns:
        A function from a name in the script to a Model, which is shared and must not be written to.
    """
    folder = cache / f"{Path(script).stem}-{_key(script, names)}"
    done = folder.with_suffix(".done")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # A lock, not a rename of a finished folder: a parallel worker that needs the same models waits instead of training
    # them too. The script holds it as well, in case that its parent is killed; what it leaves is not marked as done.
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            command = [sys.executable, str(SUPPORT / script), str(folder), *names]
            ended = subprocess.run(command, capture_output=True, text=True, check=False, pass_fds=[lock.fileno()])
            assert ended.returncode == 0, ended.stderr[-3000:]
            done.touch()
    return lambda name: Model(folder / name)


def _key(script, names):
    """Returns a hash of all that decides what a script creates."""
    # The lock is for one version of Python only; the others have what they resolved.
    libraries = [f"{name}=={version(name)}" for name in ("tensorflow", "tf-keras", "keras", "numpy")]
    digest = hashlib.sha256(json.dumps([script, names, sys.version, libraries]).encode())
    digest.update((ROOT / "constraints.txt").read_bytes())
    for source in _sources(script):
        digest.update((SUPPORT / source).read_bytes())
    return digest.hexdigest()[:16]


def _sources(script):
    """Returns a script, those that it imports and the examples that it runs."""
    text = (SUPPORT / script).read_text(encoding="utf-8")
    imported = re.findall(r"^(?:from|import) (make_\w+)", text, re.MULTILINE)
    examples = [ROOT / path for path in sorted({*re.findall(r"examples/\w+\.py", text)})]
    return [script, *examples, *(source for module in imported for source in _sources(f"{module}.py"))]
