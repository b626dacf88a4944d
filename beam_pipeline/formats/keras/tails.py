"""How the towers of a Keras model continue after their embeddings: by its calls, or by what is beside an embedding."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from types import MappingProxyType

from beam_pipeline.formats.keras.calls import Calls
from beam_pipeline.formats.keras.config import INDEXES, Layer, outermost_graph, read_layers
from beam_pipeline.formats.keras.indexes import Index
from beam_pipeline.formats.keras.towers import MAX_STEPS, Layers
from beam_pipeline.formats.model import Ending, Tail
from beam_pipeline.formats.tails import Steps, Trace, rivals, tail

_MAX_NAMED = 8
"""Layers that a message names."""
_WITHOUT_EFFECT = frozenset(
    {
        "activity_regularization", "dropout", "flatten", "gaussian_dropout", "gaussian_noise", "identity",
        "input_layer", "integer_lookup", "masking", "reshape", "spatial_dropout1d", "string_lookup",
    }
)  # fmt: skip
"""Layers beside an embedding that leave its rows as they are when a model serves, as their paths have them."""


def read(
    path: str,
    layers: Layers,
    towers: Mapping[str, str],
    without_lookup: Collection[str] = (),
    indexes: Mapping[str, Index] = MappingProxyType({}),
    all_indexes: Collection[Index] = (),
) -> dict[str, Tail]:
    """Returns how towers continue after their embeddings, until they meet each other or are returned.

    Args:
        path: of the file, for messages.
        layers: of the model.
        towers: all towers that are published together: name → layer.
        without_lookup: names of those whose ids are elsewhere.
        indexes: those that are search indexes.
        all_indexes: of the model.

    Raises:
        TowerMissingError: there is no such tower.
    """
    found = {
        name: layers.without_lookup(name, layer) if name in without_lookup else layers.tower(name, layer)
        for name, layer in towers.items()
        if name not in indexes
    }
    numbers = _Numbers(layers)
    chosen = {name: numbers.of_path(tower.embedding.path) for name, tower in found.items()}
    inside = {
        name: {numbers.of_path(embedding.path) for embedding in layers.parts(tower.holder)[1]}
        for name, tower in found.items()
    }
    searched = {numbers.of_path(index.path) for index in all_indexes}
    chosen |= {name: numbers.of_path(index.path) for name, index in indexes.items()}
    are_towers = rivals([(chosen[name], inside.get(name, {chosen[name]})) for name in towers])

    def are_rivals(one: int, other: int, is_pairing: bool) -> bool:
        # Whatever is compared with an index is a tower's vector.
        return are_towers(one, other, is_pairing) or (is_pairing and (one in searched) != (other in searched))

    calls = Calls(numbers.of_layer)
    trace = Trace(calls.function, numbers.widths(), are_rivals, Steps(path, MAX_STEPS))
    is_graph = layers.root.is_graph
    of_model = [[trace.returned(calls.add(layers.root), [])]] if is_graph else []
    models = _Models(layers)
    tails = {name: _of_index(index) for name, index in indexes.items()}
    for name, tower in found.items():
        model = tower.holder if is_graph else models.around(tower.embedding)
        of_tower = [[trace.returned(calls.add(model), [])]] if model and model.is_graph else []
        tails[name] = tail(chosen[name], of_model, of_tower, trace.meetings)
        if not is_graph and tails[name].ending != Ending.GOES_ON:
            paths = {index.path for index in all_indexes}
            tails[name] = _by_layers(layers, tower.holder, tails[name], towers[name], paths)
    return tails


def _of_index(index: Index) -> Tail:
    """Returns how the vectors of a search index go on: the libraries compare them as they are."""
    if index.kind in INDEXES:
        return Tail(Ending.EMBEDDING)
    return Tail(Ending.UNKNOWN, reason="the code of the index's call is not in the file")


class _Numbers:
    """The numbers by which layers are followed through calls."""

    def __init__(self, layers: Layers) -> None:
        self._layers = layers
        self._numbers: dict[str, int] = {}
        self._paths: dict[str, str] = {}
        for path, name in layers.weights.groups.items():
            self._paths.setdefault(name, path)

    def of_path(self, path: str) -> int:
        """Returns the number of the layer whose state is at a path."""
        return self._numbers.setdefault(path, len(self._numbers))

    def of_layer(self, layer: Layer) -> int:
        """Returns the number of a layer; one of a subclassed model is known by its name alone."""
        path = layer.path if self._layers.root.is_graph else self._paths.get(layer.name, layer.name)
        return self.of_path(path)

    def widths(self) -> dict[int, int]:
        """Returns the length of a row, by number."""
        return {number: self._layers.weights.width(path) for path, number in self._numbers.items()}


class _Models:
    """The Functional and Sequential models in the config of a subclassed one."""

    def __init__(self, layers: Layers) -> None:
        self._layers = layers
        self._models: list[Layer] = []

    def around(self, embedding: Layer) -> Layer | None:
        """Returns the outermost model that holds an embedding, by its name."""
        entry = self._layers.serialized(embedding.name)
        config = None if entry is None else outermost_graph(self._layers.root.config, entry)
        if config is None:
            return None
        known = next((model for model in self._models if model.config is config), None)
        if known is None:
            known = read_layers(config)
            self._models.append(known)
        return known


def _by_layers(layers: Layers, holder: Layer, by_calls: Tail, requested: str, indexes: Collection[str]) -> Tail:
    """Returns what the layers beside the embedding of a subclassed model's tower say of its tail."""
    weights = layers.weights
    operations, scales = [], False
    for path in weights.below(holder.path):
        layer = layers.described(path)
        last = path.rsplit("/", 1)[-1]
        noted_name = weights.groups.get(path, "")
        kind = re.sub(r"_\d+$", "", last if path.endswith(f"layers/{last}") else noted_name)
        if layers.role(layer) or last == "layers" or kind in _WITHOUT_EFFECT:
            continue
        if kind == "unit_normalization":
            scales = True
        elif weights.count(path) or path.endswith(f"layers/{last}"):
            operations.append((noted_name or last, "weights" if weights.count(path) else "layer"))
    if operations:
        return Tail(Ending.GOES_ON, tuple(operations))
    reason = "the model is subclassed, and the code of its call is not in the file"
    if others := _layers_outside(layers, indexes):
        reason += f", which has layers with weights beside its towers: {', '.join(others)}"
    if holder.path != requested.replace(".", "/"):
        reason += f"; {requested!r} is taken to be {holder.path}"
    if scales or by_calls.ending == Ending.SCALED:
        return Tail(Ending.SCALED, by_calls.operations or (("unit_normalization", "L2"),), reason=reason)
    return Tail(Ending.UNKNOWN, reason=reason)


def _layers_outside(layers: Layers, indexes: Collection[str]) -> list[str]:
    """Returns some of the layers that have weights and are in no tower, and no search index."""
    groups = layers.weights.groups
    towers = layers.tower_paths()
    paths = (path for path in groups if path and path not in indexes and layers.weights.count(path))
    outside = [path for path in paths if not any(path == tower or path.startswith(f"{tower}/") for tower in towers)]
    return [groups[path] or path for path in outside][:_MAX_NAMED]
