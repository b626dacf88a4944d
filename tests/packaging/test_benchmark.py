"""The benchmarks run, at a size that says nothing of speed: nobody else runs it between releases."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "benchmarks/bench.py"


def test_ten_thousand_rows(tmp_path):
    docs = tmp_path / "docs"
    flags = ["--rows=0.01", "--also=", "--runs=1", "--ways=ad", "--compiled"]
    environment = {name: value for name, value in os.environ.items() if not name.endswith("EMULATOR_HOST")}
    done = subprocess.run(
        [sys.executable, BENCH, *flags, f"--work={tmp_path / 'work'}", f"--docs={docs}"],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    page = (docs / "benchmark.md").read_text(encoding="utf-8")
    assert "exit code" not in page
    for way in ("(a) this pipeline", "(d) limit: same bytes", "this pipeline, the model on gs://"):
        assert f"| 0.01 million × 64 | {way}" in page
    (fetched,) = re.findall(r"^\| 0.01 million × 64 \| [\d,]+ \| [\d.]+ \| [\d.]+ \| ([\d.]+) ×", page, re.MULTILINE)
    assert 1 <= float(fetched) < 1.5  # Of so few rows, the graph is a large part.
    phases = re.findall(r"^(\w.+?) +([\d.]+) +[\d.]+ +\d+$", page, re.MULTILINE)
    assert phases[0][0] == "import Beam and the Google clients"
    assert "the job, until audit has ended" in dict(phases)
    ended = [float(seconds) for _, seconds in phases]
    assert ended == sorted(ended)
    assert (docs / "benchmark.png").stat().st_size > 10_000


def test_the_cut_of_a_small_vocabulary(tmp_path):
    flags = ["--engines=", "--cut=0.01,0.05", "--times=1", f"--work={tmp_path}"]
    script = BENCH.with_name("engines.py")
    done = subprocess.run([sys.executable, script, *flags], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()]
    assert [row[:2] for row in rows[2:]] == [
        ["0.01 million", "0 MB"],
        ["0.05 million", "1 MB"],
        ["100 million, at that rate", "1,500 MB"],
    ]
    assert float(rows[4][3]) == pytest.approx(2000 * float(rows[3][3]), abs=10 + 2000 * 0.005)
    assert {len(row) for row in rows} == {5}
