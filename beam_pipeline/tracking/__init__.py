"""MLflow: which run and model a job publishes, and where the model's files can be read."""
