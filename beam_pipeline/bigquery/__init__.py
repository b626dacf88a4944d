"""Beam out: load files, staging tables, and the transaction that publishes them.

`tables` has the names, the schema and the SQL; `avro` and `staging` write; `publication` has the steps of a job and why
each is safe to repeat; `indexes` are vector indexes. `history` and `storage_read` read what the tables hold.
"""
