"""Where the time of a job goes: `python benchmarks/phases.py FLAG …` runs it with these flags and prints its phases.

The flags are those of `python -m beam_pipeline`. Seconds since the process began, and peak memory (RSS) at each point;
the launcher notes them itself.
"""

import os
import sys
import time

STARTED = time.monotonic()

from beam_pipeline.launch.options import parse  # noqa: E402 - its import is timed

config = parse(sys.argv[1:])

from beam_pipeline import metrics  # noqa: E402 - the flags come first, as in __main__
from beam_pipeline.launch.launcher import launch  # noqa: E402 - likewise

code = launch(config)
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
sys.stdout.flush()
os._exit(code)
