"""Creates models of the kinds that people save, as far as no other script has them, and what the library answers.

OUT/NAME is a model, NAME.TOWER.json its ids, NAME.TOWER.npy their vectors and NAME.TOWER.parquet the features.
"""

import json
import os
import sys
from pathlib import Path

os.environ["TF_USE_LEGACY_KERAS"] = "1"
os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import keras
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow as tf

OUT = Path(sys.argv[1])
L = tf.keras.layers
USERS = [f"u {number} ü" for number in range(50)]
ITEMS = [f"i-{number}" for number in range(30)]
CITIES = ["Metz", "Nantes", "Lens"]
TITLES = [f"a {adjective} {noun}" for adjective in ("long", "short", "late") for noun in ("night", "day", "walk")]


def keep(name, tower, ids, vectors, **features):
    (OUT / f"{name}.{tower}.json").write_text(json.dumps(ids), encoding="utf-8")
    np.save(OUT / f"{name}.{tower}.npy", np.asarray(vectors))
    if features:
        pq.write_table(pa.table({f"{tower}_id": ids, **features}), OUT / f"{name}.{tower}.parquet", row_group_size=20)


def repeated(values, ids):
    return [values[number % len(values)] for number in range(len(ids))]


def tower(ids, *more, dimension=8, **options):
    lookup = L.StringLookup(vocabulary=ids, mask_token=None)
    return tf.keras.Sequential([lookup, L.Embedding(len(ids) + 1, dimension, **options), *more])


class TwoTower(tf.keras.Model):
    """Two layers that are compared by a dot product; the inputs of each are named in `columns`."""

    def __init__(self, user_layer, item_layer, columns=(("user_id",), ("item_id",))):
        super().__init__()
        self.user_layer, self.item_layer, self.columns = user_layer, item_layer, columns

    def call(self, inputs):
        users, items = (
            {name: inputs[name] for name in names} if len(names) > 1 else inputs[names[0]] for names in self.columns
        )
        return tf.reduce_sum(self.user_layer(users) * self.item_layer(items), -1)


def built(model, **inputs):
    model({"user_id": tf.constant(USERS[:2]), "item_id": tf.constant(ITEMS[:2]), **inputs})
    return model


def packed():
    """Vectors that were computed elsewhere, as a lookup and an embedding, compared by cosine; saved after predict()."""

    class Match(tf.keras.Model):
        def __init__(self):
            super().__init__()
            self.user_layer = tower(USERS, input_shape=(1,), trainable=False)
            self.item_layer = tower(ITEMS, input_shape=(1,), trainable=False)
            self.dot, self.flat = L.Dot(axes=1, normalize=True), L.Flatten()
            self.predict([np.array(["x"]), np.array(["y"])], verbose=0)

        def call(self, pair):
            return self.dot([self.flat(self.user_layer(pair[0])), self.flat(self.item_layer(pair[1]))])

    model = Match()
    for layer, ids in ((model.user_layer, USERS), (model.item_layer, ITEMS)):
        layer.layers[1].set_weights([np.random.default_rng(1).standard_normal((len(ids) + 1, 8))])
    model.save(OUT / "packed")
    for name, ids in (("user", USERS), ("item", ITEMS)):
        keep("packed", name, ids, getattr(model, f"{name}_layer")(tf.constant(ids)))


def scaled():
    """Towers that end by scaling to length 1."""
    model = built(TwoTower(tower(USERS, L.UnitNormalization()), tower(ITEMS, L.UnitNormalization())))
    model.save(OUT / "scaled")
    keep("scaled", "user", USERS, model.user_layer(tf.constant(USERS)))
    keep("scaled", "item", ITEMS, model.item_layer(tf.constant(ITEMS)))


def hashed():
    """The user's id is hashed; the only lookup of that tower is of another feature."""

    class Users(tf.keras.Model):
        def __init__(self):
            super().__init__()
            self.hashed = tf.keras.Sequential([L.Hashing(400), L.Embedding(400, 8)])
            self.city, self.dense = tower(CITIES), L.Dense(8)

        def call(self, inputs):
            return self.dense(tf.concat([self.hashed(inputs["user_id"]), self.city(inputs["city"])], 1))

    cities = repeated(CITIES, USERS)
    model = built(
        TwoTower(Users(), tower(ITEMS, L.Dense(8)), (("user_id", "city"), ("item_id",))), city=tf.constant(cities[:2])
    )
    model.save(OUT / "hashed")
    users = model.user_layer({"user_id": tf.constant(USERS), "city": tf.constant(cities)})
    keep("hashed", "user", USERS, users, city=cities)
    keep("hashed", "item", ITEMS, model.item_layer(tf.constant(ITEMS)))


def session():
    """The query is a list of items; there are no users in the model."""

    class Session(tf.keras.Model):
        def __init__(self):
            super().__init__()
            self.query_model, self.candidate_model = tower(ITEMS, L.GRU(8)), tower(ITEMS)

        def call(self, pair):
            return tf.reduce_sum(self.query_model(pair[0]) * self.candidate_model(pair[1]), -1)

    model = Session()
    model((tf.constant([ITEMS[:3]] * 2), tf.constant(ITEMS[:2])))
    model.save(OUT / "session")
    lists = [[ITEMS[(number * step) % len(ITEMS)] for step in (1, 2, 3)] for number in range(len(USERS))]
    keep("session", "user", USERS, model.query_model(tf.constant(lists)), items=lists)
    keep("session", "item", ITEMS, model.candidate_model(tf.constant(ITEMS)))


def words():
    """Users by their ids, items by the words of their titles, in a .keras file of Keras 3."""
    layers = keras.layers
    text = layers.TextVectorization(max_tokens=60, output_sequence_length=4)
    text.adapt(TITLES)
    user, title = (keras.Input((), dtype="string", name=name) for name in ("user", "title"))
    rows = layers.Embedding(len(USERS) + 1, 8)(layers.StringLookup(vocabulary=USERS)(user))
    users = keras.Model(user, rows, name="user_tower")
    mean = layers.GlobalAveragePooling1D()(layers.Embedding(60, 8, mask_zero=True)(text(title)))
    items = keras.Model(title, mean, name="item_tower")
    inputs = [keras.Input((), dtype="string") for _ in range(2)]
    model = keras.Model(inputs, layers.Dot(axes=1)([users(inputs[0]), items(inputs[1])]))
    (OUT / "words").mkdir()
    model.save(OUT / "words/model.keras")
    titles = repeated(TITLES, ITEMS)
    keep("words", "user", USERS, users(tf.constant(USERS)))
    keep("words", "item", ITEMS, items(tf.constant(titles)), title=titles)


def several():
    """Several features for each tower, as in TFRS's tutorials: a bucket, a scaled number, the words of a title."""

    class Users(tf.keras.Model):
        def __init__(self):
            super().__init__()
            self.ids = tower(USERS)
            self.bucket = tf.keras.Sequential([L.Discretization([0.2, 0.4, 0.6]), L.Embedding(4, 4)])
            self.scale = L.Normalization(axis=None, mean=0.5, variance=0.1)

        def call(self, inputs):
            time = inputs["time"]
            scaled_time = tf.reshape(self.scale(time), (-1, 1))
            return tf.concat([self.ids(inputs["user_id"]), self.bucket(time), scaled_time], 1)

    class Items(tf.keras.Model):
        def __init__(self):
            super().__init__()
            self.text = L.TextVectorization(max_tokens=60)
            self.text.adapt(TITLES)
            self.ids = tower(ITEMS)
            self.title = tf.keras.Sequential(
                [self.text, L.Embedding(60, 8, mask_zero=True), L.GlobalAveragePooling1D()]
            )

        def call(self, inputs):
            return tf.concat([self.ids(inputs["item_id"]), self.title(inputs["title"])], 1)

    class Tower(tf.keras.Model):
        def __init__(self, features):
            super().__init__()
            self.features, self.dense = features, tf.keras.Sequential([L.Dense(16, activation="relu"), L.Dense(8)])

        def call(self, inputs):
            return self.dense(self.features(inputs))

    times, titles = [number / len(USERS) for number in range(len(USERS))], repeated(TITLES, ITEMS)
    model = TwoTower(Tower(Users()), Tower(Items()), (("user_id", "time"), ("item_id", "title")))
    built(model, time=tf.constant(times[:2]), title=tf.constant(titles[:2]))
    model.save(OUT / "several")
    users = model.user_layer({"user_id": tf.constant(USERS), "time": tf.constant(times)})
    items = model.item_layer({"item_id": tf.constant(ITEMS), "title": tf.constant(titles)})
    keep("several", "user", USERS, users, time=pa.array(times, pa.float32()))
    keep("several", "item", ITEMS, items, title=titles)


tf.keras.utils.set_random_seed(3)
for make in (packed, scaled, hashed, session, words, several):
    make()
