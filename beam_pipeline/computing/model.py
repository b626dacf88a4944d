"""Loads a model into TensorFlow and finds in it the part that computes a tower.

A SavedModel is loaded by `tf.saved_model.load`: its functions are graphs of TensorFlow's operations, and no Python
class of the training is needed. A `.keras` file is loaded with Keras's `safe_mode`, which refuses a Lambda layer, and
without custom objects. Nothing is unpickled. Operations of a graph can still read and write files of the process that
runs them, which is why a tower is computed only where that was asked for.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import tempfile
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from beam_pipeline.computing.signature import Input, Signature
from beam_pipeline.errors import (
    ArtifactMissingError,
    ConfigError,
    CorruptFileError,
    ModelCallError,
    NotAModelError,
    TowerMissingError,
)
from beam_pipeline.files import join

_MOST_PARTS = 12
"""Callable parts that a message names."""
_DEPTH = 3
_OBJECTS = 2000
"""How far they are looked for: attributes of attributes, and how many objects."""


@dataclass(frozen=True)
class Part:
    """A part of a loaded model that computes a tower.

    Attributes:
        signature: what it takes and returns.
        function: from the inputs, in the signature's order, to its output.
        model: the whole, which holds the variables that the function reads.
    """

    signature: Signature
    function: Callable[[Sequence[Any]], Any]
    model: Any = None

    def __call__(self, inputs: Sequence[Any]) -> np.ndarray:
        """Returns the vectors [n, dimension] of n rows, as floats of the signature's type.

        Args:
            inputs: a NumPy array for each input, strings as objects; for a ragged one (values, row splits).

        Raises:
            ModelCallError: the model fails.
        """
        tf = tensorflow()
        tensors = []
        for each, values in zip(self.signature.inputs, inputs, strict=True):
            if each.is_ragged:
                flat, splits = values
                tensors.append(tf.RaggedTensor.from_row_splits(tf.constant(flat, each.dtype), splits))
            else:
                tensors.append(tf.constant(values, each.dtype))
        try:
            output = self.function(tensors).numpy()
        except (tf.errors.OpError, ValueError, TypeError) as error:
            raise ModelCallError(f"the model fails: {_reason(error)}") from error
        vectors: np.ndarray = output.reshape(len(output), -1).astype(self.signature.dtype, copy=False)
        if vectors.shape[1] != self.signature.dimension:
            raise ModelCallError(
                f"the model returned vectors of {vectors.shape[1]:,} values, its signature says "
                f"{self.signature.dimension:,}"
            )
        return vectors


class LoadedModel:
    """A model in memory."""

    def __init__(self, path: str, model: Any, *, is_keras: bool) -> None:
        self._path = path
        self._model = model
        self._is_keras = is_keras
        self._parts: dict[str, Part] = {}

    def part(self, tower: str, layer: str) -> Part:
        """Returns the part that computes a tower.

        Args:
            tower: the tower's name, for messages.
            layer: the attribute path of a layer, a module or a function, or the name of a signature.

        Raises:
            TowerMissingError: it is not there, cannot be called, or does not return a vector for each row.
        """
        if layer in self._parts:
            return self._parts[layer]
        found = self._find(layer)
        try:
            if found is None:
                raise _UnfitError("is not there")
            self._parts[layer] = replace(self._callable(found), model=self._model)
            return self._parts[layer]
        except _UnfitError as error:
            parts = ", ".join(self.parts())
            choose = f"choose with --tower={tower}=PART, or log" if parts else "log"
            raise TowerMissingError(
                f"tower {tower!r}: {layer!r} of {self._path} {error}; parts that compute a vector: {parts or 'none'}; "
                f"{choose} the model with the tower as a layer, or a signature, of its own"
                + ("" if parts else " (model.export() alone saves one function of both towers together)")
            ) from error

    def parts(self) -> list[str]:
        """Returns what could be given as `layer`, each with what it takes and returns; the first ones of many."""
        found: list[str] = []
        for path, each in self._below():
            try:
                found.append(f"{path}: {self._callable(each).signature}")
            except _UnfitError:
                continue
            if len(found) == _MOST_PARTS:
                break
        return found

    def _callable(self, found: Any) -> Part:
        return _keras_part(found) if self._is_keras else _saved_part(found)

    def _find(self, layer: str) -> Any:
        found = self._model
        for name in layer.replace("/", ".").split("."):
            found = _child(found, name)
            if found is None:
                return None if self._is_keras else _signatures(self._model).get(layer)
        return found

    def _below(self) -> Iterator[tuple[str, Any]]:
        """Yields the objects of a model by their paths, outermost ones first."""
        level: list[tuple[str, Any]] = [("", self._model)]
        seen = {id(self._model)}
        for _ in range(_DEPTH):
            below = []
            for path, owner in level:
                for name, child in _children(owner):
                    if id(child) in seen or len(seen) > _OBJECTS:
                        continue
                    seen.add(id(child))
                    below.append((f"{path}.{name}" if path else name, child))
            yield from below
            level = below
        if not self._is_keras:
            yield from ((name, each) for name, each in _signatures(self._model).items() if id(each) not in seen)


def tensorflow() -> Any:
    """Returns the module, imported once.

    Raises:
        ConfigError: it is not installed.
    """
    if importlib.util.find_spec("tensorflow") is None:
        raise ConfigError(
            "--compute needs TensorFlow, which is not installed here: pip install 'beam-pipeline[compute]', or the "
            "image of the target `compute`, for the workers too"
        )
    # What it reports about processors and GPUs does not belong on stderr, where an error is one line.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # Of Keras 3's backends, the one whose operations the workers have.
    os.environ["KERAS_BACKEND"] = "tensorflow"
    import tensorflow as module

    return module


_KEPT = 2
"""Models that a process keeps: those of two towers that are computed side by side."""

_lock = threading.Lock()
_loaded: OrderedDict[str, LoadedModel] = OrderedDict()


def loaded(path: str) -> LoadedModel:
    """Returns a model that all threads and transforms of this process share; it is loaded when it is first asked for.

    Args:
        path: as `load` takes it.
    """
    with _lock:
        found = _loaded.pop(path, None) or load(path)
        _loaded[path] = found
        while len(_loaded) > _KEPT:
            _loaded.popitem(last=False)
        return found


def load(path: str) -> LoadedModel:
    """Loads a model whole into memory.

    Args:
        path: a SavedModel's folder or a `.keras` file, local or on Cloud Storage, from where it is first copied: Beam's
            file systems have the job's credentials and emulators.

    Raises:
        ConfigError: TensorFlow is not installed.
        NotAModelError: TensorFlow or Keras cannot load it.
        CorruptFileError: its files are damaged.
    """
    tf = tensorflow()
    with _local(path) as local:
        try:
            if path.endswith(".keras"):
                return LoadedModel(path, _load_keras(local), is_keras=True)
            return LoadedModel(path, tf.saved_model.load(local), is_keras=False)
        except (tf.errors.DataLossError, tf.errors.OutOfRangeError, zipfile.BadZipFile) as error:
            raise CorruptFileError(f"{path} is damaged ({_reason(error)}); log the model again") from error
        # Each of the two fails in many ways, and all mean that the model cannot be computed.
        except Exception as error:
            raise NotAModelError(
                f"{path} cannot be loaded to compute its towers: {_reason(error)}; log it as a SavedModel, of this "
                "or an older TensorFlow, without Lambda layers and classes of its own"
            ) from error


def _load_keras(path: str) -> Any:
    with zipfile.ZipFile(path) as file:
        version = str(json.loads(file.read("metadata.json")).get("keras_version", ""))
    if version.startswith("2."):
        raise ValueError(f"it was saved by Keras {version}, and Keras 3 cannot load it")
    import keras

    return keras.saving.load_model(path, compile=False, safe_mode=True)


@contextmanager
def _local(path: str) -> Iterator[str]:
    """Yields a local path of a model, copied if it has to be."""
    if "://" not in path:
        yield path
        return
    from apache_beam.io.filesystem import CompressionTypes
    from apache_beam.io.filesystems import FileSystems

    with tempfile.TemporaryDirectory(prefix="model-") as folder:
        is_file = path.endswith(".keras")
        # Brackets around what a glob would interpret.
        pattern = "".join(f"[{letter}]" if letter in "*?[" else letter for letter in path)
        try:
            (found,) = FileSystems.match([pattern if is_file else join(pattern, "**")])
        except Exception as error:  # Each file system fails in its own way.
            raise ArtifactMissingError(f"{path} cannot be read: {_reason(error)}") from error
        if not found.metadata_list:
            raise ArtifactMissingError(f"{path} does not exist")
        base = path.rpartition("/")[0] if is_file else path
        for each in found.metadata_list:
            local = Path(folder, each.path.removeprefix(base).lstrip("/"))
            local.parent.mkdir(parents=True, exist_ok=True)
            with (
                FileSystems.open(each.path, compression_type=CompressionTypes.UNCOMPRESSED) as source,
                local.open("wb") as target,
            ):
                shutil.copyfileobj(source, target, 4 << 20)
        yield str(Path(folder, path.rpartition("/")[2])) if is_file else folder


class _UnfitError(Exception):
    """Says why an object does not compute vectors, as the rest of a sentence."""


def _saved_part(found: Any) -> Part:
    """Returns what a SavedModel's function, or the call of one of its objects, computes."""
    tf = tensorflow()
    function: Any = (
        found if hasattr(found, "structured_input_signature") or hasattr(found, "concrete_functions") else None
    )
    if function is None:
        function = getattr(found, "__call__", None)  # noqa: B004 - its attributes are needed, not whether it is there
    if hasattr(function, "structured_input_signature"):  # a signature
        concrete = [function]
    else:
        concrete = list(getattr(function, "concrete_functions", None) or [])
    if not concrete:
        raise _UnfitError("cannot be called")
    reasons = []
    for each in concrete:
        args, kwargs = each.structured_input_signature
        leaves = [*_leaves((args, kwargs), tf.TypeSpec)]
        if any(leaf is True for _, leaf in leaves):  # training=True
            continue
        try:
            inputs = tuple(_input(name, leaf) for name, leaf in leaves if isinstance(leaf, tf.TypeSpec))
            dimension, dtype = _output(each.structured_outputs)
        except _UnfitError as error:
            reasons.append(error)
            continue

        def call(tensors: Sequence[Any], structure: Any = (args, kwargs)) -> Any:
            filled_args, filled_kwargs = _filled(structure, iter(tensors), tf.TypeSpec)
            return _only(function(*filled_args, **filled_kwargs))

        return Part(Signature(inputs, dimension, dtype, f"tensorflow {tf.__version__}"), call)
    raise reasons[0] if reasons else _UnfitError("is for training only")


def _keras_part(found: Any) -> Part:
    """Returns what a layer of a loaded Keras model computes, as one graph."""
    import keras

    tf = tensorflow()
    if not isinstance(found, keras.Layer):
        raise _UnfitError("cannot be called")
    try:
        named = list(found.inputs)
    except (AttributeError, ValueError, TypeError) as error:
        raise _UnfitError("does not say what it takes; a Functional or Sequential model with an Input does") from error
    if not named:
        raise _UnfitError("does not say what it takes; a Functional or Sequential model with an Input does")
    specs = [tf.TensorSpec(each.shape, each.dtype, name=each.name) for each in named]
    inputs = tuple(_input(spec.name, spec) for spec in specs)
    structure = found.input

    def call(*tensors: Any) -> Any:
        if isinstance(structure, dict):
            by_name = dict(zip((each.name for each in named), tensors, strict=True))
            return found({key: by_name[each.name] for key, each in structure.items()}, training=False)
        return found(tensors[0] if len(tensors) == 1 else list(tensors), training=False)

    if isinstance(structure, dict):  # The keys are the names by which people call it.
        keys = {each.name: key for key, each in structure.items()}
        inputs = tuple(_input(keys.get(spec.name, spec.name), spec) for spec in specs)
    try:
        function = tf.function(call, input_signature=specs).get_concrete_function()
    except Exception as error:  # whatever its layers raise
        raise _UnfitError(f"cannot be called ({_reason(error)})") from error
    dimension, dtype = _output(tf.nest.map_structure(tf.type_spec_from_value, function.structured_outputs))
    return Part(
        Signature(inputs, dimension, dtype, f"tensorflow {tf.__version__}, keras {keras.__version__}"),
        lambda tensors: _only(function(*tensors)),
    )


def _leaves(structure: Any, spec: type, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the leaves of what a function is called with, in a fixed order, each with its name."""
    if isinstance(structure, spec):
        yield name or str(getattr(structure, "name", None) or "input"), structure
    elif isinstance(structure, Mapping):
        for key in sorted(structure):
            yield from _leaves(structure[key], spec, str(key))
    elif isinstance(structure, (list, tuple)):
        for each in structure:
            # Of what has a position instead of a name, the function's argument is the name.
            yield from _leaves(each, spec)
    else:
        yield name, structure


def _filled(structure: Any, tensors: Iterator[Any], spec: type) -> Any:
    """Returns the structure with tensors in place of what describes them, in the order of `_leaves`."""
    if isinstance(structure, spec):
        return next(tensors)
    if isinstance(structure, Mapping):
        filled = {key: _filled(structure[key], tensors, spec) for key in sorted(structure)}
        return {key: filled[key] for key in structure}
    if isinstance(structure, (list, tuple)):
        return type(structure)(_filled(each, tensors, spec) for each in structure)
    return structure


def _input(name: str, spec: Any) -> Input:
    tf = tensorflow()
    is_ragged = isinstance(spec, tf.RaggedTensorSpec)
    if not is_ragged and not isinstance(spec, tf.TensorSpec):
        raise _UnfitError(f"takes {name!r} as a {type(spec).__name__.removesuffix('Spec')}, not as a tensor")
    if spec.shape.rank is None:
        raise _UnfitError(f"does not say how many values of {name!r} it takes")
    if spec.shape.rank == 0 or (spec.shape[0] is not None and not is_ragged):
        rows = spec.shape[0] if spec.shape.rank else 1
        raise _UnfitError(f"takes {name!r} of exactly {rows} row(s), not of any number; save it with a batch of None")
    shape = tuple(spec.shape[1:])
    if len(shape) > 1 or (is_ragged and len(shape) != 1):
        raise _UnfitError(f"takes {name!r} as lists of lists, which no column holds")
    return Input(name, spec.dtype.name, shape, is_ragged)


def _output(outputs: Any) -> tuple[int, str]:
    """Returns the length of the vectors that a function returns, and the type that holds their values."""
    tf = tensorflow()
    leaves = [(name, leaf) for name, leaf in _leaves(outputs, tf.TypeSpec) if isinstance(leaf, tf.TypeSpec)]
    if len(leaves) != 1:
        names = ", ".join(name for name, _ in leaves)
        raise _UnfitError(f"returns {len(leaves)} outputs ({names}) instead of one vector")
    ((_, spec),) = leaves
    shape = getattr(spec, "shape", None)
    if shape is None or shape.rank is None or not isinstance(spec, tf.TensorSpec):
        raise _UnfitError("does not say what it returns; save it with an output of known shape")
    if shape.rank < 2 or shape[-1] == 1:
        raise _UnfitError("returns one number for each row, not a vector")
    if not spec.dtype.is_floating:
        raise _UnfitError(f"returns values of type {spec.dtype.name}, not floats")
    if any(length != 1 for length in shape[1:-1]):
        raise _UnfitError(f"returns {shape.rank - 1}-dimensional arrays for each row, not a vector")
    if shape[-1] is None:
        raise _UnfitError("returns vectors whose length is not known before it is called")
    return int(shape[-1]), "float64" if spec.dtype.name == "float64" else "float32"


def _only(output: Any) -> Any:
    """Returns the one tensor of what a function returned."""
    while isinstance(output, (Mapping, list, tuple)):
        (output,) = output.values() if isinstance(output, Mapping) else output
    return output


def _child(owner: Any, name: str) -> Any:
    if name.startswith("_"):
        return None
    if isinstance(owner, (list, tuple)):
        return owner[int(name)] if name.isdecimal() and int(name) < len(owner) else None
    if isinstance(owner, Mapping):
        return owner.get(name)
    child = getattr(owner, name, None)
    if child is None and hasattr(owner, "get_layer"):
        try:
            return owner.get_layer(name)
        except ValueError:
            return None
    return child


def _children(owner: Any) -> Iterator[tuple[str, Any]]:
    """Yields the attributes of an object that may be parts of a tower's path."""
    layers = getattr(owner, "layers", None)
    if layers is not None and hasattr(owner, "get_layer"):
        yield from ((layer.name, layer) for layer in layers)
    for name, child in sorted(getattr(owner, "__dict__", {}).items()):
        internal = name.startswith(("_", "layer-", "layer_with_weights-", "call_and_return_")) or name == "keras_api"
        if not internal and (callable(child) or getattr(child, "__dict__", None)):
            yield name, child


def _signatures(model: Any) -> Mapping[str, Any]:
    return getattr(model, "signatures", None) or {}


def _reason(error: Exception) -> str:
    """Returns an error's first line; TensorFlow's own have the graph below it."""
    lines = [line.strip() for line in str(getattr(error, "message", None) or error).splitlines() if line.strip()]
    line = next((line for line in lines if not line.startswith("Graph execution error")), type(error).__name__)
    return line if len(line) < 200 else line.partition(". ")[0]
