"""Imported by Beam where a worker process starts: connects it to emulators, and ends it with its job."""

from beam_pipeline import emulators, workers

emulators.connect_if_emulated()
workers.end_with_job()
