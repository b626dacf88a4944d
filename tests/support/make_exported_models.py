"""Makes SavedModels in which only the calls say which lookup feeds which embedding, with real Keras 3 and tf-keras.

Run as a program: `python make_exported_models.py DIR`; the files beside each model are as those of make_models.py. The
vectors are what the artifact itself answers, served by TensorFlow.
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
from make_models import ODD_IDS

SIDES = ("user", "item")


def functional(library, lookups, between=lambda rows: rows):
    """A Functional model whose lookups and embeddings are layers of their own, called user_embedding and so on."""
    inputs, outputs = {}, {}
    for side, lookup in zip(SIDES, lookups, strict=True):
        dtype = "string" if isinstance(lookup, library.layers.StringLookup) else "int64"
        inputs[f"{side}_id"] = library.Input((), name=f"{side}_id", dtype=dtype)
        embedding = library.layers.Embedding(lookup.vocabulary_size() + 3, 4, name=f"{side}_embedding")
        outputs[side] = embedding(between(lookup(inputs[f"{side}_id"])))
    return library.Model(inputs, outputs)


def two_towers(library, lookups, names=(None, None)):
    """A model with a Sequential for each tower, of that name; attributes are not exported."""

    class TwoTower(library.Model):
        def __init__(self):
            super().__init__()
            for side, lookup, name in zip(SIDES, lookups, names, strict=True):
                # Without an input, tf-keras takes the type of a learnt lookup's rows for that of its ids.
                first = library.Input((), dtype="string")
                embedding = library.layers.Embedding(lookup.vocabulary_size(), 4)
                setattr(self, f"{side}_layer", library.Sequential([first, lookup, embedding], name=name))

        def call(self, inputs):
            return {side: getattr(self, f"{side}_layer")(inputs[f"{side}_id"]) for side in SIDES}

    model = TwoTower()
    model({f"{side}_id": tf.constant(["a", "b"]) for side in SIDES})
    return model


class Features(tf_keras.layers.Layer):
    """A tower with an id and another feature: of which the embedding is depends on what is hashed."""

    def __init__(self, vocabulary, embeds_ids, **options):
        super().__init__(**options)
        layers = tf_keras.layers
        self.lookup = layers.StringLookup(vocabulary=vocabulary)
        self.hashing = layers.Hashing(7)
        self.others = layers.Embedding(7, 4)
        if embeds_ids:
            self.ids = layers.Embedding(self.lookup.vocabulary_size(), 4)
        self.embeds_ids = embeds_ids

    def call(self, inputs):
        other = self.others(self.hashing(inputs))
        if self.embeds_ids:
            return self.ids(self.lookup(inputs)), other
        return tf.one_hot(self.lookup(inputs), 4) + other, other


def features(vocabulary, embeds_ids):
    inputs = {f"{side}_id": tf_keras.Input((), name=f"{side}_id", dtype="string") for side in SIDES}
    towers = [Features(vocabulary, embeds_ids, name=f"{side}_layer") for side in SIDES]
    outputs = {side: tower(ids)[0] for side, tower, ids in zip(SIDES, towers, inputs.values(), strict=True)}
    model = tf_keras.Model(inputs, outputs)
    model.user_layer, model.item_layer = towers
    return model, [tower.lookup for tower in towers]


def write(folder, name, model, lookups, save):
    save(model, str(folder / name))
    serve = tf.saved_model.load(str(folder / name)).signatures["serving_default"]
    ids = {
        side: lookup.get_vocabulary(include_special_tokens=False) for side, lookup in zip(SIDES, lookups, strict=True)
    }
    longest = max(map(len, ids.values()))
    # Both towers are asked at once, so the shorter list is filled up.
    answers = serve(**{f"{side}_id": tf.constant(np.resize(those, longest)) for side, those in ids.items()})
    for side in SIDES:
        # Called after the dict's key, or after the layer.
        vectors = next(answer for key, answer in answers.items() if key.startswith(side)).numpy()
        np.save(folder / f"{name}.{side}.npy", vectors[: len(ids[side])].astype(np.float64))
        (folder / f"{name}.{side}.json").write_text(json.dumps([str(key) for key in ids[side]]), encoding="utf-8")


def export(model, path):
    if isinstance(model, keras.Model) and type(model).__name__ == "TwoTower":
        # Without this Keras 3 exports a subclassed model for inputs of type float, without names.
        names = [f"{side}_id" for side in SIDES]
        return model.export(path, input_signature=[{name: tf.TensorSpec([None], tf.string, name) for name in names}])
    return model.export(path)


def save(model, path):
    model.save(path, save_format="tf")


def main(folder):
    tf.random.set_seed(7)
    users = [f"u{i}" for i in range(900)] + ODD_IDS
    numbers = folder / "numbers.txt"
    numbers.write_text("\n".join(str(3 * number - 701) for number in range(800)) + "\n")

    def mixed(library):
        return (
            library.layers.StringLookup(vocabulary=users, mask_token="nothing", num_oov_indices=3),
            library.layers.IntegerLookup(vocabulary=str(numbers), mask_token=0),
        )

    def learnt(library):
        lookups = []
        for size in (400, 90):
            lookups.append(library.layers.StringLookup(num_oov_indices=2))
            lookups[-1].adapt(tf.constant([f"w{n % size}" for n in range(0, 7 * size, 3)]))
        return lookups

    for library, which in ((keras, "keras3"), (tf_keras, "keras2")):
        lookups = mixed(library)
        write(folder, f"{which}_functional", functional(library, lookups), lookups, export)
        lookups = learnt(library)
        write(folder, f"{which}_named", two_towers(library, lookups, ("user_layer", "item_layer")), lookups, export)
        library.backend.clear_session()
        lookups = learnt(library)
        write(folder, f"{which}_unnamed", two_towers(library, lookups), lookups, export)
    lookups = mixed(tf_keras)
    write(folder, "keras2_saved", functional(tf_keras, lookups), lookups, save)
    for name, embeds_ids in (("features", True), ("hashed", False)):
        model, lookups = features(users, embeds_ids)
        write(folder, name, model, lookups, save)
    lookups = mixed(keras)
    write(folder, "shifted", functional(keras, lookups, between=lambda rows: rows + 1), lookups, export)
    both = keras.layers.StringLookup(vocabulary=users)
    write(folder, "one_lookup", functional(keras, (both, both)), (both, both), export)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
