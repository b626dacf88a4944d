"""Keeps the history of a two-tower model's embeddings: from an MLflow run's artifact to BigQuery."""

import time

STARTED = time.monotonic()
"""When this process began, about: the first import of the package."""

__version__ = "0.1.0"
