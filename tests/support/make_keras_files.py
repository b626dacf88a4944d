"""Makes `.keras` files with real Keras 3, and two with tf-keras, and writes down what Keras itself says is in them.

Run as a program: `python make_keras_files.py DIR`. For each model DIR/<name>/model.keras is the model,
DIR/<name>.<tower>.npy its vectors and DIR/<name>.<tower>.json its ids, both read back with `keras.models.load_model`.
`python make_keras_files.py DIR NAME TRACKING_URI EXPERIMENT_ID` logs one of them with `mlflow.tensorflow.log_model`
and prints the run's id.
"""

import json
import os
import sys
from pathlib import Path

os.environ.pop("TF_USE_LEGACY_KERAS", None)
os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import keras
import numpy as np
import tensorflow as tf
import tf_keras
from make_models import ODD_IDS, lines  # Sets TF_USE_LEGACY_KERAS, which concerns tf.keras alone.

layers = keras.layers


def embedding_of(lookup, dimension, rows=None, **options):
    return layers.Embedding(rows or lookup.vocabulary_size(), dimension, **options)


def two_towers(user, item):
    """A Functional model of two (lookup, embedding), trained for a step, so that an optimizer has its state."""
    inputs, vectors = {}, []
    for side, (lookup, embedding) in {"user": user, "item": item}.items():
        kind = "string" if isinstance(lookup, layers.StringLookup) else "int64"
        inputs[side] = keras.Input((1,), name=side, dtype=kind)
        vectors.append(layers.Flatten()(embedding(lookup(inputs[side]))))
    model = keras.Model(inputs, layers.Dot(1)(vectors))
    model.compile("adam", "mse")
    batch = {
        side: tf.constant([[lookup.get_vocabulary()[-1]]] * 2)
        for side, (lookup, _) in {"user": user, "item": item}.items()
    }
    model.fit(batch, np.ones((2, 1)), verbose=0)
    return model


class TwoTower(keras.Model):
    """`item_layer` comes before "layers" in the alphabet, `user_layer` after it: Keras saves them differently."""

    def call(self, inputs):
        return tf.reduce_sum(self.user_layer(inputs["user"]) * self.item_layer(inputs["item"]), -1)

    def build(self, input_shape):
        self.user_layer.build(input_shape["user"])
        self.item_layer.build(input_shape["item"])
        self.built = True


@keras.saving.register_keras_serializable()
class Subclassed(TwoTower):
    """One vocabulary to be adapted, one from a file; the model's config has neither."""

    def __init__(self, item_file):
        super().__init__()
        self.item_file = item_file
        self.user_layer = keras.Sequential([layers.StringLookup(), layers.Embedding(10, 4)])
        item = layers.StringLookup(vocabulary=item_file, num_oov_indices=2, mask_token="m")
        self.item_layer = keras.Sequential([item, layers.Embedding(9, 4)])

    def get_config(self):
        return {"item_file": self.item_file}


@keras.saving.register_keras_serializable()
class Lists(TwoTower):
    """Vocabularies that are lists; its config says nothing of them, or has them without saying whose they are."""

    def __init__(self, **config):
        super().__init__()
        self.config = config
        for side, given in {"user": ["a", "b"], "item": ["x", "y"]}.items():
            tower = keras.Sequential([layers.StringLookup(vocabulary=given), layers.Embedding(3, 4)])
            setattr(self, f"{side}_layer", tower)

    def get_config(self):
        return dict(self.config)


@keras.saving.register_keras_serializable()
class Configured(TwoTower):
    """The way out: a config that has the layers."""

    def __init__(self, user_layer, item_layer):
        super().__init__()
        self.user_layer = user_layer
        self.item_layer = item_layer

    def get_config(self):
        return {side: keras.saving.serialize_keras_object(getattr(self, side)) for side in ("user_layer", "item_layer")}

    @classmethod
    def from_config(cls, config):
        return cls(**{side: keras.saving.deserialize_keras_object(one) for side, one in config.items()})


@keras.saving.register_keras_serializable()
class Tower(layers.Layer):
    """A layer of one's own; its parts are known by their attributes alone."""

    def __init__(self):
        super().__init__()
        self.lookup = layers.StringLookup()
        self.table = layers.Embedding(10, 4)

    def call(self, inputs):
        return self.table(self.lookup(inputs))

    def build(self, input_shape):
        self.table.build(input_shape)


@keras.saving.register_keras_serializable()
class OwnLayers(TwoTower):
    def __init__(self, **options):
        super().__init__(**options)
        self.user_layer = Tower()
        self.item_layer = Tower()


def called(model):
    model({"user": tf.constant(["a", "b"]), "item": tf.constant(["a", "b"])})
    return model


@tf_keras.saving.register_keras_serializable()
class OfKeras2(tf_keras.Model):
    """Here it is `item_layer` that Keras meets in `layers` first."""

    def __init__(self, **options):
        super().__init__(**options)
        for side in ("user", "item"):
            parts = [
                tf_keras.Input((), dtype="string"),
                tf_keras.layers.StringLookup(),
                tf_keras.layers.Embedding(9, 4),
            ]
            setattr(self, f"{side}_layer", tf_keras.Sequential(parts))

    def call(self, inputs):
        return self.user_layer(inputs["user"]) * self.item_layer(inputs["item"])

    def build(self, input_shape):
        self.built = True


def adapted(names, **options):
    lookup = layers.StringLookup(**options)
    lookup.adapt(tf.constant(names))
    return lookup


def write(folder, name, model, parts, library=keras):
    """Saves a model; `parts` finds {tower: (lookup, embedding)} in it once it is loaded."""
    path = folder / name / "model.keras"
    path.parent.mkdir()
    model.save(path)
    for side, (lookup, embedding) in parts(library.models.load_model(path, safe_mode=False)).items():
        ids = [str(token) for token in lookup.get_vocabulary(include_special_tokens=False)]
        kind = tf.string if isinstance(lookup, library.layers.StringLookup) else tf.int64
        rows = lookup(tf.constant(ids if kind is tf.string else [int(one) for one in ids], kind)).numpy()
        vectors = embedding.get_weights()[0][rows].astype(np.float64)
        np.save(folder / f"{name}.{side}.npy", vectors)
        (folder / f"{name}.{side}.json").write_text(json.dumps(ids), encoding="utf-8")


def by_names(**names):
    return lambda model: {side: tuple(model.get_layer(one) for one in pair) for side, pair in names.items()}


def of_sequentials(model):
    sides = {side: getattr(model, f"{side}_layer") for side in ("user", "item")}
    return {side: tuple(one.layers[-2:]) for side, one in sides.items()}


def functional(folder):
    users = [f"u{i}" for i in range(3000)] + ODD_IDS
    items = [f"item {i}" for i in range(2000)] + [name for name in ODD_IDS if name != "null\u0000byte"]
    user = layers.StringLookup(vocabulary=users, name="user_lookup")
    item = layers.StringLookup(vocabulary=lines(folder, "items.txt", items), name="item_lookup")
    return two_towers(
        (user, embedding_of(user, 8, name="user_embedding")), (item, embedding_of(item, 8, name="item_embedding"))
    )


PARTS = by_names(user=("user_lookup", "user_embedding"), item=("item_lookup", "item_embedding"))


def special(folder):
    """Integers, special rows of every kind, spare rows, and special tokens in a list."""
    user = layers.StringLookup(
        vocabulary=["nothing", "[UNK]", "[UNK]", "[UNK]", *[f"few {i}" for i in range(100)]],
        num_oov_indices=3,
        mask_token="nothing",
        name="user_lookup",
    )
    item = layers.IntegerLookup(vocabulary=[7, -5, 2**40], mask_token=0, name="item_lookup")
    return two_towers(
        (user, embedding_of(user, 4, 150, name="user_embedding", dtype="float64")),
        (item, embedding_of(item, 4, 137, name="item_embedding", dtype="float16")),
    )


def adapted_integers(folder):
    user = layers.IntegerLookup(mask_token=0, num_oov_indices=2, name="user_lookup")
    user.adapt(np.array([3, 3, 3, 9, 9, 4]))
    item = adapted(["b", "b", "a", "c c"], mask_token="", name="item_lookup")
    return two_towers(
        (user, embedding_of(user, 4, name="user_embedding", dtype="bfloat16")),
        (item, embedding_of(item, 4, 9, name="item_embedding")),
    )


def nested(folder):
    """Two towers inside of named layers, and one embedding that is used twice."""
    users, items = layers.StringLookup(vocabulary=["a", "b", "c"]), adapted(["x", "y", "y"])
    sides = {"user": users, "item": items}
    towers = {
        side: keras.Sequential([keras.Input((), dtype="string"), lookup, embedding_of(lookup, 4)], name=f"{side}_layer")
        for side, lookup in sides.items()
    }
    inputs = {side: keras.Input((), dtype="string", name=side) for side in (*towers, "other")}
    vectors = [towers["item"](inputs["item"]), towers["user"](inputs["user"]), towers["user"](inputs["other"])]
    return keras.Model(inputs, layers.Add()(vectors))


def subclassed(folder):
    model = Subclassed(lines(folder, "subclassed.txt", ["b", "a", "x y"]))
    model.user_layer.layers[0].adapt(tf.constant(["a", "b", "b", "é"]))
    return called(model)


def configured():
    lookups = layers.StringLookup(vocabulary=["a", "b", "c"]), adapted(["x", "y", "y"], num_oov_indices=2)
    return called(Configured(*[keras.Sequential([lookup, embedding_of(lookup, 4)]) for lookup in lookups]))


def own_layers():
    model = OwnLayers()
    model.user_layer.lookup.adapt(tf.constant(["a", "b", "b"]))
    model.item_layer.lookup.adapt(tf.constant(["x", "y", "y", "z"]))
    return called(model)


def functional_of_keras_2():
    user = tf_keras.layers.StringLookup(vocabulary=ODD_IDS, num_oov_indices=3, mask_token="m", name="user_lookup")
    item = tf_keras.layers.IntegerLookup(mask_token=0, name="item_lookup")
    item.adapt(np.array([3, 3, 3, -9, 9, 9, 4]))
    inputs = {"user": tf_keras.Input((1,), dtype="string"), "item": tf_keras.Input((1,), dtype="int64")}
    vectors = [
        tf_keras.layers.Embedding(lookup.vocabulary_size() + 2, 4, name=f"{side}_embedding")(lookup(inputs[side]))
        for side, lookup in (("user", user), ("item", item))
    ]
    return tf_keras.Model(inputs, tf_keras.layers.Dot(2)(vectors))


def subclassed_of_keras_2():
    model = OfKeras2()
    model.user_layer.layers[0].adapt(tf.constant(["a", "b", "b"]))
    model.item_layer.layers[0].adapt(tf.constant(["x", "y", "y", "z"]))
    return called(model)


def main(folder):
    keras.utils.set_random_seed(7)
    write(folder, "functional", functional(folder), PARTS)
    write(folder, "special", special(folder), PARTS)
    write(folder, "adapted", adapted_integers(folder), PARTS)
    write(folder, "nested", nested(folder), lambda model: {
        side: tuple(model.get_layer(f"{side}_layer").layers[-2:]) for side in ("user", "item")
    })  # fmt: skip
    lookup = layers.StringLookup(vocabulary=["a", "b", "c"])
    sequential = keras.Sequential([keras.Input((), dtype="string"), lookup, embedding_of(lookup, 4, name="table")])
    write(folder, "sequential", sequential, lambda model: {"user": model.layers[-2:]})
    write(folder, "subclassed", subclassed(folder), of_sequentials)
    write(folder, "configured", configured(), of_sequentials)
    write(folder, "own", own_layers(), lambda model: {
        side: (tower.lookup, tower.table) for side, tower in (("user", model.user_layer), ("item", model.item_layer))
    })  # fmt: skip
    write(folder, "lists", called(Lists()), lambda _: {})
    write(folder, "arguments", called(Lists(users=["a", "b"], items=["x", "y"])), lambda _: {})
    write(folder, "keras2_functional", functional_of_keras_2(), PARTS, tf_keras)
    write(folder, "keras2_subclassed", subclassed_of_keras_2(), of_sequentials, tf_keras)
    lookup = layers.StringLookup(vocabulary=["a", "b", "c"])
    quantized = keras.Sequential([keras.Input((), dtype="string"), lookup, embedding_of(lookup, 4, name="table")])
    quantized.quantize("int8")
    write(folder, "quantized", quantized, lambda _: {})


def log(folder, name, tracking_uri, experiment_id):
    import mlflow

    mlflow.set_tracking_uri(tracking_uri)
    with mlflow.start_run(experiment_id=experiment_id) as run:
        mlflow.tensorflow.log_model(keras.models.load_model(folder / name / "model.keras"), name="model")
    print(run.info.run_id)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        main(Path(sys.argv[1]))
    else:
        log(Path(sys.argv[1]), *sys.argv[2:])
