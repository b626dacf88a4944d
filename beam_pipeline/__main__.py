"""`python -m beam_pipeline`."""

import sys

from beam_pipeline.launch.options import parse

if __name__ == "__main__":
    config = parse(sys.argv[1:])
    from beam_pipeline.launch.launcher import launch  # Takes seconds: --help and misspelt flags are answered before.

    raise SystemExit(launch(config))
