"""Counters of the job: Beam's metrics, and the same numbers for a launcher that runs the job in its own process.

Also the phases of a launch that happen in this process.
"""

from __future__ import annotations

import resource
import sys
import threading
import time
from collections import Counter
from typing import NamedTuple

from apache_beam.metrics.metric import Metrics, MetricsFilter
from apache_beam.runners.runner import PipelineResult

NAMESPACE = "beam_pipeline"


class Phase(NamedTuple):
    """A part of a launch that has ended.

    Attributes:
        name: what was done.
        ended: on the clock of `time.monotonic`.
        peak: resident memory at most until then, in bytes.
    """

    name: str
    ended: float
    peak: int


_lock = threading.Lock()
_here: Counter[str] = Counter()
_first: dict[str, float] = {}
_phases: list[Phase] = []


def count(name: str, amount: int) -> None:
    """Adds to a counter: `read-rows`, `read-bytes`, `write-rows-TOWER` or `not-deleted`."""
    Metrics.counter(NAMESPACE, name).inc(amount)
    with _lock:
        _here[name] += amount
        _first.setdefault(name, time.monotonic())


def first_in_this_process(name: str) -> float | None:
    """Returns when this process first added to a counter, on the clock of `time.monotonic`; None if it never did."""
    with _lock:
        return _first.get(name)


def in_this_process(name: str) -> int:
    """Returns what this process has counted so far; a bundle that failed counts too, so it is for progress alone."""
    with _lock:
        return _here[name]


def committed(result: PipelineResult, name: str) -> int:
    """Returns a counter of a job that is done, each row counted once whatever was retried."""
    counters = result.metrics().query(MetricsFilter().with_namespace(NAMESPACE).with_name(name))["counters"]
    # A runner that does not report what was committed reports what was attempted.
    return sum(counter.result or 0 for counter in counters)


def end_phase(name: str) -> None:
    """Records the end of a phase, which began when the one before had ended."""
    # Linux counts kilobytes, macOS bytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    with _lock:
        _phases.append(Phase(name, time.monotonic(), peak))


def phases() -> list[Phase]:
    """Returns the phases that have ended in this process, in order; what other processes do is not among them."""
    with _lock:
        return [*_phases]
