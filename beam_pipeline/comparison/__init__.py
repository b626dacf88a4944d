"""How embeddings changed between two trainings: a second pipeline, beside the one that publishes them."""
