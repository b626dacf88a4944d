"""Makes models with plain embeddings, whose ids are numbered elsewhere, with real Keras 3, tf-keras and TensorFlow.

Run as a program: `python make_label_encoded.py DIR`; the files beside each model are as those of make_models.py. A
vector is the row of the embedding, as the library gives it.
"""

import json
import os
import sys
from pathlib import Path

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import keras
import numpy as np
import tensorflow as tf
import tf_keras

SIDES = ("user", "item")
IDS = {"user": [f"u{n}" for n in range(70)], "item": [f"i{n}" for n in range(90)]}


def functional(library, *, goes_on=False):
    """keras.io's RecommenderNet as a Functional model."""
    inputs, outputs, embeddings = [], [], []
    for side in SIDES:
        inputs.append(library.Input((), dtype="int32", name=f"{side}_index"))
        embeddings.append(library.layers.Embedding(len(IDS[side]), 6, name=f"{side}_embedding"))
        rows = embeddings[-1](inputs[-1])
        outputs.append(library.layers.Dense(6, activation="relu", name=f"{side}_dense")(rows) if goes_on else rows)
    return library.Model(inputs, library.layers.Dot(axes=1)(outputs)), embeddings


def subclassed(library):
    """Towers that are attributes: one an embedding, one a layer around it."""

    class Recommender(library.Model):
        def __init__(self, **options):
            super().__init__(**options)
            self.user_embedding = library.layers.Embedding(len(IDS["user"]), 6)
            self.item_tower = library.Sequential([library.layers.Embedding(len(IDS["item"]), 6)])

        def call(self, inputs):
            return tf.reduce_sum(self.user_embedding(inputs[0]) * self.item_tower(inputs[1]), axis=1)

    model = Recommender()
    model([tf.constant([1, 2]), tf.constant([1, 2])])
    return model, [model.user_embedding, model.item_tower.layers[-1]]


class Module(tf.Module):
    def __init__(self):
        super().__init__()
        for side in SIDES:
            setattr(self, side, tf.Variable(tf.random.normal([len(IDS[side]), 6]), name=side))

    @tf.function(input_signature=[tf.TensorSpec([None], tf.int64), tf.TensorSpec([None], tf.int64)])
    def score(self, users, items):
        return tf.reduce_sum(tf.gather(self.user, users) * tf.gather(self.item, items), axis=1)


def write(folder, name, vectors):
    for side, rows in zip(SIDES, vectors, strict=True):
        (folder / f"{name}.{side}.json").write_text(json.dumps(IDS[side]))
        np.save(folder / f"{name}.{side}.npy", np.asarray(rows, np.float64))


def main(folder):
    tf.random.set_seed(7)
    savers = {
        "keras3": (keras, lambda model, path: (path.mkdir(), model.save(path / "model.keras"))),
        "keras2": (tf_keras, lambda model, path: (path.mkdir(), model.save(path / "model.keras"))),
        "exported": (keras, lambda model, path: model.export(str(path))),
        "saved": (tf_keras, lambda model, path: model.save(str(path), save_format="tf")),
    }
    for name, (library, save) in savers.items():
        for kind, (model, embeddings) in {
            "functional": functional(library),
            "deep": functional(library, goes_on=True),
            "subclassed": subclassed(library),
        }.items():
            if (name, kind) == ("exported", "subclassed"):
                continue  # Keras 3 wants to be told its inputs, and keeps no attributes.
            save(model, folder / f"{name}_{kind}")
            write(folder, f"{name}_{kind}", [embedding.get_weights()[0] for embedding in embeddings])
    module = Module()
    tf.saved_model.save(module, str(folder / "module"))
    write(folder, "module", [module.user.numpy(), module.item.numpy()])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
