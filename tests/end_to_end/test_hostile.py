"""Nothing in an artifact is executed: real models that write a file wherever their code runs, read without that file."""

import json
import pickle
import subprocess
import sys
import zipfile

import pytest

# A model in which a Lambda is called and, in its config, is code by marshal and a class by name. Each puts down a mark.
KERAS = """
import os, sys
os.environ["KERAS_BACKEND"] = "tensorflow"
import keras, tensorflow as tf
from pathlib import Path
folder, marks = Path(sys.argv[1]), sys.argv[2]
inputs, vectors = {}, []
for side in ("user", "item"):
    lookup = keras.layers.StringLookup(vocabulary=[f"{side} 1", f"{side} 2"], name=f"{side}_lookup")
    inputs[side] = keras.Input((1,), name=side, dtype="string")
    embedding = keras.layers.Embedding(3, 2, name=f"{side}_embedding", embeddings_initializer="ones")
    vectors.append(keras.layers.Flatten()(embedding(lookup(inputs[side]))))
mark = eval(f"lambda x: (__import__('pathlib').Path({marks!r}, 'lambda').touch(), x)[1]")
vectors[0] = keras.layers.Lambda(mark, output_shape=(2,))(vectors[0])
model = keras.Model(inputs, keras.layers.Dot(1)(vectors))
model.save(folder / "model.keras")
"""
KERAS_CONTROL = """
import os, sys
os.environ["KERAS_BACKEND"] = "tensorflow"
import keras, tensorflow as tf
model = keras.models.load_model(sys.argv[1] + "/model.keras", safe_mode=False)
model({side: tf.constant([[f"{side} 1"]]) for side in ("user", "item")})
"""

# The same in a SavedModel: a py_function in the graph, and a Lambda in keras_metadata.pb.
SAVED_MODEL = """
import os, sys
os.environ["TF_USE_LEGACY_KERAS"] = "1"
import tensorflow as tf
from pathlib import Path
folder, marks = Path(sys.argv[1]), sys.argv[2]
layers = tf.keras.layers

class TwoTower(tf.keras.Model):
    def __init__(self):
        super().__init__()
        self.user_layer, self.item_layer = [
            tf.keras.Sequential([layers.StringLookup(vocabulary=[f"{side} 1", f"{side} 2"]), layers.Embedding(3, 2, "ones")])
            for side in ("user", "item")
        ]
        mark = eval(f"lambda x: (__import__('pathlib').Path({marks!r}, 'lambda').touch(), x)[1]")
        self.after = layers.Lambda(mark)

    def call(self, inputs):
        users = self.after(self.user_layer(inputs["user"]))
        users = tf.py_function(lambda x: (Path(marks, "py_function").touch(), x)[1], [users], tf.float32)
        return users * self.item_layer(inputs["item"])

model = TwoTower()
example = {side: tf.constant([f"{side} 1"]) for side in ("user", "item")}
model(example)
model.save(folder, save_format="tf")
for mark in Path(marks).iterdir():
    mark.unlink()
# The control: TensorFlow runs it.
tf.saved_model.load(folder).signatures["serving_default"](**example)
tf.keras.models.load_model(folder).after(tf.constant([1.0]))
"""

READ = """
import json, sys
from contextlib import closing
from beam_pipeline.files import open_file
from beam_pipeline.reading import pieces
from beam_pipeline.formats import open_artifact
from beam_pipeline.reading.pieces import cover
from beam_pipeline.reading.rows import read_piece

def read(folder, layer):
    layers = {side: layer.format(side) for side in ("user", "item")}
    with closing(open_artifact(folder, open_file, layers.values())) as artifact:
        artifact.tower_layers()
        towers = cover([artifact.tower(*tower, include_oov=True) for tower in layers.items()])
        artifact.tails(layers)
    rows = []
    for tower in towers:
        for piece in pieces.cut(tower, open_file, 1000):
            batch, _ = read_piece("run", piece, tower, open_file)
            if batch is not None:
                rows += zip(batch.ids.to_pylist(), batch.vectors.tolist())
    return rows

harmless, folder, layer = sys.argv[1:]
read(harmless, layer)  # Imports what is imported late, which runs code: of the installed packages.

FORBIDDEN = (
    "compile", "exec", "import", "marshal.loads", "pickle.find_class", "os.exec", "os.fork", "os.posix_spawn", "os.system",
    "subprocess.Popen", "ctypes.dlopen", "socket.connect",
)

def watch(event, arguments):
    if event in FORBIDDEN or event == "open" and "w" in str(arguments[1]):
        raise SystemExit(f"{event} {arguments}")

sys.addaudithook(watch)
rows = read(folder, layer)
wrong = {"keras", "tensorflow", "tf_keras", "h5py"} & {*sys.modules}
print(json.dumps([rows, sorted(wrong)]))
"""

ROWS = [["[UNK]", [1, 1]], *[[f"{side} {n}", [1, 1]] for side in ("user", "item") for n in (1, 2)]]


class Payload:
    """What a pickle does when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return eval, (f"__import__('pathlib').Path({str(self.path)!r}, 'pickle').touch()",)


def python(script, *arguments):
    done = subprocess.run([sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def found(marks):
    """Returns the marks that were put down, and takes them away."""
    names = {mark.name for mark in marks.iterdir()}
    for mark in marks.iterdir():
        mark.unlink()
    return names


def read(harmless, folder, layer):
    rows, wrong = json.loads(python(READ, harmless, folder, layer).splitlines()[-1])
    assert wrong == []
    return rows


@pytest.fixture
def marks(tmp_path):
    folder = tmp_path / "marks"
    folder.mkdir()
    return folder


def test_a_keras_file_with_code(tmp_path, marks, keras_files):
    python(KERAS, tmp_path, marks)
    found(marks)
    python(KERAS_CONTROL, tmp_path)
    assert found(marks) == {"lambda"}  # Keras runs it.
    payload = pickle.dumps(Payload(marks))
    pickle.loads(payload)
    assert found(marks) == {"pickle"}
    path = tmp_path / "model.keras"
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    # A class of one's own, by module and name, which Keras would import; and pickles where somebody might load them.
    config = json.loads(members["config.json"])
    own = {"module": "antigravity", "registered_name": "os>system", "class_name": "Own", "config": {"name": "own"}}
    config["config"]["layers"].append(own)
    members["config.json"] = json.dumps(config).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {**members, "assets/data.pkl": payload, "states.npy": payload}.items():
            archive.writestr(name, content)
    rows = read(keras_files("functional").folder, tmp_path, "{}_embedding")
    assert sorted(rows) == sorted([*ROWS, ROWS[0]])
    assert found(marks) == set()


def test_a_saved_model_with_code(tmp_path, marks, models):
    folder = tmp_path / "saved"
    python(SAVED_MODEL, folder, marks)
    assert found(marks) == {"lambda", "py_function"}  # TensorFlow runs it.
    payload = pickle.dumps(Payload(marks))
    for name in ("assets/vocabulary.pkl", "assets.extra", "keras_metadata.pkl", "python_model.pkl"):
        (folder / name).write_bytes(payload)
    rows = read(models("plain").folder, folder, "{}_layer")
    assert sorted(rows) == sorted([*ROWS, ROWS[0]])
    assert found(marks) == set()


def test_a_pickle_as_a_vocabulary(tmp_path, marks, damaged):
    """Its lines are taken for ids, or are refused as such."""
    model = damaged("plain")
    (model.folder / "assets" / "items.txt").write_bytes(pickle.dumps(Payload(marks), protocol=0))
    rows = read(model.folder, model.folder, "{}_layer")
    assert any("pathlib" in name for name, _ in rows)
    assert found(marks) == set()
