"""The search within one training: nearest items, recommended items, similar users.

`sql` is for BigQuery's VECTOR_SEARCH, `exact` for emulators, which have none; `finding` chooses between them.
"""
