"""The benchmark of engines runs, at a size that says nothing of speed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks/engines.py"
ENGINES = {
    "the launcher's own process": "1 | 1",
    "multi_processing 2": "2 | 2",
    "Beam's job service": "1 | 1",
    "the tests' job service 2": "2 | 2",
    "Prism": "1 | 8",
}


@pytest.mark.timeout(600)
def test_two_thousand_rows(tmp_path):
    flags = ["--rows=2000", "--times=1", "--cut=0.01", f"--engines={','.join(ENGINES)}", f"--work={tmp_path}"]
    environment = {name: value for name, value in os.environ.items() if not name.endswith("EMULATOR_HOST")}
    done = subprocess.run(
        [sys.executable, SCRIPT, *flags], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    for name, numbers in ENGINES.items():
        (line,) = [line for line in lines if line.startswith(f"| {name} | {numbers} | ")]
        assert "failed" not in line
        assert 0.1 < float(line.split("|")[-2].split()[0]) < 2  # GB
    assert any(line.startswith("| 100 million, at that rate |") for line in lines)
