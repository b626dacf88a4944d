"""Keeps the history of a two-tower model's embeddings: from an MLflow run's artifact to BigQuery."""

__version__ = "0.1.0"
