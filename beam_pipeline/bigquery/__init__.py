"""Beam out: load files, staging tables, and the transaction that publishes them."""
