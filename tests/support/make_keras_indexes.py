"""Saves search indexes in `.keras` files with the real libraries, and writes down what these say once they loaded them.

Run as a program: `python make_keras_indexes.py DIR`; the files beside each model are as those of make_indexes.py. The
libraries load such a file where the index is there already: by a class that creates it, or weights alone.
"""

import json
import sys
from pathlib import Path

import keras as keras_3
import keras_rs
import numpy as np
import tensorflow as tf
import tf_keras
from make_indexes import DIMENSION, ITEMS, NUMBERS, USERS, answered, vectors

MANY = [f"item number {number} {'é' * (number % 90)}" for number in range(3000)]
"""Ids that are in several collections of the file's heap."""


def tower(library, *more):
    layers = library.layers
    lookup = layers.StringLookup(mask_token=None)
    lookup.adapt(tf.constant(USERS))  # A list that is given is not stored with a subclassed model.
    return library.Sequential(
        [library.Input((), dtype="string"), lookup, layers.Embedding(len(USERS) + 1, DIMENSION), *more]
    )


def brute_force(ids, matrix, query=None):
    import tensorflow_recommenders as tfrs

    index = tfrs.layers.factorized_top_k.BruteForce(query, k=len(matrix))
    index.index(tf.constant(matrix), None if ids is None else tf.constant(ids))
    index(tf.constant(USERS[:2]) if query else tf.zeros((2, DIMENSION)))
    return index


def retrieval(ids, matrix):
    return keras_rs.layers.BruteForceRetrieval(matrix, None if ids is None else np.array(ids), k=len(matrix))


class Beside(tf_keras.Model):
    """A query tower and TFRS's index; loaded by a class that creates both."""

    def __init__(self, ids, matrix):
        super().__init__()
        self.encoder, self.index = tower(tf_keras), brute_force(ids, matrix)

    def call(self, ids):
        return self.index(self.encoder(ids))


@keras_3.saving.register_keras_serializable()
class Search(keras_3.Model):
    """The same with Keras Recommenders; `item_index` comes before "layers" in the alphabet."""

    def __init__(self, ids, matrix):
        super().__init__()
        self.item_index, self.query = retrieval(ids, matrix), tower(keras_3)

    def call(self, ids):
        return self.item_index(self.query(ids))

    def get_config(self):
        return {}


class Own(keras_3.layers.Layer):
    """A layer of one's own, of a list of numbers beside a matrix: only a person can say that it is an index."""

    def __init__(self, ids, matrix):
        super().__init__()
        self.table = self.add_weight(shape=matrix.shape, initializer="zeros")
        self.numbers = self.add_weight(shape=(len(ids),), dtype="int64", initializer="zeros", trainable=False)
        self.table.assign(matrix)
        self.numbers.assign(ids)

    def call(self, queries):
        return keras_3.ops.matmul(queries, keras_3.ops.transpose(self.table))

    def get_config(self):
        return {"name": self.name}


class ScaNN(keras_3.layers.Layer):
    """What a `.keras` file has of TFRS's ScaNN layer, by its source: ids. scann is built for another TensorFlow."""

    def __init__(self):
        super().__init__()
        self.identifiers = self.add_weight(shape=(len(ITEMS),), dtype="int32", initializer="zeros", trainable=False)

    def call(self, queries):
        return queries

    def get_config(self):
        return {"name": self.name}


def called(model):
    model(tf.constant(USERS[:2]))
    return model


def functional(library, index, *more):
    ids = library.Input((), dtype="string")
    return library.Model(ids, index(tower(library, *more)(ids)))


def index_of(model):
    """Returns the layer of a model that is the index."""
    layers = [model, *model._flatten_layers()]
    return next(each for each in layers if hasattr(each, "_candidates") or hasattr(each, "candidate_embeddings"))


def tower_of(model):
    return next(each for each in model._flatten_layers() if isinstance(each, (keras_3.Sequential, tf_keras.Sequential)))


VECTORS, ZEROS = vectors(), np.zeros((len(MANY), DIMENSION), "float32")
MODELS = {
    "tfrs": (lambda *index: brute_force(*index, tower(tf_keras)), ITEMS, VECTORS),
    "tfrs_integers": (lambda *index: brute_force(*index, tower(tf_keras)), NUMBERS, VECTORS),
    "tfrs_functional": (lambda *index: functional(tf_keras, brute_force(*index)), NUMBERS, VECTORS),
    "tfrs_beside": (lambda *index: called(Beside(*index)), ITEMS, VECTORS),
    "tfrs_many": (brute_force, MANY, ZEROS),
    "keras_rs": (lambda *index: functional(keras_3, retrieval(*index)), NUMBERS, VECTORS),
    "keras_rs_dense": (
        lambda *index: functional(keras_3, retrieval(*index), keras_3.layers.Dense(DIMENSION)),
        NUMBERS,
        VECTORS,
    ),
    "keras_rs_beside": (lambda *index: called(Search(*index)), NUMBERS, VECTORS),
    "keras_rs_without_ids": (lambda *index: functional(keras_3, retrieval(*index)), None, VECTORS),
}
"""Name → a function of ids and vectors, and these."""


def other(ids):
    """Returns as many ids of that kind, to load others into."""
    return None if ids is None else [0] * len(ids) if isinstance(ids[0], int) else ["x"] * len(ids)


def main(folder):
    for name, (make, ids, matrix) in MODELS.items():
        model = make(ids, matrix)
        path = folder / name / "model.keras"
        path.parent.mkdir()
        model.save(path)
        loaded = make(other(ids), np.ones_like(matrix))
        loaded.load_weights(path)
        index = index_of(loaded)
        if name == "tfrs_many":
            items = dict(
                zip((each.decode() for each in index._identifiers.numpy()), index._candidates.numpy(), strict=True)
            )
        else:
            if hasattr(index, "_candidates"):  # Of TFRS, without its query tower.
                index = brute_force(index._identifiers.numpy(), index._candidates.numpy())
            items = answered(index)
        answers = {"item": items}
        if name not in ("tfrs_many", "keras_rs_dense"):
            answers["user"] = dict(zip(USERS, np.asarray(tower_of(model)(tf.constant(USERS))), strict=True))
        for side, rows in answers.items():
            Path(folder, f"{name}.{side}.json").write_text(json.dumps([*rows]), encoding="utf-8")
            np.save(folder / f"{name}.{side}.npy", np.array([*rows.values()], "float32"))
    for name, layer in {
        "own": Own(NUMBERS, vectors()),
        "scann": ScaNN(),
        "empty": keras_rs.layers.BruteForceRetrieval(),
    }.items():
        (folder / name).mkdir()
        model = keras_3.Sequential([layer]) if name == "empty" else functional(keras_3, layer)
        model.save(folder / name / "model.keras")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
