"""MLflow: which run and model are meant, and where the model's files can be read."""
