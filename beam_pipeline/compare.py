"""`python -m beam_pipeline.compare`: compares two trainings."""

import sys

from beam_pipeline.comparison.command import main

if __name__ == "__main__":
    sys.exit(main())
