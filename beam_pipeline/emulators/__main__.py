"""`python -m beam_pipeline.emulators DIR`."""

from beam_pipeline.command import run_process
from beam_pipeline.emulators import main

if __name__ == "__main__":
    run_process(main)
