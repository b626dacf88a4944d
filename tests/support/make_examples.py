"""Trainings by the examples' own trainers, each in the store and with the flags that a test gives it."""

import contextlib
import io
import json
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TRAININGS = {
    # What is planted before the third makes an item move.
    "demo": [
        ("examples/train_two_tower.py", "--start=2026-03-01T23:30", "--seed=1"),
        ("examples/train_two_tower.py", "--start=2026-03-08T23:30", "--seed=2"),
        ("examples/train_two_tower.py", "--start=2026-03-15T23:30", "--seed=3", "--moved_item=item-jazz-007"),
    ],
    "deep": [
        ("examples/train_deep_towers.py", "--start=2026-03-01T10:00", "--form", "packed", "vectors", "model"),
    ],
}


def main(folder):
    """Runs the scripts as the command line does, but in one process, which imports TensorFlow once."""
    sys.path.insert(0, str(ROOT / "examples"))
    for name, commands in TRAININGS.items():
        runs = []
        store = folder / name
        store.mkdir()
        for script, *flags in commands:
            sys.argv = [
                script,
                f"--tracking_uri=sqlite:///{store}/mlflow.db",
                f"--artifact_root={store}/artifacts",
                *flags,
            ]
            with contextlib.redirect_stdout(io.StringIO()) as output:
                runpy.run_path(str(ROOT / script), run_name="__main__")
            runs += output.getvalue().split()
        (store / "runs.json").write_text(json.dumps(runs), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
