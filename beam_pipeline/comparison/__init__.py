"""How embeddings changed between two trainings: a pipeline of its own, beside the one that publishes them."""
