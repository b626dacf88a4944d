"""Trains towers that continue after their embedding, and logs them in one of the forms that can be published.

* `--form=packed` logs the towers' outputs in place of the towers, each a lookup and an embedding: publish it without
  flags.
* `--form=vectors` logs the towers' outputs as Parquet files, and no model: publish it with
  `--vectors=user=vectors/user.parquet,item=vectors/item.parquet`.
* `--form=model` logs the model as it is: publish it with `--compute=user,item`.

All give the same tables, to 1e-6. Several forms are several runs of one training.

Data and logging are those of train_two_tower.py. Prints the id of each run, and nothing else, to stdout.
"""

import argparse
import functools

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from train_two_tower import DIMENSION, ITEMS, USERS, listen, log, tf, utc

L = tf.keras.layers
FORMS = ("packed", "vectors", "model")


class DeepTwoTower(tf.keras.Model):
    """Scores pairs of a user and an item by the dot product of what their towers return."""

    def __init__(self):
        super().__init__()
        self.user_layer, self.item_layer = deep_tower(USERS), deep_tower(ITEMS)

    def call(self, inputs):
        """Returns a score per pair (a logit)."""
        return tf.reduce_sum(self.user_layer(inputs["user"]) * self.item_layer(inputs["item"]), axis=1)


def deep_tower(vocabulary):
    """Returns a tower: id → row of the lookup → embedding → two dense layers."""
    lookup = L.StringLookup(vocabulary=vocabulary, mask_token=None)
    return tf.keras.Sequential(
        [lookup, L.Embedding(lookup.vocabulary_size(), 32), L.Dense(64, activation="relu"), L.Dense(DIMENSION)]
    )


def train(seed):
    """Returns a trained model."""
    tf.keras.utils.set_random_seed(seed)
    model = DeepTwoTower()
    loss = tf.keras.losses.BinaryCrossentropy(from_logits=True)
    model.compile(optimizer=tf.keras.optimizers.Adam(0.01), loss=loss)
    pairs, labels = listen(np.random.default_rng(seed))
    model.fit(pairs, labels, batch_size=512, epochs=5, verbose=0)
    return model


def outputs(tower, ids):
    """Returns the vectors that a tower serves for ids, a matrix of float32."""
    return tower(tf.constant(ids)).numpy()


def packed(model):
    """Returns a model whose towers are a lookup and an embedding, whose rows are what the model's towers return."""
    towers = []
    for tower, vocabulary in ((model.user_layer, USERS), (model.item_layer, ITEMS)):
        lookup = L.StringLookup(vocabulary=vocabulary, mask_token=None)
        vectors = outputs(tower, lookup.get_vocabulary())  # [UNK] first
        rows = L.Embedding(len(vectors), DIMENSION)
        rows.build(None)
        rows.set_weights([vectors])
        towers.append(tf.keras.Sequential([lookup, rows]))
    packed_model = Packed(*towers)
    packed_model({"user": tf.constant(USERS[:2]), "item": tf.constant(ITEMS[:2])})
    return packed_model


class Packed(DeepTwoTower):
    """The same scores from packed towers."""

    def __init__(self, user_layer, item_layer):
        tf.keras.Model.__init__(self)
        self.user_layer, self.item_layer = user_layer, item_layer


def write_vectors(model, folder):
    """Writes the vectors that each tower serves into a Parquet file of ids and vectors."""
    for name, tower, ids in (("user", model.user_layer, USERS), ("item", model.item_layer, ITEMS)):
        lists = pa.FixedSizeListArray.from_arrays(outputs(tower, ids).ravel(), DIMENSION)
        pq.write_table(pa.table({"id": ids, "vector": lists}), f"{folder}/{name}.parquet", write_page_checksum=True)


def main():
    """Trains, logs, prints the run's id."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--tracking_uri", required=True, help="MLflow store or server")
    parser.add_argument("--artifact_root", help="where a new experiment keeps artifacts, if not in the store's default")
    parser.add_argument("--start", type=utc, required=True, help="start of the run, UTC, e.g. 2026-03-01T23:30")
    parser.add_argument("--seed", type=int, default=1, help="of data and weights")
    parser.add_argument("--form", choices=FORMS, nargs="+", required=True, help="what is logged")
    args = parser.parse_args()
    model = train(args.seed)
    for form in args.form:
        if form == "vectors":
            save = functools.partial(write_vectors, model)
        else:
            save = functools.partial((packed(model) if form == "packed" else model).save, save_format="tf")
        path = "vectors" if form == "vectors" else "model"
        print(log(save, args.start, args.tracking_uri, args.artifact_root, path))


if __name__ == "__main__":
    main()
