"""How embeddings changed between two trainings: a second pipeline, beside the one that publishes them.

`measures`, `totals` and `neighbours` are the mathematics, without Beam or BigQuery; `measuring`, `values` and
`publishing` are the steps that `pipeline` wires. `tables` has the SQL, `results` says what is usual, `page` and
`terminal` show it; `command` leads through them.
"""
