"""Creates models whose towers are computed, as people save them, and what the library itself answers.

OUT/NAME is a model, NAME.TOWER.json its ids, NAME.TOWER.npy their vectors and NAME.TOWER.parquet the features.
"""

import json
import os
import sys
from pathlib import Path

os.environ["TF_USE_LEGACY_KERAS"] = "1"

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow as tf

OUT = Path(sys.argv[1])
L = tf.keras.layers
USERS = [f"user-{number:03d}" for number in range(60)]
ITEMS = [f"item-{number:03d}é" for number in range(40)]


def keep(name, tower, ids, vectors, features=None):
    (OUT / f"{name}.{tower}.json").write_text(json.dumps([str(each) for each in ids]), encoding="utf-8")
    np.save(OUT / f"{name}.{tower}.npy", np.asarray(vectors))
    if features:
        pq.write_table(pa.table({f"{tower}_id": ids, **features}), OUT / f"{name}.{tower}.parquet", row_group_size=25)


def deep():
    """Lookup, embedding, Dense, Dense; beside it, signatures of which some are no tower."""

    class Model(tf.keras.Model):
        def __init__(self):
            super().__init__()

            def tower(ids):
                return tf.keras.Sequential(
                    [
                        L.StringLookup(vocabulary=ids, mask_token=None),
                        L.Embedding(len(ids) + 1, 32),
                        L.Dense(64, activation="relu"),
                        L.Dense(16),
                    ]
                )

            self.user_layer, self.item_layer = tower(USERS), tower(ITEMS)

        def call(self, pair):
            return tf.reduce_sum(self.user_layer(pair[0]) * self.item_layer(pair[1]), -1)

    model = Model()
    model((tf.constant(USERS[:2]), tf.constant(ITEMS[:2])))
    text = tf.TensorSpec([None], tf.string)

    @tf.function(input_signature=[text])
    def two_outputs(user_id):
        vectors = model.user_layer(user_id)
        return {"vector": vectors, "norm": tf.norm(vectors, axis=1)}

    @tf.function(input_signature=[text])
    def one_output(user_id):
        return {"vector": model.user_layer(user_id)}

    @tf.function(input_signature=[tf.TensorSpec([2], tf.string)])
    def two_rows(user_id):
        return model.user_layer(user_id)

    model.save(OUT / "deep", signatures={"two": two_outputs, "one": one_output, "fixed": two_rows})
    keep("deep", "user", USERS, model.user_layer(tf.constant(USERS)))
    keep("deep", "item", ITEMS, model.item_layer(tf.constant(ITEMS)))


def features():
    """Ids beside numbers, flags and lists: of three values, and of any number through a GRU; ids that are integers."""
    ages = [number % 7 for number in range(len(USERS))]
    times = [number / 60 for number in range(len(USERS))]
    members = [number % 3 == 0 for number in range(len(USERS))]
    lasts = [[ITEMS[(number + each) % len(ITEMS)] for each in range(3)] for number in range(len(USERS))]
    histories = [
        [ITEMS[(number * each) % len(ITEMS)] for each in range(1 + number % 4)] for number in range(len(USERS))
    ]

    class Users(tf.keras.Model):
        def __init__(self):
            super().__init__()
            self.ids = tf.keras.Sequential([L.StringLookup(vocabulary=USERS, mask_token=None), L.Embedding(61, 8)])
            self.items = tf.keras.Sequential([L.StringLookup(vocabulary=ITEMS, mask_token=None), L.Embedding(41, 8)])
            self.ages, self.gru, self.dense = L.Embedding(7, 4), L.GRU(8), L.Dense(16)

        @tf.function(
            input_signature=[
                {
                    "user_id": tf.TensorSpec([None], tf.string),
                    "age": tf.TensorSpec([None], tf.int32),
                    "time": tf.TensorSpec([None], tf.float32),
                    "member": tf.TensorSpec([None], tf.bool),
                    "last": tf.TensorSpec([None, 3], tf.string),
                    "history": tf.TensorSpec([None, None], tf.string),
                }
            ]
        )
        def call(self, inputs):
            numbers = tf.stack([inputs["time"], tf.cast(inputs["member"], tf.float32)], 1)
            return self.dense(
                tf.concat(
                    [
                        self.ids(inputs["user_id"]),
                        self.ages(inputs["age"]),
                        numbers,
                        tf.reduce_mean(self.items(inputs["last"]), 1),
                        self.gru(self.items(inputs["history"])),
                    ],
                    1,
                )
            )

    class Model(tf.keras.Model):
        def __init__(self):
            super().__init__()
            self.query_model = Users()
            self.candidate_model = tf.keras.Sequential(
                [L.IntegerLookup(vocabulary=[3, 5, 8, -13]), L.Embedding(5, 16), L.Dense(16)]
            )

        def call(self, inputs):
            of_user = {name: value for name, value in inputs.items() if name != "item_id"}
            return tf.reduce_sum(self.query_model(of_user) * self.candidate_model(inputs["item_id"]), -1)

    model = Model()

    def row(number):
        return {
            "user_id": tf.constant([USERS[number]]),
            "age": tf.constant([ages[number]]),
            "time": tf.constant([times[number]], tf.float32),
            "member": tf.constant([members[number]]),
            "last": tf.constant([lasts[number]]),
            "history": tf.constant([histories[number]]),
        }

    model({**row(0), "item_id": tf.constant([3], tf.int64)})
    tf.saved_model.save(model, str(OUT / "features"))
    vectors = np.concatenate([model.query_model(row(number)) for number in range(len(USERS))])
    columns = {"age": ages, "time": times, "member": members, "last": lasts, "history": histories}
    keep("features", "user", USERS, vectors, columns)
    items = [3, 5, 8, -13]
    keep("features", "item", items, model.candidate_model(tf.constant(items, tf.int64)))


def keras3():
    """Towers that are models of their own in a .keras file of Keras 3; one of them takes its inputs by name."""
    import keras

    L = keras.layers

    def tower(name, ids):
        given = keras.Input((), dtype="string", name=f"{name}_id")
        rows = L.Embedding(len(ids) + 1, 32)(L.StringLookup(vocabulary=ids)(given))
        if name == "item":
            return keras.Model(given, L.Dense(16)(L.Dense(64, activation="relu")(rows)), name="item_tower")
        age = keras.Input((1,), dtype="float32", name="age")
        return keras.Model({"user_id": given, "age": age}, L.Dense(16)(L.Concatenate()([rows, age])), name="user_tower")

    users, items = tower("user", USERS), tower("item", ITEMS)
    user, age = keras.Input((), dtype="string", name="u"), keras.Input((1,), dtype="float32", name="a")
    item = keras.Input((), dtype="string", name="i")
    model = keras.Model([user, age, item], L.Dot(axes=1)([users({"user_id": user, "age": age}), items(item)]))
    (OUT / "keras3").mkdir()
    model.save(OUT / "keras3/model.keras")
    model.export(str(OUT / "exported"), verbose=False)
    ages = [float(number % 7) for number in range(len(USERS))]
    vectors = users({"user_id": tf.constant(USERS), "age": tf.constant(ages)[:, None]})
    keep("keras3", "user", USERS, vectors, {"age": ages})
    keep("keras3", "item", ITEMS, items(tf.constant(ITEMS)))
    no_lambda = keras.Sequential([keras.Input((1,)), L.Lambda(lambda values: values * 2)], name="user_tower")
    (OUT / "lambda").mkdir()
    keras.Sequential([keras.Input((1,)), no_lambda]).save(OUT / "lambda/model.keras")


deep()
features()
keras3()
