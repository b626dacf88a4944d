"""`python -m beam_pipeline.report`: renders a page about the comparisons in the result tables."""

from beam_pipeline.command import run_process
from beam_pipeline.comparison.command import report as main

if __name__ == "__main__":
    run_process(main)
