"""Makes models that hold a search index, with the real libraries, and writes down what these say is in them.

Run as a program, so that TensorFlow stays out of the process that tests: `python make_indexes.py DIR`. For each model
DIR/<name>/ is the SavedModel, DIR/<name>.<tower>.npy its vectors and DIR/<name>.<tower>.json its ids. What an index
holds is what it answers: the scores of unit vectors are the columns of its matrix.
"""

import json
import os
import sys
from pathlib import Path

os.environ["TF_USE_LEGACY_KERAS"] = "1"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import keras as keras_3
import keras_rs
import numpy as np
import tensorflow as tf
import tensorflow_recommenders as tfrs

DIMENSION = 8
USERS = [f"user-{number}" for number in range(30)]
ITEMS = [f"item-{number}" if number % 3 else f"ítem {number} ü" for number in range(20)]
NUMBERS = [number * number - 7 for number in range(20)]
L = tf.keras.layers


def tower(ids, *more, library=tf.keras):
    layers = library.layers
    lookup = layers.StringLookup(vocabulary=ids, mask_token=None)
    return library.Sequential([library.Input((), dtype="string"), lookup, layers.Embedding(len(ids) + 1, DIMENSION),
                               *more])  # fmt: skip


def vectors():
    return np.random.default_rng(5).normal(size=(len(ITEMS), DIMENSION)).astype("float32")


def answered(search):
    """Returns id → vector of an index, from its answers to unit vectors."""
    scores, ids = (np.asarray(each) for each in search(tf.eye(DIMENSION)))
    found = {}
    for axis in range(DIMENSION):
        for score, name in zip(scores[axis], ids[axis], strict=True):
            name = name.decode() if isinstance(name, bytes) else str(name)
            found.setdefault(name, np.zeros(DIMENSION, "float32"))[axis] = score
    return found


def brute_force(ids, query=None):
    index = tfrs.layers.factorized_top_k.BruteForce(query, k=len(ITEMS))
    index.index(tf.constant(vectors()), None if ids is None else tf.constant(ids))
    index(tf.constant(USERS[:2]) if query else tf.zeros((2, DIMENSION)))
    return index


def tfrs_model(ids):
    """Returns TFRS's layer as most people save it: the model itself."""
    users = tower(USERS)
    return brute_force(ids, users), users, answered(brute_force(ids))


class Beside(tf.keras.Model):
    """The index and the query tower as two attributes of a model."""

    def __init__(self, query):
        super().__init__()
        self.encoder, self.index = query, brute_force(ITEMS)

    def call(self, ids):
        return self.index(self.encoder(ids))


def beside(*more):
    users = tower(USERS, *more)
    model = Beside(users)
    model(tf.constant(USERS[:2]))
    return model, users, answered(brute_force(ITEMS))


class Own(tf.Module):
    """An index of one's own: how it scores and where its ids are differ."""

    def __init__(self, score, ids, *, is_variable=False):
        super().__init__()
        self.user_model, self.score, self.k = tower(USERS), score, len(ITEMS)
        self.vectors = tf.Variable(vectors())
        self.ids = tf.Variable(ids) if is_variable else ids

    def search(self, queries):
        found = tf.math.top_k(self.score(queries, self.vectors), k=self.k)
        return found.values, tf.gather(self.ids, found.indices)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
    def __call__(self, ids):
        return self.search(self.user_model(ids))


class Titled(Own):
    """An index that answers with titles, too."""

    def __init__(self, ids):
        super().__init__(by_matmul, ids, is_variable=True)
        self.item_ids, self.titles = self.ids, tf.Variable([f"title of {name}" for name in ITEMS])

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
    def __call__(self, ids):
        found = tf.math.top_k(self.score(self.user_model(ids), self.vectors), k=self.k)
        return found.values, tf.gather(self.item_ids, found.indices), tf.gather(self.titles, found.indices)


def by_matmul(queries, matrix):
    return tf.matmul(queries, matrix, transpose_b=True)


def by_transpose(queries, matrix):
    return queries @ tf.transpose(matrix)


def by_einsum(queries, matrix):
    return tf.einsum("bd,nd->bn", queries, matrix)


def by_matrix_first(queries, matrix):
    return tf.transpose(tf.matmul(matrix, queries, transpose_b=True))


def by_normalised(queries, matrix):
    return tf.matmul(queries, tf.math.l2_normalize(matrix, axis=-1), transpose_b=True)


def own(score, ids, **options):
    model = Own(score, ids, **options)
    return model, model.user_model, answered(model.search)


def titled():
    model = Titled(ITEMS)
    return model, model.user_model, answered(model.search)


def mismatched():
    model = Own(by_matmul, [*ITEMS, "one more"], is_variable=True)
    return model, model.user_model, {}


def repeated():
    return tfrs_model([*ITEMS[:-1], ITEMS[0]])


def diverged():
    model = Own(by_matmul, ITEMS)
    model.vectors[3, 2].assign(np.nan)
    return model, model.user_model, {}


class Scann(tf.Module):
    """What TFRS's ScaNN layer keeps, by its source: scann itself is built for another TensorFlow than ours."""

    def __init__(self, dataset):
        super().__init__()
        self.query_model, self.identifiers = tower(USERS), tf.Variable(ITEMS)
        self._serialized_searcher = tf.Module()
        for name in ("scann_config", "serialized_partitioner"):
            setattr(self._serialized_searcher, name, tf.Variable("text"))
        self._serialized_searcher.hashed_dataset = tf.Variable(tf.zeros((len(ITEMS), 4), tf.uint8))
        self._serialized_searcher.dataset = tf.Variable(dataset)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
    def __call__(self, ids):
        return self.query_model(ids)


def scann(dataset):
    model = Scann(dataset)
    return model, model.query_model, dict(zip(ITEMS, vectors(), strict=True))


def keras_rs_model():
    users = tower(USERS, library=keras_3)
    retrieval = keras_rs.layers.BruteForceRetrieval(vectors(), np.array(NUMBERS), k=len(ITEMS))
    ids = keras_3.Input((), dtype="string")
    return keras_3.Model(ids, retrieval(users(ids))), users, answered(retrieval)


def alone(ids, *more):
    """Returns a tower that is a model of its own, whatever its ids are called."""
    model = tower(ids, *more)
    answers = np.asarray(model(tf.constant(ids)))
    return model, tower(USERS), dict(zip(ids, answers, strict=True))


MODELS = {
    "alone": lambda: alone(ITEMS),
    "alone_users": lambda: alone(USERS),
    "alone_dense": lambda: alone(ITEMS, L.Dense(DIMENSION)),
    "tfrs": lambda: tfrs_model(ITEMS),
    "tfrs_integers": lambda: tfrs_model(NUMBERS),
    "tfrs_numbered": lambda: tfrs_model(None),
    "tfrs_repeated": repeated,
    "beside": beside,
    "beside_dense": lambda: beside(L.Dense(DIMENSION)),
    "own_constant": lambda: own(by_matmul, tf.constant(ITEMS)),
    "own_in_the_graph": lambda: own(by_transpose, ITEMS),
    "own_integers_in_the_graph": lambda: own(by_matmul, NUMBERS),
    "own_variable": lambda: own(by_einsum, ITEMS, is_variable=True),
    "own_long_integers": lambda: own(by_matrix_first, tf.constant(NUMBERS, tf.int64), is_variable=True),
    "own_normalised": lambda: own(by_normalised, ITEMS),
    "own_titled": titled,
    "mismatched": mismatched,
    "diverged": diverged,
    "scann": lambda: scann(vectors()),
    "scann_quantised": lambda: scann(0.0),
    "keras_rs": keras_rs_model,
}


def main(folder, *names):
    for name in names or MODELS:
        model, users, items = MODELS[name]()
        if isinstance(model, keras_3.Model):
            model.export(f"{folder}/{name}", verbose=False)
        else:
            tf.saved_model.save(model, f"{folder}/{name}")
        answers = {"user": (USERS, np.asarray(users(tf.constant(USERS)))), "item": ([*items], [*items.values()])}
        for tower_name, (ids, matrix) in answers.items():
            Path(folder, f"{name}.{tower_name}.json").write_text(json.dumps(ids), encoding="utf-8")
            np.save(f"{folder}/{name}.{tower_name}.npy", np.array(matrix, "float32"))


if __name__ == "__main__":
    main(*sys.argv[1:])
