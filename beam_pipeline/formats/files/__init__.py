"""Ids and vectors that a trainer logged as files of their own: which arrays and columns, and where their bytes are."""
