"""Phases of a launch, as the launcher notes them."""

import time

from beam_pipeline import metrics


def test_phases_are_noted_in_order(monkeypatch):
    monkeypatch.setattr(metrics, "_phases", [])
    before = time.monotonic()
    metrics.end_phase("first")
    metrics.end_phase("second")
    first, second = metrics.phases()
    assert [first.name, second.name] == ["first", "second"]
    assert before <= first.ended <= second.ended <= time.monotonic()
    assert 10e6 < first.peak <= second.peak < 1e12  # Bytes, whatever the system counts in.
