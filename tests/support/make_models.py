"""Makes models as the trainer does, with real tf-keras, and writes down what Keras itself says is in them.

Run as a program, so that TensorFlow stays out of the process that tests: `python make_models.py DIR`. For each model
DIR/<name>/ is the SavedModel, DIR/<name>.<tower>.npy its vectors and DIR/<name>.<tower>.json its ids, both read back
with `tf.keras.models.load_model`.
"""

import json
import os
import sys
from pathlib import Path

os.environ["TF_USE_LEGACY_KERAS"] = "1"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import numpy as np
import tensorflow as tf

ODD_IDS = [
    "plain",
    "Çédille é ü ß",
    "日本語",
    "it's",
    'say "hello"',
    "back`tick",
    "a,b;c\td",
    "  spaces  ",
    "back\\slash \\n",
    "x" * 300,
    "null\u0000byte",
    "😀",
    "' OR 1=1; --",
    "[UNK] not",
    "e\u0301 combining",
]


class TwoTower(tf.keras.Model):
    def __init__(self, user_layer, item_layer):
        super().__init__()
        self.user_layer = user_layer
        self.item_layer = item_layer

    def call(self, inputs):
        users = self.user_layer(inputs["user_id"])
        return tf.reduce_sum(users * self.item_layer(inputs["item_id"]), -1)


def tower(vocabulary, dimension, rows=None, dtype=None, **lookup):
    lookup = tf.keras.layers.StringLookup(vocabulary=vocabulary, **{"mask_token": None, **lookup})
    embedding = tf.keras.layers.Embedding(rows or lookup.vocabulary_size(), dimension, dtype=dtype)
    return tf.keras.Sequential([lookup, embedding])


class Named(tf.keras.Model):
    """A model whose towers have any names."""

    def __init__(self, **towers):
        super().__init__()
        self.names = [*towers]
        for name, layer in towers.items():
            setattr(self, name, layer)

    def call(self, inputs):
        return tf.add_n([getattr(self, name)(inputs) for name in self.names])


def write(folder, name, user_layer, item_layer):
    model = TwoTower(user_layer, item_layer)
    model({"user_id": tf.constant(["a", "b"]), "item_id": tf.constant(["a", "b"])})
    model.save(folder / name, save_format="tf")
    write_down(folder, name, user="user_layer", item="item_layer")


def write_named(folder, name, user, item, **towers):
    model = Named(**towers)
    model(tf.constant(["a", "b"]))
    model.save(folder / name, save_format="tf")
    write_down(folder, name, user=user, item=item)


def write_down(folder, name, **sides):
    loaded = tf.keras.models.load_model(folder / name)
    for side, layer in sides.items():
        lookup, embedding = getattr(loaded, layer).layers
        ids = [str(token) for token in lookup.get_vocabulary(include_special_tokens=False)]
        rows = lookup(tf.constant(ids)).numpy()
        vectors = embedding.get_weights()[0][rows].astype(np.float64)
        np.save(folder / f"{name}.{side}.npy", vectors)
        (folder / f"{name}.{side}.json").write_text(json.dumps(ids), encoding="utf-8")


def lines(folder, name, ids, end="\n"):
    path = folder / name
    path.write_bytes("\n".join(ids).encode() + end.encode())
    return str(path)


def main(folder):
    tf.random.set_seed(7)
    users = [f"u{i}" for i in range(3000)] + ODD_IDS
    items = [f"item {i}" for i in range(2000)] + [name for name in ODD_IDS if name != "null\u0000byte"]
    write(folder, "plain", tower(users, 8), tower(lines(folder, "items.txt", items), 8))
    # The same ids, newly trained; and vectors of another length.
    write(folder, "retrained", tower(users, 8), tower(lines(folder, "items.txt", items), 8))
    write(folder, "longer", tower(users[:50], 12), tower(items[:50], 12))
    few = [f"few {i}" for i in range(100)]
    write(
        folder,
        "special",
        tower(few, 4, rows=150, num_oov_indices=3, mask_token="nothing"),
        tower(lines(folder, "few.txt", few, end=""), 4, rows=137, mask_token="nothing"),
    )
    write(folder, "one", tower(["only"], 4), tower(lines(folder, "one.txt", ["carriage\rreturn"]), 4))
    write_named(folder, "queries", "query_tower", "Candidates", query_tower=tower(few, 4), Candidates=tower(few[:9], 4))
    pairs = {name: tower(few, 4) for name in ("user_tower", "item_tower", "city_tower")}
    write_named(folder, "three", "user_tower", "item_tower", **pairs)
    write(folder, "float64", tower(few, 3, dtype="float64"), tower(few[:7], 3, dtype="float64"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
