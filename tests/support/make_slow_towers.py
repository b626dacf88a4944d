"""Creates a model whose user tower takes its time and leaves a mark, so that a test can see it compute.

OUT/slow is the model, OUT/slow.TOWER.json its ids, OUT/slow.TOWER.npy their vectors. The file to write is an input.
"""

import json
import os
import sys
from pathlib import Path

os.environ["TF_USE_LEGACY_KERAS"] = "1"

import numpy as np
import tensorflow as tf

OUT = Path(sys.argv[1])
SECONDS = 4
L = tf.keras.layers
IDS = {"user": [f"user-{number:03d}" for number in range(60)], "item": [f"item-{number:03d}é" for number in range(40)]}
TEXT = tf.TensorSpec([None], tf.string)


class Users(tf.keras.Model):
    def __init__(self):
        super().__init__()
        self.tower = tower("user")

    @tf.function(input_signature=[{"user_id": TEXT, "mark": TEXT}])
    def call(self, inputs):
        tf.io.write_file(inputs["mark"][0], "computing")
        until = tf.timestamp() + SECONDS
        tf.while_loop(lambda now: now < until, lambda now: [tf.timestamp()], [tf.timestamp()])
        return self.tower(inputs["user_id"])


class Model(tf.keras.Model):
    def __init__(self):
        super().__init__()
        self.user_tower, self.item_tower = Users(), tower("item")

    def call(self, inputs):
        users = self.user_tower({"user_id": inputs["user_id"], "mark": inputs["mark"]})
        return tf.reduce_sum(users * self.item_tower(inputs["item_id"]), -1)


def tower(name):
    lookup = L.StringLookup(vocabulary=IDS[name], mask_token=None)
    return tf.keras.Sequential([lookup, L.Embedding(len(IDS[name]) + 1, 8), L.Dense(16)])


model = Model()
one = {"user_id": IDS["user"][:1], "mark": [str(OUT / "mark")], "item_id": IDS["item"][:1]}
model({name: tf.constant(value) for name, value in one.items()})
tf.saved_model.save(model, str(OUT / "slow"))
for name, part in (("user", model.user_tower.tower), ("item", model.item_tower)):
    (OUT / f"slow.{name}.json").write_text(json.dumps(IDS[name]), encoding="utf-8")
    np.save(OUT / f"slow.{name}.npy", part(tf.constant(IDS[name])))
