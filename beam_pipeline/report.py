"""`python -m beam_pipeline.report`: renders a page about the comparisons in the result tables."""

import sys

from beam_pipeline.comparison.command import report as main

if __name__ == "__main__":
    sys.exit(main())
