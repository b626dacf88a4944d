"""Where the time of a job goes: `python benchmarks/phases.py FLAG …` runs it with these flags and prints its phases.

The flags are those of `python -m beam_pipeline`. Seconds since the process began, and memory (RSS) at each point.
"""

import os
import resource
import sys
import time

STARTED = time.monotonic()

from beam_pipeline.launch.options import parse  # noqa: E402 - its import is timed

config = parse(sys.argv[1:])
marks = []


def mark(what):
    """Notes that a phase has ended."""
    marks.append((what, time.monotonic() - STARTED, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def ends(owner, name, what):
    """Makes the end of a function the end of a phase."""
    original = getattr(owner, name)

    def timed(*args, **options):
        try:
            return original(*args, **options)
        finally:
            mark(what)

    setattr(owner, name, timed)


from beam_pipeline.bigquery import publication  # noqa: E402 - the flags come first, as in __main__
from beam_pipeline.launch import launcher, session  # noqa: E402 - likewise

mark("import Beam and the Google clients")
ends(launcher, "find_run", "import MLflow, find the run")
ends(launcher, "open_artifact", "read the graph's objects and the index")
ends(session, "find_destination", "find the dataset")
ends(launcher, "build", "check the tables, build the job graph")
ends(publication, "audit", "start, cut, read, encode, write, load, audit")
ends(publication, "clean", "shape, publish, clean up")
code = launcher.launch(config)
mark("end")
print(f"\n{'phase':<45} {'ends at, s':>10} {'took, s':>8} {'peak, MB':>9}")
before = 0.0
for what, seconds, megabytes in marks:
    print(f"{what:<45} {seconds:>10.2f} {seconds - before:>8.2f} {megabytes:>9,.0f}")
    before = seconds
sys.stdout.flush()
os._exit(code)
