"""`python -m beam_pipeline.search`: finds the nearest ids of an id in one training."""

import sys

from beam_pipeline.retrieval.command import main

if __name__ == "__main__":
    sys.exit(main())
