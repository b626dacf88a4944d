"""Which layers of a Keras model are towers: what each layer is, by its class, its name or its weights.

Of a Functional or Sequential model config.json has every layer. A subclassed model has its layers in the HDF5 file
under their attributes' names, as long as these come before "layers" in the alphabet; the others are met in the property
`layers` before, and their attributes' names are nowhere in the file. Keras 2 (tf_keras/src/saving/saving_lib.py) does
the same in the reverse order.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

from beam_pipeline.errors import CorruptFileError, TowerMissingError, UnsupportedModelError
from beam_pipeline.formats.keras.config import EMBEDDING, LOOKUPS, TEXT, Config, Layer, serialized_layers, snake_case
from beam_pipeline.formats.keras.weights import Weights

MAX_STEPS = 300_000
"""Objects that are met while towers are looked for: a few seconds, though each layer may share all the others."""
_MAX_FEEDING = 100
"""Layers between an embedding and its lookup."""
_MATRICES = ("Dense", "EinsumDense")
"""Layers whose only weights may be a matrix that is no embedding."""
_SHAPING = ("Flatten", "Reshape", "Identity", "Cast", "Squeeze", "ExpandDims")
"""Layers and operations that may stand between a lookup and its embedding: they leave row numbers as they are."""
KEEP_IDS = (
    "a subclassed Keras model does not store a vocabulary given as a list; give it as a file (Keras ≥ 3.12), learn "
    "it with adapt(), or have get_config return the layer (keras.saving.serialize_keras_object); log the model again"
)
"""What to do where the ids of a lookup are not in the file."""


class TowerLayers(NamedTuple):
    """The layers of a tower: the one that was named, and the lookup and the embedding in it or before it."""

    holder: Layer
    lookup: Layer
    embedding: Layer


class BareLayers(NamedTuple):
    """The layers of a tower whose ids are elsewhere: the one that was named, and the embedding in it."""

    holder: Layer
    embedding: Layer


class Layers:
    """The layers of a model, found by the names that a user gives.

    Attributes:
        root: the model.
        weights: where the layers' state is.
    """

    def __init__(
        self,
        path: str,
        root: Layer,
        weights: Weights,
        with_vocabulary: Collection[str],
        *,
        requested: Iterable[str] = (),
        is_reversed: bool = False,
    ) -> None:
        """Collects where layers are looked for.

        Args:
            path: of the file, for messages.
            root: the model.
            weights: of the HDF5 file.
            with_vocabulary: paths of the layers whose ids are in a vocabulary file.
            requested: all layers that are asked for as towers.
            is_reversed: whether attributes were saved in reverse order, as Keras 2 does.
        """
        self.root = root
        self.weights = weights
        self._path = path
        self._with_vocabulary = with_vocabulary
        self._requested = frozenset(requested)
        self._is_reversed = is_reversed
        self._serialized = serialized_layers(root.config)
        self._described: dict[str, Layer] = {}
        self._roles: dict[Layer, str] = {}
        self._steps = 0

    def tower(self, name: str, layer: str) -> TowerLayers:
        """Returns the layers of a tower.

        Args:
            name: of the tower, for messages.
            layer: as a user names it.

        Raises:
            TowerMissingError: no such layer, or it does not hold one lookup and one embedding.
            UnsupportedModelError: it holds them in a form that cannot be read.
        """
        holder = self._find(layer)
        lookups, embeddings = self.parts(holder) if holder else ([], [])
        if holder and not lookups and any(_is_text(each) for each in self._below(holder)):
            raise UnsupportedModelError(
                f"tower {name!r}: the lookup of layer {layer!r} in {self._path} looks up the words of a text: they are "
                f"not ids; layers that are towers: {', '.join(self.tower_names()) or 'none'}; choose with "
                f"--tower {name}=LAYER"
            )
        if holder and not lookups and len(embeddings) == 1:
            lookups = self._feeding(layer, holder, embeddings[0])
        if not holder or len(lookups) != 1 or len(embeddings) != 1:
            problem = (
                f"holds {len(lookups)} lookup(s) and {len(embeddings)} embedding(s) instead of one of each"
                if holder
                else "does not exist"
            )
            raise TowerMissingError(
                f"tower {name!r}: layer {layer!r} {problem} in {self._path}; layers that are towers: "
                f"{', '.join(self.tower_names()) or 'none'}; choose with --tower {name}=LAYER{self._missing_ids(name)}"
            )
        return TowerLayers(holder, lookups[0], embeddings[0])

    def without_lookup(self, name: str, layer: str) -> BareLayers:
        """Returns the layers of a tower that has no lookup: its ids are elsewhere.

        Raises:
            TowerMissingError: no such layer, or it holds a lookup, or not one embedding.
        """
        holder = self._find(layer)
        lookups, embeddings = self.parts(holder) if holder else ([], [])
        where = f"tower {name!r}: layer {layer!r} in {self._path}"
        if holder and len(embeddings) == 1 and not lookups:
            lookups = self._known_feeding(layer, holder, embeddings[0])
        if lookups:
            raise TowerMissingError(f"{where} has a lookup that holds its ids; leave out --ids {name}=…")
        if not holder or len(embeddings) != 1:
            problem = f"holds {len(embeddings)} embeddings" if holder else "does not exist"
            there = ", ".join(self.names_without_ids()) or "none"
            raise TowerMissingError(f"{where} {problem}; embeddings without ids: {there}; choose with --tower {name}=")
        return BareLayers(holder, embeddings[0])

    def names_without_ids(self) -> list[str]:
        """Returns the embeddings that no lookup feeds, as `without_lookup` takes them."""
        if self.root.is_graph:
            return sorted(".".join(names) for names in self._bare_names_below(self.root, ()))
        towers = self.tower_paths()
        paths = (path for path in self.weights.groups if self.role(self.described(path)) in ("embedding", "table"))
        return sorted(path for path in paths if not any(path.startswith(f"{tower}/") for tower in towers))

    def _bare_names_below(self, parent: Layer, names: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        for child in parent.children:
            child_names = (*names, child.name)
            if child.kind == EMBEDDING and not self._known_feeding(".".join(child_names), child, child):
                yield child_names
            elif child.is_graph and not self.parts(child)[0]:
                yield from self._bare_names_below(child, child_names)

    def _known_feeding(self, layer: str, holder: Layer, embedding: Layer) -> list[Layer]:
        """Returns the lookups that feed an embedding, as far as the file says."""
        try:
            return self._feeding(layer, holder, embedding)
        except UnsupportedModelError:
            return []

    def _missing_ids(self, name: str) -> str:
        missing = ", ".join(self.names_without_ids())
        return f"; embeddings without ids: {missing} (name their ids with --ids {name}=PATH)" if missing else ""

    def tower_names(self) -> list[str]:
        """Returns all layers that are towers, outermost ones only, as `tower` takes them."""
        return sorted(self.tower_paths())

    def tower_paths(self) -> list[str]:
        """Returns the same in the order of the model: paths in a subclassed model, names joined by dots in others."""
        if self.root.is_graph:
            return [".".join(names) for names in self._tower_names_below(self.root, ())]
        counts: dict[str, Counter[str]] = {}
        for path in self.weights.groups:
            role = self.role(self.described(path))
            names = path.split("/") if role else []
            for depth in range(1, len(names)):
                counts.setdefault("/".join(names[:depth]), Counter())[role] += 1
        found: dict[str, None] = {}
        for path, count in sorted(counts.items(), key=lambda item: item[0].count("/")):
            one_of_each = count["lookup"] == (count["embedding"] or count["table"]) == 1
            is_container = path.rsplit("/", 1)[-1] == "layers"
            outer = (path[: slash.start()] for slash in re.finditer("/", path))
            if one_of_each and not is_container and not any(outer_path in found for outer_path in outer):
                found[path] = None
        return list(found)

    def _tower_names_below(self, parent: Layer, names: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        for child in parent.children:
            lookups, embeddings = self.parts(child)
            child_names = (*names, child.name)
            if child.kind == EMBEDDING:
                lookups = self._known_feeding(".".join(child_names), child, child)
            if len(lookups) == len(embeddings) == 1:
                yield child_names
            elif lookups and embeddings:
                yield from self._tower_names_below(child, child_names)

    def described(self, path: str) -> Layer:
        """Returns the layer at a path in the HDF5 file, with its config if config.json has a layer of that name."""
        if path not in self._described:
            self._described[path] = Layer(path, self._serialized.get(self.weights.groups.get(path, ""), {}))
        return self._described[path]

    def serialized(self, name: str) -> Config | None:
        """Returns the entry of the only lookup or embedding anywhere in config.json that has a name."""
        return self._serialized.get(name)

    def parts(self, layer: Layer) -> tuple[list[Layer], list[Layer]]:
        """Returns the lookups and the embeddings that a layer is or holds."""
        parts: dict[str, dict[str, Layer]] = {kind: {} for kind in ("lookup", "embedding", "table", "")}
        for below in self._below(layer):
            parts[self.role(below)][below.path] = below
        return list(parts["lookup"].values()), list((parts["embedding"] or parts["table"]).values())

    def role(self, layer: Layer) -> str:
        """Returns "lookup", "embedding", "table" for what may be an embedding, or ""."""
        if layer not in self._roles:
            self._roles[layer] = self._find_role(layer)
        return self._roles[layer]

    def _find_role(self, layer: Layer) -> str:
        """Returns the role of a layer.

        Without a config, its class shows in its path, unless that has an attribute's name, or in the layer's name.
        """
        if _is_text(layer):
            return ""
        if layer.kind:
            kinds = [layer.kind]
        else:
            names = (layer.path.rsplit("/", 1)[-1], self.weights.groups.get(layer.path, ""))
            bases = [re.sub(r"_\d+$", "", name) for name in names]
            kinds = [kind for kind in (*LOOKUPS, EMBEDDING, TEXT, *_MATRICES) if snake_case(kind) in bases]
        if any(kind in LOOKUPS for kind in kinds):
            return "lookup"
        if EMBEDDING in kinds:
            return "embedding"
        if kinds:
            return ""
        if layer.path in self._with_vocabulary:
            return "lookup"
        return "table" if self.weights.is_table(layer.path) else ""

    def _below(self, layer: Layer) -> Iterator[Layer]:
        """Yields a layer and all layers inside of it."""
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise CorruptFileError(f"{self._path}: its layers share each other too often; log the model again")
        yield layer
        if layer.kind == TEXT:  # Its words are in a lookup inside of it.
            return
        if layer.is_graph:
            for child in layer.children:
                yield from self._below(child)
        else:
            for path in self.weights.below(layer.path):
                self._steps += 1
                yield self.described(path)

    # By the names that a user gives.

    def _find(self, layer: str) -> Layer | None:
        names = layer.replace("/", ".").split(".")
        if self.root.is_graph:
            return self._find_by_names(names)
        path = "/".join(names)
        if path in self.weights.groups:
            return self.described(path)
        return self._find_by_name(layer) or self._find_left(layer)

    def _find_by_names(self, names: Sequence[str]) -> Layer | None:
        found = self.root
        for name in names:
            child = found.child(name)
            if child is None:
                return None
            found = child
        return found

    def _find_by_name(self, layer: str) -> Layer | None:
        """Returns the only layer with this name, or with the name of what the model's config has as `layer`."""
        attribute = self.root.settings.get(layer)
        names = {layer}
        if isinstance(attribute, dict) and isinstance(attribute.get("config"), dict):
            names.add(str(attribute["config"].get("name")))
        paths = [path for path, name in self.weights.groups.items() if name in names]
        return self.described(paths[0]) if len(paths) == 1 else None

    def _find_left(self, layer: str) -> Layer | None:
        """Returns the tower that is left when all other layers that were requested are found."""
        missing = {
            other for other in self._requested
            if "/".join(other.split(".")) not in self.weights.groups and self._find_by_name(other) is None
        }  # fmt: skip
        found = [self._find(other) for other in self._requested - missing]
        claimed = {holder.path for holder in found if holder}
        left = [path for path in self.tower_paths() if path not in claimed]
        is_attribute = re.fullmatch(r"\w+", layer) and not layer.startswith("_") and layer != "layers"
        met_after = (layer > "layers") is not self._is_reversed
        if missing == {layer} and is_attribute and met_after and len(left) == 1 and left[0].startswith("layers/"):
            return self.described(left[0])
        return None

    # The lookup before an embedding.

    def _feeding(self, layer: str, holder: Layer, embedding: Layer) -> list[Layer]:
        """Returns the lookups that feed an embedding of a Functional or Sequential model."""
        where = f"{self._path}: embedding {layer!r}"
        if not self.root.is_graph and holder.path != embedding.path:
            raise UnsupportedModelError(f"{where}: the ids of a lookup beside it are not in the file: {KEEP_IDS}")
        if not self.root.is_graph:
            raise UnsupportedModelError(
                f"{where}: a subclassed Keras model does not say which lookup feeds it; put the two into one layer "
                "(keras.Sequential([lookup, embedding])), name that, and log the model again; if it has none, name its "
                "ids with --ids TOWER=PATH"
            )
        parent = self._find_by_names(layer.replace("/", ".").split(".")[:-1])
        # What was found by its path in the HDF5 file alone may be a layer of the model, too.
        sibling = embedding if embedding.parent else parent and parent.child(embedding.name)
        if not parent or not sibling or sibling.parent is not parent or sibling.config is not embedding.config:
            return []
        if not parent.is_functional:
            before = parent.children[max(0, sibling.position - _MAX_FEEDING) : sibling.position]
            before = [earlier for earlier in before if earlier.kind not in _SHAPING]
            return before[-1:] if before and before[-1].kind in LOOKUPS else []
        return self._feeding_by_calls(where, parent, sibling)

    def _feeding_by_calls(self, where: str, parent: Layer, embedding: Layer) -> list[Layer]:
        lookups, queue, seen = dict[str, Layer](), [embedding], set[str]()
        while queue:
            for source in queue.pop().sources:
                if source in seen:
                    continue
                seen.add(source)
                if len(seen) > _MAX_FEEDING:
                    raise UnsupportedModelError(
                        f"{where} is fed by more than {_MAX_FEEDING} layers before there is a lookup"
                    )
                feeding = parent.child(source) or Layer("")
                if feeding.kind in LOOKUPS:
                    lookups[feeding.path] = feeding
                elif feeding.kind in _SHAPING:
                    queue.append(feeding)
                else:
                    raise UnsupportedModelError(
                        f"{where} is fed by {feeding.kind or 'something'} {source!r}, not by a lookup: its rows have "
                        "no ids in the file; name them with --ids TOWER=PATH (text, JSON, .npy, CSV or Parquet), or "
                        "--ids TOWER=rows if the ids are the numbers of the rows"
                    )
        return list(lookups.values())


def _is_text(layer: Layer) -> bool:
    """Whether a layer is a TextVectorization, or its lookup: words are not ids."""
    return layer.kind == TEXT or layer.path.rsplit("/", 1)[-1] == "_lookup_layer"
