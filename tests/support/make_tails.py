"""Makes models whose towers end at their embeddings, or go on, with the real libraries, and writes down what they answer.

Run as a program: `python make_tails.py DIR`. For each model DIR/<name>/ is the model, and DIR/<name>.json says of each
tower what the library answers when it is called with the ids: "row" of the embedding, "scaled" rows, or "other".
"""

import json
import os
import sys
from pathlib import Path

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["KERAS_BACKEND"] = "tensorflow"

import keras
import numpy as np
import tensorflow as tf
import tf_keras

USERS = [f"user-{number}" for number in range(9)]
ITEMS = [f"item-{number}" for number in range(7)]
IDS = {"user": USERS, "item": ITEMS}
DIMENSION = 4
SPREAD = "glorot_normal"  # Wide enough for a row to differ from what an activation makes of it.
MODELS = {}
"""Name → a function that saves the model to a folder and returns, of each tower, a call of it and its embedding."""


def model(function):
    MODELS[function.__name__] = function
    return function


def pair(library, ids, *more, name=None, **options):
    """Layers of a tower: a lookup and an embedding, and whatever comes after them."""
    lookup = library.layers.StringLookup(vocabulary=ids, mask_token=None)
    embedding = library.layers.Embedding(len(ids) + 1, DIMENSION, embeddings_initializer=SPREAD, **options)
    return library.Sequential([lookup, embedding, *more], name=name)


class TwoTower(tf_keras.Model):
    """Two layers, compared by a dot product unless a subclass does otherwise."""

    def __init__(self, user_layer, item_layer):
        super().__init__()
        self.user_layer, self.item_layer = user_layer, item_layer

    def call(self, inputs):
        return self.compare(self.user(inputs["user"]), self.item(inputs["item"]))

    def user(self, ids):
        return self.user_layer(ids)

    def item(self, ids):
        return self.item_layer(ids)

    def compare(self, users, items):
        return tf.reduce_sum(users * items, -1)


def built(made, **inputs):
    made({"user": tf.constant(USERS[:2]), "item": tf.constant(ITEMS[:2]), **inputs})
    return made


def save(made, folder, **options):
    made.save(folder, save_format="tf", **options)
    return {
        side: (getattr(made, side), getattr(made, f"{side}_layer").layers[1].embeddings) for side in ("user", "item")
    }


def after_both(*more, **options):
    """A function that saves a model whose towers have these layers after their embeddings."""

    def write(folder):
        sides = [pair(tf_keras, ids, *(make() for make in more), **options) for ids in IDS.values()]
        return save(built(TwoTower(*sides)), folder)

    return write


L = tf_keras.layers
MODELS |= {
    "plain": after_both(),
    "dense": after_both(lambda: L.Dense(DIMENSION)),
    "dense_of_another_length": after_both(lambda: L.Dense(8, activation="relu"), lambda: L.Dense(3)),
    "dropout": after_both(lambda: L.Dropout(0.4), lambda: L.Activation("linear"), lambda: L.GaussianNoise(0.1)),
    "normalised": after_both(L.UnitNormalization),
    "normalised_by_lambda": after_both(lambda: L.Lambda(lambda rows: tf.math.l2_normalize(rows, axis=-1))),
    "normalised_over_the_batch": after_both(lambda: L.Lambda(lambda rows: tf.math.l2_normalize(rows, axis=0))),
    "batch_normalised": after_both(lambda: L.BatchNormalization(gamma_initializer="uniform")),
    "layer_normalised": after_both(L.LayerNormalization),
    "activated": after_both(lambda: L.Activation("tanh")),
    "halved": after_both(lambda: L.Rescaling(0.5)),
    "shifted": after_both(lambda: L.Rescaling(1.0, offset=0.5)),
    "regularised": after_both(activity_regularizer="l2", embeddings_regularizer="l2"),
    "reshaped": after_both(lambda: L.Reshape((1, DIMENSION)), L.Flatten),
    "squared": after_both(lambda: L.Lambda(lambda rows: rows * rows)),
    "doubled": after_both(lambda: L.Lambda(lambda rows: tf.concat([rows, rows], -1))),
    "gate": after_both(lambda: L.Lambda(lambda rows: rows * tf.sigmoid(rows))),
}


def sides(*more):
    return [pair(tf_keras, ids, *more) for ids in IDS.values()]


@model
def dense_outside_of_the_layer(folder):
    class Model(TwoTower):
        def __init__(self, *layers):
            super().__init__(*layers)
            self.dense = tf_keras.layers.Dense(DIMENSION)

        def user(self, ids):
            return self.dense(self.user_layer(ids))

    return save(built(Model(*sides())), folder)


@model
def residual(folder):
    class Model(TwoTower):
        def __init__(self, *layers):
            super().__init__(*layers)
            self.dense = tf_keras.layers.Dense(DIMENSION)

        def user(self, ids):
            rows = self.user_layer(ids)
            return rows + self.dense(rows)

    return save(built(Model(*sides())), folder)


@model
def cosine_in_the_call(folder):
    class Model(TwoTower):
        def compare(self, users, items):
            return -tf_keras.losses.cosine_similarity(users, items)

    return save(built(Model(*sides())), folder)


@model
def divided_by_the_norm(folder):
    class Model(TwoTower):
        def user(self, ids):
            rows = self.user_layer(ids)
            return rows / tf.norm(rows, axis=-1, keepdims=True)

    return save(built(Model(*sides())), folder)


@model
def temperature(folder):
    class Model(TwoTower):
        def __init__(self, *layers):
            super().__init__(*layers)
            self.temperature = self.add_weight("temperature", shape=(), initializer="ones")

        def compare(self, users, items):
            return tf.matmul(users, items, transpose_b=True) / tf.exp(self.temperature)

    return save(built(Model(*sides())), folder)


@model
def biased(folder):
    class Model(TwoTower):
        def __init__(self, *layers):
            super().__init__(*layers)
            self.biases = [tf_keras.layers.Embedding(len(ids) + 1, 1) for ids in IDS.values()]

        def call(self, inputs):
            score = self.compare(self.user(inputs["user"]), self.item(inputs["item"]))
            for side, bias in zip(("user", "item"), self.biases, strict=True):
                score += bias(getattr(self, f"{side}_layer").layers[0](inputs[side]))[:, 0]
            return tf.sigmoid(score)

    return save(built(Model(*sides())), folder)


@model
def concatenated(folder):
    class Model(TwoTower):
        def __init__(self, *layers):
            super().__init__(*layers)
            self.dense = tf_keras.Sequential([tf_keras.layers.Dense(5, activation="relu"), tf_keras.layers.Dense(1)])

        def compare(self, users, items):
            return self.dense(tf.concat([users, items], -1))

    return save(built(Model(*sides())), folder)


@model
def multiplied_and_weighted(folder):
    class Model(TwoTower):
        def __init__(self, *layers):
            super().__init__(*layers)
            self.dense = tf_keras.layers.Dense(1)

        def compare(self, users, items):
            return self.dense(users * items)

    return save(built(Model(*sides())), folder)


@model
def difference(folder):
    class Model(TwoTower):
        def compare(self, users, items):
            return tf.reduce_sum(tf.square(users - items), -1)

    return save(built(Model(*sides())), folder)


@model
def two_tasks(folder):
    """A retrieval by dot product and a rating by layers of its own."""

    class Model(TwoTower):
        def __init__(self, *layers):
            super().__init__(*layers)
            self.dense = tf_keras.layers.Dense(1)

        def compare(self, users, items):
            return users, items, tf.reduce_sum(users * items, -1), self.dense(tf.concat([users, items], -1))

    return save(built(Model(*sides())), folder)


@model
def triplets(folder):
    class Model(TwoTower):
        def call(self, inputs):
            users = self.user_layer(inputs["user"])
            liked, others = self.item_layer(inputs["item"]), self.item_layer(inputs["other"])
            return tf.reduce_sum(users * liked, -1) - tf.reduce_sum(users * others, -1)

    return save(built(Model(*sides()), other=tf.constant(ITEMS[2:4])), folder)


@model
def mean_of_a_list(folder):
    """The user is the mean of the items that were listened to, of the one item embedding that there is."""

    class Model(TwoTower):
        def user(self, ids):
            return tf.reduce_mean(self.user_layer(ids), 1)

        def item(self, ids):
            return self.item_layer(ids)

    one = pair(tf_keras, ITEMS)
    made = Model(pair(tf_keras, ITEMS), one)
    built(made, user=tf.constant([ITEMS[:3]] * 2))
    saved = save(made, folder)
    return {"user": (lambda _: made.user(tf.constant([[i, ITEMS[0]] for i in ITEMS])), saved["user"][1]),
            "item": saved["item"]}  # fmt: skip


@model
def sequence(folder):
    class Model(TwoTower):
        def __init__(self, *layers):
            super().__init__(*layers)
            self.gru = tf_keras.layers.GRU(DIMENSION)

        def user(self, ids):
            return self.gru(self.user_layer(ids))

    made = Model(*sides())
    built(made, user=tf.constant([USERS[:3]] * 2))
    saved = save(made, folder)
    return {
        "user": (lambda ids: made.user(tf.expand_dims(ids, 1)), saved["user"][1]),
        "item": saved["item"],
    }


@model
def features(folder):
    """A second feature is concatenated to the user's id."""

    class Model(TwoTower):
        def __init__(self, *layers):
            super().__init__(*layers)
            self.dense = tf_keras.layers.Dense(DIMENSION)

        def call(self, inputs):
            users = tf.concat([self.user_layer(inputs["user"]), inputs["age"]], -1)
            return self.compare(self.dense(users), self.item_layer(inputs["item"]))

    made = Model(*sides())
    built(made, age=tf.ones([2, 1]))
    saved = save(made, folder)

    def with_age(ids):
        return made.dense(tf.concat([made.user_layer(ids), tf.ones([len(ids), 1])], -1))

    return {"user": (with_age, saved["user"][1]), "item": saved["item"]}


@model
def summed_features(folder):
    """A second feature is added to the user's id."""

    class Model(TwoTower):
        def __init__(self, *layers):
            super().__init__(*layers)
            self.city = pair(tf_keras, ["Lyon", "Nice"])

        def call(self, inputs):
            users = self.user_layer(inputs["user"]) + self.city(inputs["city"])
            return self.compare(users, self.item_layer(inputs["item"]))

    made = Model(*sides())
    built(made, city=tf.constant(["Lyon", "Nice"]))
    saved = save(made, folder)

    def with_city(ids):
        return made.user_layer(ids) + made.city(tf.constant(["Nice"] * len(ids)))

    return {"user": (with_city, saved["user"][1]), "item": saved["item"]}


@model
def signatures(folder):
    """A signature for each tower, one for the score and one for similar items."""
    made = built(TwoTower(*sides()))
    strings = tf.TensorSpec([None], tf.string)

    @tf.function(input_signature=[strings])
    def user(ids):
        return {"vectors": made.user(ids)}

    @tf.function(input_signature=[strings])
    def item(ids):
        return {"vectors": made.item(ids)}

    @tf.function(input_signature=[strings, strings])
    def score(users, items):
        return {"scores": made({"user": users, "item": items})}

    @tf.function(input_signature=[strings])
    def similar(ids):
        scores = tf.matmul(made.item(ids), made.item_layer.layers[1].embeddings, transpose_b=True)
        return {"rows": tf.math.top_k(scores, 3).indices}

    calls = {"serving_default": score, "user": user, "item": item, "similar": similar}
    return save(made, folder, signatures=calls)


def refused(function):
    """Marks a model that has no tower of that kind: what its calls answer does not matter."""
    MODELS[function.__name__] = lambda folder: function(folder) and {}
    return function


@refused
def one_hot(folder):
    """A lookup whose row numbers become one-hot vectors, which a kernel multiplies."""
    layers = [
        tf_keras.Sequential(
            [
                tf_keras.layers.StringLookup(vocabulary=ids, mask_token=None),
                tf_keras.layers.CategoryEncoding(len(ids) + 1, "one_hot"),
                tf_keras.layers.Dense(DIMENSION, use_bias=False),
            ]
        )
        for ids in IDS.values()
    ]
    built(TwoTower(*layers)).save(folder, save_format="tf")
    return True


@refused
def hashed_beside_a_city(folder):
    """The id is hashed; the lookup is of another feature of the user."""

    class Tower(tf_keras.Model):
        def __init__(self):
            super().__init__()
            hashing = tf_keras.layers.Hashing(50)
            self.ids = tf_keras.Sequential([hashing, tf_keras.layers.Embedding(50, DIMENSION)])
            self.city = pair(tf_keras, ["Lyon", "Nice"])

        def call(self, inputs):
            return self.ids(inputs["user"]) + self.city(inputs["city"])

    class Model(TwoTower):
        def call(self, inputs):
            users = self.user_layer({"user": inputs["user"], "city": inputs["city"]})
            return self.compare(users, self.item_layer(inputs["item"]))

    made = Model(Tower(), pair(tf_keras, ITEMS))
    built(made, city=tf.constant(["Lyon", "Nice"])).save(folder, save_format="tf")
    return True


@refused
def words(folder):
    """The items are known by the words of their titles."""
    text = tf_keras.layers.TextVectorization(max_tokens=20)
    text.adapt(["the red house", "the blue road", "a green river"])
    items = tf_keras.Sequential(
        [text, tf_keras.layers.Embedding(20, DIMENSION), tf_keras.layers.GlobalAveragePooling1D()]
    )
    made = TwoTower(pair(tf_keras, USERS), items)
    built(made, item=tf.constant([["the house"], ["a road"]])).save(folder, save_format="tf")
    return True


@refused
def same_ids(folder):
    """Two towers of items, whose names say user and item."""
    inputs = {side: keras.Input((), dtype="string", name=side) for side in IDS}
    towers = [
        keras.Sequential(
            [
                keras.Input((), dtype="string"),
                keras.layers.StringLookup(vocabulary=ITEMS),
                keras.layers.Embedding(8, 4),
            ],
            name=f"{side}_tower",
        )(one)
        for side, one in inputs.items()
    ]
    folder.mkdir()
    keras.Model(inputs, keras.layers.Dot(-1)(towers)).save(folder / "model.keras")
    return True


@refused
def shared(folder):
    """One embedding for what users listened to, of which they are the mean, and for the items that are compared."""

    class Model(tf_keras.Model):
        def __init__(self):
            super().__init__()
            self.lookup = tf_keras.layers.StringLookup(vocabulary=ITEMS, mask_token=None)
            self.item_embedding = tf_keras.layers.Embedding(len(ITEMS) + 1, DIMENSION)

        def call(self, inputs):
            users = tf.reduce_mean(self.item_embedding(self.lookup(inputs["user"])), 1)
            return tf.reduce_sum(users * self.item_embedding(self.lookup(inputs["item"])), -1)

    built(Model(), user=tf.constant([ITEMS[:3]] * 2)).save(folder, save_format="tf")
    return True


@model
def without_functions(folder):
    return save(built(TwoTower(*sides())), folder, save_traces=False)


@model
def dense_without_functions(folder):
    made = built(TwoTower(*(pair(tf_keras, ids, tf_keras.layers.Dense(DIMENSION)) for ids in IDS.values())))
    return save(made, folder, save_traces=False)


class Module(tf.Module):
    """No Keras: tables and matrices, and a function of each."""

    def __init__(self, ending):
        super().__init__()
        self.ending = ending
        for side, ids in IDS.items():
            initializer = tf.lookup.KeyValueTensorInitializer(ids, tf.range(len(ids), dtype=tf.int64))
            setattr(self, f"{side}_table", tf.lookup.StaticVocabularyTable(initializer, 1))
            matrix = tf.Variable(tf.random.normal([len(ids) + 1, DIMENSION]), name=f"{side}_vectors")
            setattr(self, f"{side}_vectors", matrix)
        self.kernel = tf.Variable(tf.random.normal([DIMENSION, DIMENSION]))

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
    def user(self, ids):
        return self.ending(self, tf.gather(self.user_vectors, self.user_table.lookup(ids)))

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
    def item(self, ids):
        return self.ending(self, tf.nn.embedding_lookup(self.item_vectors, self.item_table.lookup(ids)))

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
    def recommend(self, ids):
        items = self.ending(self, self.item_vectors)
        return tf.math.top_k(tf.matmul(self.user(ids), items, transpose_b=True), 2).indices


def of_module(ending):
    def write(folder):
        made = Module(ending)
        return save_module(made, folder)

    return write


def save_module(made, folder):
    tf.saved_model.save(made, str(folder))
    # A function that TensorFlow made of a method does not keep its object alive.
    return {side: (lambda ids, side=side: getattr(made, side)(ids), getattr(made, f"{side}_vectors")) for side in IDS}


MODELS |= {
    "module": of_module(lambda _, rows: rows),
    "module_dense": of_module(lambda module, rows: tf.matmul(rows, module.kernel)),
    "module_normalised": of_module(lambda _, rows: tf.math.l2_normalize(rows, 1)),
    "module_einsum": of_module(lambda module, rows: tf.einsum("bi,ij->bj", rows, module.kernel)),
    "module_by_condition": of_module(lambda _, rows: tf.cond(tf.size(rows) > 0, lambda: rows + 0.5, lambda: rows)),
    "module_with_missing": of_module(lambda _, rows: tf.where(tf.math.is_nan(rows), tf.zeros_like(rows), rows)),
}


@model
def module_normalised_before(folder):
    """The whole matrix is normalised, then rows are gathered."""

    class Before(Module):
        @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
        def user(self, ids):
            return tf.gather(tf.math.l2_normalize(self.user_vectors, 1), self.user_table.lookup(ids))

    made = Before(lambda _, rows: rows)
    return save_module(made, folder)


# Keras 3: Functional models, as .keras files and as they are exported.


def functional(*more, compare=None, length=None):
    """A function that saves a Functional model whose towers are models of their own, with layers after the embedding."""

    def make():
        towers, inputs, outputs = {}, {}, []
        for side, ids in IDS.items():
            shape = () if length is None else (length,)
            first = keras.Input(shape, dtype="string", name=f"{side}_id")
            rows = keras.layers.Embedding(len(ids) + 1, DIMENSION, SPREAD, name=f"{side}_embedding")(
                keras.layers.StringLookup(vocabulary=ids)(first)
            )
            for layer in more:
                rows = layer()(rows)
            towers[side] = keras.Model(first, rows, name=f"{side}_tower")
            inputs[side] = keras.Input(shape, dtype="string", name=side)
            outputs.append(towers[side](inputs[side]))
        return keras.Model(inputs, (compare or keras.layers.Dot(axes=-1))(outputs)), towers

    def write(folder):
        made, towers = make()
        folder.mkdir()
        made.save(folder / "model.keras")
        return of_towers(towers, length)

    def export(folder):
        made, towers = make()
        made.export(str(folder))
        return of_towers(towers, length)

    return write, export


def of_towers(towers, length=None):
    def call(tower):
        return lambda ids: tower(ids if length is None else tf.stack([ids, *[tf.reverse(ids, [0])] * (length - 1)], 1))

    return {
        side: (call(tower), tower.get_layer(f"{side}_embedding").get_weights()[0]) for side, tower in towers.items()
    }


class Normalise(keras.layers.Layer):
    """A layer of one's own."""

    def call(self, rows):
        return keras.ops.normalize(rows)


K = keras.layers
FUNCTIONAL = {
    "functional": functional(),
    "functional_dense": functional(lambda: K.Dense(DIMENSION)),
    "functional_dropout": functional(lambda: K.Dropout(0.3), lambda: K.Activation("linear"), K.Identity),
    "functional_normalised": functional(K.UnitNormalization),
    "functional_activated": functional(lambda: K.Activation("relu")),
    "functional_batch_normalised": functional(lambda: K.BatchNormalization(gamma_initializer="uniform")),
    "functional_halved": functional(lambda: K.Rescaling(0.5)),
    "functional_by_operations": functional(
        lambda: lambda rows: rows * keras.ops.rsqrt(keras.ops.sum(rows * rows, axis=-1, keepdims=True) + 1e-9)
    ),
    "functional_flat": functional(K.Flatten, length=1),
    "functional_list": functional(K.Flatten, length=3),
    "functional_mean": functional(K.GlobalAveragePooling1D, length=3),
    "functional_concatenated": functional(compare=lambda both: K.Dense(1)(K.Concatenate()(both))),
    "functional_difference": functional(compare=lambda both: K.Subtract()(both)),
    "functional_weighted": functional(compare=lambda both: K.Dense(1)(K.Multiply()(both))),
    "functional_product": functional(compare=lambda both: keras.ops.sum(both[0] * both[1], axis=1)),
    "functional_own_layer": functional(Normalise),
}
for _name, (_write, _export) in FUNCTIONAL.items():
    MODELS[_name] = _write
    MODELS[f"exported_{_name}"] = _export


class Subclassed(keras.Model):
    """What its call does is not in a .keras file."""

    def __init__(self, *more, after=None, item_layers=None, **options):
        super().__init__(**options)
        for side, ids in IDS.items():
            lookup = keras.layers.StringLookup()
            lookup.adapt(tf.constant(ids))
            layers = [lookup, keras.layers.Embedding(len(ids) + 1, DIMENSION, SPREAD), *(make() for make in more)]
            if side == "item" and item_layers:
                layers = item_layers
            setattr(self, f"{side}_layer", keras.Sequential(layers))
        self.after = after() if after else None

    def call(self, inputs):
        return keras.ops.sum(self.user(inputs["user"]) * self.item(inputs["item"]), -1)

    def user(self, ids):
        return self.after(self.user_layer(ids)) if self.after else self.user_layer(ids)

    def item(self, ids):
        return self.item_layer(ids)


def subclassed(*more, **options):
    def write(folder):
        made = Subclassed(*more, **options)
        made({"user": tf.constant(USERS[:2]), "item": tf.constant(ITEMS[:2])})
        folder.mkdir()
        made.save(folder / "model.keras")
        layers = {side: getattr(made, f"{side}_layer").layers for side in IDS}
        return {side: (getattr(made, side), layers[side][1].get_weights()[0]) for side in IDS}

    return write


@refused
def subclassed_words(folder):
    text = K.TextVectorization(max_tokens=20)
    text.adapt(["the red house", "the blue road", "a green river"])
    made = Subclassed(item_layers=[text, K.Embedding(20, DIMENSION), K.GlobalAveragePooling1D()])
    made({"user": tf.constant(USERS[:2]), "item": tf.constant([["the house"], ["a road"]])})
    folder.mkdir()
    made.save(folder / "model.keras")
    return True


@refused
def subclassed_one_hot(folder):
    lookup = K.StringLookup(output_mode="one_hot")
    lookup.adapt(tf.constant(ITEMS))
    made = Subclassed(item_layers=[lookup, K.Dense(DIMENSION, use_bias=False)])
    made({"user": tf.constant(USERS[:2]), "item": tf.constant(ITEMS[:2])})
    folder.mkdir()
    made.save(folder / "model.keras")
    return True


MODELS |= {
    "subclassed": subclassed(),
    "subclassed_dropout": subclassed(lambda: K.Dropout(0.3)),
    "subclassed_dense": subclassed(lambda: K.Dense(DIMENSION)),
    "subclassed_normalised": subclassed(K.UnitNormalization),
    "subclassed_dense_outside": subclassed(after=lambda: K.Dense(DIMENSION)),
}


def answer(call, matrix, ids):
    """Returns how the library's own answer relates to the embedding's rows."""
    vectors = np.array(call(tf.constant(ids)))
    vectors = vectors.reshape(len(vectors), -1)
    matrix = np.array(matrix)
    if vectors.shape[1] != matrix.shape[1]:
        return "other"
    # Which row is whose does not matter here: a vector that is no row, nor along one, is something else.
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True) * np.linalg.norm(matrix, axis=1)
    along = (np.abs(vectors @ matrix.T - lengths) < 1e-5).any(1)
    equal = (np.abs(vectors[:, None] - matrix[None]).max(-1) < 1e-6).any(1)
    return "row" if equal.all() else "scaled" if along.all() else "other"


def main(folder, names):
    tf.random.set_seed(7)
    keras.utils.set_random_seed(7)
    for name in names or MODELS:
        towers = MODELS[name](folder / name)
        found = {side: answer(*tower, IDS[side]) for side, tower in towers.items()}
        (folder / f"{name}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
