"""Beam in: pieces of a vocabulary, the rows that belong to them, and what was seen of them."""
