"""Makes models whose ids are integers, learnt, or in no order, with real tf-keras and TensorFlow, and what they say.

Run as a program: `python make_tables.py DIR`; the files beside each model are as those of make_models.py.
"""

import json
import os
import sys
from pathlib import Path

os.environ["TF_USE_LEGACY_KERAS"] = "1"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import numpy as np
import tensorflow as tf
from make_models import TwoTower

LAYERS = {"user": "user_layer", "item": "item_layer"}


def write_down(folder, name, side, ids, vectors):
    np.save(folder / f"{name}.{side}.npy", vectors.astype(np.float64))
    (folder / f"{name}.{side}.json").write_text(json.dumps(ids), encoding="utf-8")


def pair(lookup, dimension, rows=None):
    return tf.keras.Sequential([lookup, tf.keras.layers.Embedding(rows or lookup.vocabulary_size(), dimension)])


def save_layers(folder, name, user, item, example):
    model = TwoTower(user, item)
    model({"user_id": example, "item_id": example})
    model.save(folder / name, save_format="tf")
    loaded = tf.keras.models.load_model(folder / name)
    for side, layer in LAYERS.items():
        lookup, embedding = getattr(loaded, layer).layers
        ids = lookup.get_vocabulary(include_special_tokens=False)
        rows = lookup(tf.constant(ids, example.dtype)).numpy()
        write_down(folder, name, side, [str(key) for key in ids], embedding.get_weights()[0][rows])


def typed(keys):
    return tf.constant(keys, tf.int64 if isinstance(keys[0], int) else tf.string)


class Side(tf.Module):
    """A table and a variable, with no Keras at all."""

    def __init__(self, keys, rows, size, mutable, dtype):
        super().__init__()
        keys, values = typed(keys), tf.constant(rows, tf.int64)
        if mutable:
            self.table = tf.lookup.experimental.MutableHashTable(keys.dtype, tf.int64, -1)
            self.table.insert(keys, values)
        else:
            self.table = tf.lookup.StaticHashTable(tf.lookup.KeyValueTensorInitializer(keys, values), -1)
        self.vectors = tf.Variable(tf.cast(tf.random.normal([size, 6]), dtype), name="vectors")

        self.answer = tf.function(self._answer, input_signature=[tf.TensorSpec([None], keys.dtype)])

    def _answer(self, ids):
        return tf.gather(self.vectors, self.table.lookup(ids))


class Flat(tf.Module):
    """Tables and variables side by side: which belong together, only the call says."""

    def __init__(self, users, items):
        super().__init__()
        initializer = tf.lookup.KeyValueTensorInitializer(users, tf.range(len(users), dtype=tf.int64))
        # Unknown ids get the rows after those of the others.
        self.user_table = tf.lookup.StaticVocabularyTable(initializer, num_oov_buckets=3)
        self.item_table = tf.lookup.StaticVocabularyTable(
            tf.lookup.TextFileInitializer(items, tf.int64, tf.lookup.TextFileIndex.WHOLE_LINE, tf.int64, -1), 1
        )
        self.user_vectors = tf.Variable(tf.random.normal([len(users) + 3, 5]))
        self.item_vectors = tf.Variable(tf.random.normal([81, 5]))
        self.kernel = tf.Variable(tf.ones([5, 5]))

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string), tf.TensorSpec([None], tf.int64)])
    def __call__(self, user, item):
        users = tf.gather(self.user_vectors, self.user_table.lookup(user))
        items = tf.nn.embedding_lookup(self.item_vectors, self.item_table.lookup(item))
        return {
            "user": users,
            "item": items,
            "scores": tf.matmul(tf.matmul(users, self.kernel), items, transpose_b=True),
        }


def save_flat(folder, name, users, items):
    path = folder / f"{name}.txt"
    path.write_text("".join(f"{number}\n" for number in items))
    tf.saved_model.save(Flat(users, str(path)), str(folder / name))
    answers = tf.saved_model.load(str(folder / name))(tf.constant(users), tf.constant(items, tf.int64))
    for side, those in (("user", users), ("item", items)):
        write_down(folder, name, side, [str(key) for key in those], answers[side].numpy())


class Unread(tf.Module):
    """What is refused: for each layer a table of another kind."""

    def __init__(self, folder):
        super().__init__()
        path = folder / "columns.csv"
        path.write_text("a,0\nb,1\n")
        tables = {
            "dense": tf.lookup.experimental.DenseHashTable(tf.int64, tf.int64, -1, -2, -3),
            "narrow": tf.lookup.StaticHashTable(
                tf.lookup.KeyValueTensorInitializer(tf.constant([1, 2]), tf.constant([0, 1])), -1
            ),
            "columns": tf.lookup.StaticHashTable(
                tf.lookup.TextFileInitializer(str(path), tf.string, 0, tf.int64, 1, delimiter=","), -1
            ),
        }
        for name, table in tables.items():
            layer = tf.Module()
            layer.table, layer.vectors = table, tf.Variable(tf.ones([2, 3]))
            setattr(self, name, layer)


class Apart(tf.train.experimental.ShardingCallback):
    """Every tensor in a data file of its own."""

    description = "apart"

    def __call__(self, tensors):
        return [{each.checkpoint_key: {each.slice_spec: each.tensor}} for each in tensors]


def save_module(folder, name, dtype=tf.float32, sharding=None, **sides):
    model = tf.Module()
    for side, (keys, rows, size, mutable) in sides.items():
        setattr(model, LAYERS[side], Side(keys, rows, size, mutable, dtype))
    options = tf.saved_model.SaveOptions(experimental_sharding_callback=sharding)
    tf.saved_model.save(model, str(folder / name), options=options)
    loaded = tf.saved_model.load(str(folder / name))
    for side, (keys, *_) in sides.items():
        vectors = getattr(loaded, LAYERS[side]).answer(typed(keys))
        write_down(folder, name, side, [str(key) for key in keys], tf.cast(vectors, tf.float64).numpy())


def main(folder):
    tf.random.set_seed(7)
    random = np.random.default_rng(7)
    # -1 stands for unknown ids, and 0 for the mask.
    integers = [n for n in (random.permutation(3000) - 1500).tolist() if n not in (-1, 0)]
    path = folder / "integers.txt"
    path.write_text("\n".join(map(str, integers[:700])) + "\n")
    layers = tf.keras.layers
    save_layers(
        folder,
        "integers",
        pair(layers.IntegerLookup(vocabulary=integers, num_oov_indices=2), 4),
        pair(layers.IntegerLookup(vocabulary=str(path), mask_token=0), 4, rows=800),
        tf.constant([1, 2], tf.int64),
    )
    learnt = []
    for seed, size in ((1, 2000), (2, 300)):
        lookup = layers.StringLookup(mask_token="nothing", num_oov_indices=3)
        lookup.adapt(tf.constant([f"word {n}" for n in np.random.default_rng(seed).zipf(1.3, 20 * size) if n < size]))
        # Without an input, a Sequential takes the type of a learnt lookup's rows for that of its ids.
        first = tf.keras.Input(shape=(), dtype=tf.string)
        learnt.append(tf.keras.Sequential([first, *pair(lookup, 4).layers]))
    save_layers(folder, "learnt", *learnt, tf.constant(["a", "b"]))
    learnt = []
    for size, mask in ((500, None), (40, 0)):
        lookup = layers.IntegerLookup(mask_token=mask, num_oov_indices=2)
        lookup.adapt(tf.constant(np.random.default_rng(size).zipf(1.3, 20 * size) % size - size // 3))
        learnt.append(pair(lookup, 4))
    save_layers(folder, "learnt_integers", *learnt, tf.constant([1, 2], tf.int64))
    names = [f"name é {n}" for n in range(5000)]
    shuffled = random.permutation(6000)[:5000].tolist()
    few, twice = names[:50], [*range(25), *range(25)]
    save_module(folder, "static", user=(names, shuffled, 6000, False), item=(few, twice, 30, False))
    save_module(folder, "mutable", tf.float16, user=(names, shuffled, 6000, True), item=(few, twice, 50, True))
    save_module(
        folder,
        "sharded",
        tf.float64,
        Apart(),
        user=(names, shuffled, 6000, True),
        item=([7, -8, 1 << 40], [2, 0, 1], 3, True),
    )
    save_flat(folder, "flat", names[:90], [number * number - 3 for number in range(80)])
    tf.saved_model.save(Unread(folder), str(folder / "unread"))
    in_slices = tf.train.experimental.MaxShardSizePolicy(max_shard_size=1000)
    save_module(folder, "sliced", sharding=in_slices, user=(few, twice, 50, False), item=(few, twice, 50, False))
    save_module(
        folder, "bfloat", tf.bfloat16, user=(few, [*range(50)], 50, False), item=(few, [*range(50, 0, -1)], 51, False)
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
