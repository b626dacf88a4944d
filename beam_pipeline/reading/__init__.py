"""Beam in: pieces of a vocabulary, the rows that belong to them, and what was seen of them.

`pieces` and `unordered` cut, `rows` reads, `tally` decides whether all that was read is all there is; none of them
knows Beam. `transforms` wires them.
"""
