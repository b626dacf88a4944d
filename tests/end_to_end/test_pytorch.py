"""The example that logs what a PyTorch two-tower serves, with a real torch where TORCH_PYTHON names one.

TORCH_PYTHON is an interpreter that has torch, mlflow, pyarrow and safetensors: the project itself does not need torch.
Without it, the files are written by the example's own function from a matrix that torch did not compute.
"""

import importlib.util
import json
import os
import subprocess
import sys
import types

import numpy as np
import pytest
from job import MARCH_1
from models import ROOT

EXAMPLE = ROOT / "examples" / "log_pytorch_vectors.py"
PARQUET = ["--vectors=user=vectors/user.parquet,item=vectors/item.parquet"]
SAFETENSORS = [
    "--vectors=user=vectors/towers.safetensors#user,item=vectors/towers.safetensors#item",
    "--ids=user=vectors/user_ids.txt,item=vectors/item_ids.txt",
]


class Folder:
    def __init__(self, folder):
        self.folder = folder


@pytest.fixture
def example(monkeypatch):
    """The example as a module, without torch."""
    torch = types.ModuleType("torch")
    torch.nn = types.SimpleNamespace(Module=object)
    monkeypatch.setitem(sys.modules, "torch", torch)
    spec = importlib.util.spec_from_file_location("log_pytorch_vectors", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("flags", [PARQUET, SAFETENSORS])
def test_the_files_of_the_example(job, store, example, tmp_path, flags):
    rng = np.random.default_rng(1)
    towers = {
        "user": (example.USERS, rng.normal(size=(len(example.USERS), 16)).astype("f4")),
        "item": (example.ITEMS, rng.normal(size=(len(example.ITEMS), 16)).astype("f4")),
    }
    example.write(towers, tmp_path)
    run = store.log({"vectors": Folder(tmp_path)}, "pytorch", MARCH_1)
    assert job.run(run, *flags) == 0
    for name, (ids, vectors) in towers.items():
        assert job.rows(name) == {("2026-03-01", run): dict(zip(ids, vectors.astype(float).tolist(), strict=True))}


ORACLE = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
import log_pytorch_vectors as example
weights = torch.load(sys.argv[2])
found = {}
for name, ids in (("user", example.USERS), ("item", example.ITEMS)):
    tower = example.Tower(ids)
    tower.load_state_dict(weights[name])
    found[name] = dict(zip(ids, tower(torch.arange(len(ids))).tolist()))
print(json.dumps(found))
"""


@pytest.mark.skipif("TORCH_PYTHON" not in os.environ, reason="TORCH_PYTHON names no interpreter with torch")
@pytest.mark.parametrize("flags", [PARQUET, SAFETENSORS])
def test_every_row_is_what_torch_itself_answers(job, store, tmp_path, flags):
    python = os.environ["TORCH_PYTHON"]
    command = [python, str(EXAMPLE), f"--tracking_uri={tmp_path}/mlruns", "--steps=30"]
    environment = {**os.environ, "MLFLOW_ALLOW_FILE_STORE": "true"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    (weights,) = tmp_path.rglob("towers.pt")
    answered = subprocess.run(
        [python, "-c", ORACLE, str(EXAMPLE.parent), str(weights)], capture_output=True, text=True, check=True
    )
    # The run as its store keeps it, logged to the store of the test.
    run = store.log({"": Folder(weights.parents[1])}, "pytorch", MARCH_1)
    assert job.run(run, *flags) == 0
    for name, expected in json.loads(answered.stdout).items():
        ((_, found),) = job.rows(name).items()
        assert found.keys() == expected.keys()
        np.testing.assert_allclose([found[one] for one in expected], [*expected.values()], rtol=0, atol=1e-6)
