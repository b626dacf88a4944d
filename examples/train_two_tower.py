"""Trains a small two-tower model and logs it to MLflow as the real trainer does: Keras 2, SavedModel, log_artifacts.

The data is invented: 300 users, each with one favourite genre, and 4 genres of 30 items. What users of one taste
listen to ends up close together, so an item's nearest neighbours are of its own genre. `--moved_item` is listened to
by the fans of the next genre instead, so that training has it among other neighbours.

Prints the run's id, and nothing else, to stdout.
"""

import argparse
import contextlib
import functools
import os
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

# These are read by the imports below.
os.environ["TF_USE_LEGACY_KERAS"] = "1"  # tf.keras is Keras 2 (tf-keras), whose SavedModel is the format in use
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["MLFLOW_LOGGING_LEVEL"] = "WARNING"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # a demo calls nobody


@contextlib.contextmanager
def silent_stderr():
    """Drops what native code writes to stderr: no log level holds back TensorFlow's notes on the processor."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


with silent_stderr():
    import mlflow
    import tensorflow as tf

EXPERIMENT = "two_tower"
DIMENSION = 16
GENRES = ["folk", "jazz", "metal", "techno"]
USERS = [f"user-{number:03}" for number in range(300)]
ITEMS = [f"item-{genre}-{number:03}" for genre in GENRES for number in range(30)]


class TwoTower(tf.keras.Model):
    """Scores pairs of a user and an item by the dot product of their embeddings."""

    def __init__(self, users, items):
        super().__init__()
        self.user_layer = tower(users)
        self.item_layer = tower(items)

    def call(self, inputs):
        """Returns a score per pair (a logit)."""
        return tf.reduce_sum(self.user_layer(inputs["user"]) * self.item_layer(inputs["item"]), axis=1)


def tower(vocabulary):
    """Returns a tower: id → row of the lookup → embedding. Row 0 is for ids that are not in the vocabulary."""
    lookup = tf.keras.layers.StringLookup(vocabulary=vocabulary, mask_token=None)
    return tf.keras.Sequential([lookup, tf.keras.layers.Embedding(lookup.vocabulary_size(), DIMENSION)])


def listen(rng, moved_item=None):
    """Returns pairs and labels: per user 40 items played, 9 in 10 of the favourite genre, and 40 not played."""
    tastes = np.arange(len(ITEMS)) // 30  # which genre's fans play the item
    if moved_item:
        moved = ITEMS.index(moved_item)
        tastes[moved] = (tastes[moved] + 1) % len(GENRES)
    users, items, labels = [], [], []
    for number, user in enumerate(USERS):
        liked = tastes == number % len(GENRES)
        for label, favourite in ((1.0, 0.9), (0.0, 0.1)):
            weights = np.where(liked, favourite / liked.sum(), (1 - favourite) / (~liked).sum())
            items += list(rng.choice(ITEMS, size=40, p=weights))
            users += [user] * 40
            labels += [label] * 40
    return {"user": np.array(users), "item": np.array(items)}, np.array(labels, "float32")


def train(seed, moved_item, vocabulary_folder=None):
    """Returns a trained model; with a folder, its vocabularies are files there and become assets of the SavedModel."""
    tf.keras.utils.set_random_seed(seed)
    vocabularies = [USERS, ITEMS]
    if vocabulary_folder:
        files = [Path(vocabulary_folder, "users.txt"), Path(vocabulary_folder, "items.txt")]
        for file, ids in zip(files, vocabularies, strict=True):
            file.write_text("".join(f"{an_id}\n" for an_id in ids), encoding="utf-8")
        vocabularies = [str(file) for file in files]
    model = TwoTower(*vocabularies)
    model.compile(
        optimizer=tf.keras.optimizers.Adam(0.02),
        loss=tf.keras.losses.BinaryCrossentropy(from_logits=True),
    )
    pairs, labels = listen(np.random.default_rng(seed), moved_item)
    model.fit(pairs, labels, batch_size=512, epochs=10, verbose=0)
    return model


def log(save, start, tracking_uri, artifact_root, artifact_path="model"):
    """Logs what `save` writes to a folder to a finished run that started at `start`, and returns the run's id."""
    mlflow.set_tracking_uri(tracking_uri)
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name(EXPERIMENT)
    experiment_id = (
        experiment.experiment_id
        if experiment
        else client.create_experiment(EXPERIMENT, artifact_location=artifact_root)
    )
    run = client.create_run(
        experiment_id,
        start_time=int(start.timestamp() * 1000),
        run_name=f"weekly-{start:%Y-%m-%d}",
    )
    with mlflow.start_run(run_id=run.info.run_id), tempfile.TemporaryDirectory() as folder:
        mlflow.log_params({"dimension": DIMENSION, "users": len(USERS), "items": len(ITEMS)})
        save(folder)
        mlflow.log_artifacts(folder, artifact_path)
    return run.info.run_id


def utc(text):
    """Returns the moment that an ISO date and time without an offset means in UTC."""
    moment = datetime.fromisoformat(text)
    return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)


def main():
    """Trains, logs, prints the run's id."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--tracking_uri", required=True, help="MLflow store or server")
    parser.add_argument("--artifact_root", help="where a new experiment keeps artifacts, if not in the store's default")
    parser.add_argument("--start", type=utc, required=True, help="start of the run, UTC, e.g. 2026-03-01T23:30")
    parser.add_argument("--seed", type=int, default=1, help="of data and weights")
    parser.add_argument("--moved_item", choices=ITEMS, metavar="ITEM", help="an item that fans of another genre play")
    parser.add_argument("--vocabulary_file", action="store_true", help="keep ids in files (assets/), not in the graph")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = train(args.seed, args.moved_item, folder if args.vocabulary_file else None)
        save = functools.partial(model.save, save_format="tf")
        print(log(save, args.start, args.tracking_uri, args.artifact_root))


if __name__ == "__main__":
    main()
