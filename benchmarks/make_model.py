"""Makes a two-tower model of any size as the trainer does, Keras 2 and SavedModel, and an MLflow run that holds it.

The model is saved where the run's artifacts are, without a copy. Prints one line of JSON: run_id, run_name,
folder of the model.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

os.environ["TF_USE_LEGACY_KERAS"] = "1"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["MLFLOW_LOGGING_LEVEL"] = "WARNING"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"

import mlflow
import tensorflow as tf

EXPERIMENT = "benchmark"


class TwoTower(tf.keras.Model):
    """Scores pairs of a user and an item by the dot product of their embeddings."""

    def __init__(self, users, items, dimension):
        super().__init__()
        self.user_layer = tower(users, dimension)
        self.item_layer = tower(items, dimension)

    def call(self, inputs):
        """Returns a score per pair."""
        return tf.reduce_sum(self.user_layer(inputs["user"]) * self.item_layer(inputs["item"]), axis=1)


def tower(vocabulary, dimension):
    """Returns a tower: id → row of the lookup → embedding, whose values are random."""
    lookup = tf.keras.layers.StringLookup(vocabulary=vocabulary, mask_token=None)
    return tf.keras.Sequential([lookup, tf.keras.layers.Embedding(lookup.vocabulary_size(), dimension)])


def vocabulary(tower_name, count, folder):
    """Returns the ids, or the path of a file in the folder that holds them, one per line."""
    ids = (f"{tower_name}-{number:08}" for number in range(count))
    if folder is None:
        return list(ids)
    path = Path(folder, f"{tower_name}s.txt")
    with path.open("w", encoding="utf-8") as file:
        file.writelines(f"{an_id}\n" for an_id in ids)
    return str(path)


def main():
    """Builds, saves, records."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--tracking_uri", required=True, help="MLflow store")
    parser.add_argument("--artifact_root", required=True, help="folder of a new experiment's artifacts")
    parser.add_argument("--users", type=int, required=True)
    parser.add_argument("--items", type=int, required=True)
    parser.add_argument("--dimension", type=int, required=True)
    parser.add_argument("--vocabulary", choices=("list", "file"), required=True)
    parser.add_argument("--trained", type=int, help="when the run began, in milliseconds; default: now")
    args = parser.parse_args()

    client = mlflow.MlflowClient(args.tracking_uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    experiment_id = (
        experiment.experiment_id
        if experiment
        else client.create_experiment(EXPERIMENT, artifact_location=Path(args.artifact_root).absolute().as_uri())
    )
    run = client.create_run(experiment_id, args.trained, run_name=f"{args.users + args.items} rows of {args.dimension}")
    folder = Path(args.artifact_root).absolute() / run.info.run_id / "artifacts" / "model"
    with tempfile.TemporaryDirectory() as files:
        where = files if args.vocabulary == "file" else None
        users, items = vocabulary("user", args.users, where), vocabulary("item", args.items, where)
        model = TwoTower(users, items, args.dimension)
        model({"user": tf.constant(["a"]), "item": tf.constant(["b"])})
        model.save(folder, save_format="tf")
    client.set_terminated(run.info.run_id, "FINISHED")
    print(json.dumps({"run_id": run.info.run_id, "run_name": run.info.run_name, "folder": str(folder)}))


if __name__ == "__main__":
    main()
