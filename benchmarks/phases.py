"""Where the time of a job goes: `python benchmarks/phases.py FLAG …` runs it with these flags and prints its phases.

The flags are those of `python -m beam_pipeline`. Seconds since the process began, and peak memory (RSS) at each point;
the launcher notes them itself.
"""

import time

STARTED = time.monotonic()

from beam_pipeline.__main__ import main  # noqa: E402 - its import is timed
from beam_pipeline.command import run_process  # noqa: E402 - likewise


def main_with_phases():
    """Runs the command line, prints its phases, and returns its exit code."""
    code = main()

    from beam_pipeline import metrics  # Imports Beam.

    metrics.end_phase("end")
    print(f"\n{'phase':<45} {'ends at, s':>10} {'took, s':>8} {'peak, MB':>9}")
    before = 0.0
    for phase in metrics.phases():
        ended = phase.ended - STARTED
        print(f"{phase.name:<45} {ended:>10.2f} {ended - before:>8.2f} {phase.peak / 1e6:>9,.0f}")
        before = ended
    first = metrics.first_in_this_process("read-bytes")
    if first:
        print(f"{'(the first vectors are read)':<45} {first - STARTED:>10.2f}")
    return code


run_process(main_with_phases)
