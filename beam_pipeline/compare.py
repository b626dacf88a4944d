"""`python -m beam_pipeline.compare`: compares two trainings."""

from beam_pipeline.command import run_process
from beam_pipeline.comparison.command import main

if __name__ == "__main__":
    run_process(main)
