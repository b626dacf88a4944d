"""`python -m beam_pipeline.search`: finds the nearest ids of an id in one training."""

from beam_pipeline.command import run_process
from beam_pipeline.retrieval.command import main

if __name__ == "__main__":
    run_process(main)
