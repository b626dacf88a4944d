"""`python -m beam_pipeline.emulators DIR`."""

import sys

from beam_pipeline.emulators import main

if __name__ == "__main__":
    sys.exit(main())
