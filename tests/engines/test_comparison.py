"""The comparison on every engine: the same numbers as in one process."""

import os
from pathlib import Path

import pytest
from worlds import rotation, towers, turned

ROOT = Path(__file__).parents[2]

# What tells one run of the same comparison from another.
OF_A_RUN = ("published_at", "job_name", "launch")


def near(found):
    """Floats are added up in the order in which bundles come."""
    if isinstance(found, dict):
        return {key: near(value) for key, value in found.items()}
    if isinstance(found, list | tuple):
        return type(found)(near(value) for value in found)
    return pytest.approx(found, rel=1e-9, abs=1e-12) if isinstance(found, float) else found


def results(history):
    """Returns (the results without what differs from run to run, the names of the jobs)."""
    found = history.results()
    jobs = {row["job_name"] for row in found.values()}
    return {pair: {k: v for k, v in row.items() if k not in OF_A_RUN} for pair, row in found.items()}, jobs


def test_a_comparison_says_what_it_says_in_one_process(engine, history):
    before = towers(users=300, items=90)
    after = turned({tower: vectors * 1.1 for tower, vectors in before.items()}, rotation(2))
    after["item"][:5] *= -1
    history.publish("2026-03-01", "r1", before)
    history.publish("2026-03-08", "r2", after)
    assert history.compare() == 0
    (expected, job), changes = results(history), history.changes("item")
    done = history.subprocess(*engine, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=150)
    assert done.returncode == 0, done.stderr[-5000:]
    found, other = results(history)
    assert not job & other
    assert found.keys() == expected.keys()
    for pair, columns in expected.items():
        differing = {
            name: (found[pair][name], value) for name, value in columns.items() if found[pair][name] != near(value)
        }
        assert differing == {}
    assert history.changes("item") == near(changes)
