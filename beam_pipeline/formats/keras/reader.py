"""`.keras` files of Keras 3 and 2: finds a tower's lookup and embedding without building a Keras object.

The file is a zip of uncompressed members: `config.json`, the model as a tree of layers; `model.weights.h5`, an HDF5
file whose datasets are the variables; and `assets/<path>/vocabulary.txt` for lookups whose ids were learnt by
`adapt()` or read from a file. Ids that were given as a list are in the lookup's config.

Paths in the HDF5 file and below `assets/` are made by Keras's saver (keras/src/saving/saving_lib.py, `_save_state`):
attribute by attribute in alphabetical order, each object where it is met first. A Functional or Sequential model
has its layers below `layers/`, each named after its class: `embedding`, `embedding_1`, … in the order of the config.
A subclassed model has its layers under their attributes' names, as long as these come before "layers" in the alphabet;
the others are met in the property `layers` before, and their attributes' names are nowhere in the file. Keras 2
(tf_keras/src/saving/saving_lib.py) does the same in the reverse order.
"""

from __future__ import annotations

import json
import re
import zlib
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from beam_pipeline.errors import (
    ChecksumError,
    CorruptFileError,
    NotAModelError,
    TowerMissingError,
    UnsupportedModelError,
)
from beam_pipeline.files import OpenFile
from beam_pipeline.formats import encodings
from beam_pipeline.formats.keras.calls import Calls
from beam_pipeline.formats.keras.container import CONFIG, METADATA, WEIGHTS, Member, Weights, joined, read_directory
from beam_pipeline.formats.model import Checksum, Encoding, Ending, Matrix, Tail, Tower, Vocabulary, special_names
from beam_pipeline.formats.protobuf import Span
from beam_pipeline.formats.tails import Steps, Trace, rivals, tail

_MAX_CONFIG = 8 << 20
"""Bytes of config.json apart from the ids in it; parsed they take up to 25 times that."""
_MAX_LISTS = 10_000
"""Vocabularies in config.json."""
_MAX_NESTING = 200
"""Levels of config.json: a model inside of a model is five. What recurses over it stays below Python's limit."""
_MAX_STEPS = 300_000
"""Objects that are met while towers are looked for: a few seconds, though each layer may share all the others."""
_MAX_FEEDING = 100
"""Layers between an embedding and its lookup."""
_MAX_OOV = 100_000
"""Lines at the start of a vocabulary that may stand for unknown ids."""
_MAX_NAMED = 8
_BLOCK, _SLICE = 4 << 20, 4 << 10

_LIST = re.compile(rb'"vocabulary"\s{0,8}:\s{0,8}\[')
_LONGEST_LIST_HEAD = 64
_LOOKUPS = ("StringLookup", "IntegerLookup")
_EMBEDDING, _TEXT = "Embedding", "TextVectorization"  # The latter stores a vocabulary.txt, too: of words.
_MATRICES = ("Dense", "EinsumDense")
"""Layers whose only weights may be a matrix that is no embedding."""
_DTYPES = {"<f4": "float32", "<f8": "float64", "<f2": "float16", "|V2": "bfloat16"}  # h5py has no name for the last.
_SHAPING = ("Flatten", "Reshape", "Identity", "Cast", "Squeeze", "ExpandDims")
"""Layers and operations that may stand between a lookup and its embedding: they leave row numbers as they are."""
_BESIDE = frozenset(
    {
        "activity_regularization", "dropout", "flatten", "gaussian_dropout", "gaussian_noise", "identity",
        "input_layer", "integer_lookup", "masking", "reshape", "spatial_dropout1d", "string_lookup",
    }
)  # fmt: skip
"""Layers beside an embedding that leave its rows as they are when a model serves, as their paths have them."""
_KEEP_IDS = (
    "a subclassed Keras model does not store a vocabulary given as a list; give it as a file (Keras ≥ 3.12), learn "
    "it with adapt(), or have get_config return the layer (keras.saving.serialize_keras_object); log the model again"
)


@dataclass(frozen=True)
class _Layer:
    """A layer that was saved.

    Attributes:
        path: where its state lies, in the HDF5 file and below `assets/`.
        config: its entry in config.json, if it has one.
    """

    path: str
    config: Mapping[str, Any] | None = None

    @property
    def kind(self) -> str:
        """Name of its class, "" if that is unknown."""
        return str((self.config or {}).get("class_name", ""))

    @property
    def settings(self) -> Mapping[str, Any]:
        """The config proper."""
        settings = (self.config or {}).get("config")
        return settings if isinstance(settings, dict) else {}

    @property
    def name(self) -> str:
        """Its name, "" if that is unknown."""
        return str(self.settings.get("name", ""))


class KerasFile:
    """A `.keras` file.

    Attributes:
        path: where it lies.
    """

    def __init__(self, path: str, open_file: OpenFile, layers: Iterable[str] = ()) -> None:
        """Reads the zip's directory, config.json and the names in the HDF5 file.

        Args:
            path: local or `gs://`.
            open_file: opens it.
            layers: all layers that `tower` will be asked for. In a subclassed model the last one that is not found
                by its name can only be the tower that is left.

        Raises:
            NotAModelError: it is no `.keras` file.
            UnsupportedModelError: it is packed in another way.
            CorruptFileError: it contradicts its format.
        """
        self.path = path
        self._asked = frozenset(layers)
        self._file = open_file(path)
        try:
            self._members = read_directory(self._file)
            for name in (CONFIG, WEIGHTS):
                if name not in self._members:
                    raise NotAModelError(f"{path} has no {name}: not a model that Keras saved with model.save()")
            self._reverse = self._is_of_keras_2()
            config, self._lists = self._read_config()
            self._root = _Layer("", config)
            self._weights = Weights(self._file, self._members[WEIGHTS].span)
            for name in self._members:
                if name.startswith("assets/"):
                    self._weights.add_group(name.removeprefix("assets/").removesuffix("/vocabulary.txt"))
            self._first_paths: dict[int, str] = {}
            self._paths: dict[int, str] = {}  # by the id of a layer's config
            self._numbers: dict[str, int] = {}
            # By the ids of configs: of the parent, of the parent, of the layer itself, of the layer itself.
            self._inside: dict[int, list[_Layer]] = {}
            self._named: dict[int, dict[str, _Layer | None]] = {}
            self._positions: dict[int, int] = {}
            self._fed_by: dict[int, list[str]] = {}
            self._roles: dict[tuple[str, int], str] = {}
            self._steps = 0
            if _is_graph(self._root):
                self._read_layers(self._root)
            self._by_name = _serialized_layers(config)
        except BaseException:
            self._file.close()
            raise

    def tower(self, name: str, layer: str, *, include_oov: bool = False) -> Tower:
        """Returns the tower that `layer` holds: an embedding that is fed by a lookup, or a layer with one of each.

        In a Functional or Sequential model `layer` is a layer's name, or names joined by dots for a layer inside of
        another. In a subclassed model it is an attribute path, a layer's name or a path in `model.weights.h5`.

        Raises:
            TowerMissingError: no such layer, or it does not hold one lookup and one embedding.
            UnsupportedModelError: it holds them in a form that cannot be read.
            CorruptFileError: the file contradicts itself.
        """
        _, lookup, embedding = self._parts_of_tower(name, layer)
        return Tower(name, layer, self._matrix(embedding), self._vocabulary(lookup, include_oov=include_oov))

    def matrix(self, name: str, layer: str) -> Matrix:
        """Returns the embedding of a layer that has no lookup: its ids are elsewhere.

        Raises:
            TowerMissingError: no such layer, or it holds a lookup, or not one embedding.
            UnsupportedModelError, CorruptFileError: as `tower`.
        """
        return self._matrix(self._without_lookup(name, layer)[1])

    def _without_lookup(self, name: str, layer: str) -> tuple[_Layer, _Layer]:
        """Returns a layer that holds an embedding and no lookup, and the embedding."""
        found = self._find(layer)
        lookups, embeddings = self._parts(found) if found else ([], [])
        where = f"tower {name!r}: layer {layer!r} in {self.path}"
        if found and len(embeddings) == 1 and not lookups:
            lookups = self._known_feeding(layer, found, embeddings[0])
        if lookups:
            raise TowerMissingError(f"{where} has a lookup that holds its ids; leave out --ids {name}=…")
        if not found or len(embeddings) != 1:
            problem = f"holds {len(embeddings)} embeddings" if found else "does not exist"
            there = ", ".join(self.embeddings_without_ids()) or "none"
            raise TowerMissingError(f"{where} {problem}; embeddings without ids: {there}; choose with --tower {name}=")
        return found, embeddings[0]

    def _known_feeding(self, layer: str, found: _Layer, embedding: _Layer) -> list[_Layer]:
        """Returns the lookups that feed an embedding, as far as the file says."""
        try:
            return self._feeding(layer, found, embedding)
        except UnsupportedModelError:
            return []

    def embeddings_without_ids(self) -> list[str]:
        """Returns what could be given as `layer` to `matrix`: the names of embeddings that no lookup feeds."""
        if not _is_graph(self._root):
            towers = self._tower_paths()
            paths = (
                path for path in self._weights.groups if self._role(self._described(path)) in ("embedding", "table")
            )
            return sorted(path for path in paths if not any(path.startswith(f"{one}/") for one in towers))
        return sorted(".".join(names) for names in self._bare_names(self._root, ()))

    def _bare_names(self, parent: _Layer, names: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        for child in self._children(parent):
            own = (*names, child.name)
            if child.kind == _EMBEDDING and not self._known_feeding(".".join(own), child, child):
                yield own
            elif _is_graph(child) and not self._parts(child)[0]:
                yield from self._bare_names(child, own)

    def _parts_of_tower(self, name: str, layer: str) -> tuple[_Layer, _Layer, _Layer]:
        """Returns a tower's layer, its lookup and its embedding."""
        found = self._find(layer)
        lookups, embeddings = self._parts(found) if found else ([], [])
        if found and not lookups and any(self._is_text(each) for each in self._below(found)):
            raise UnsupportedModelError(
                f"tower {name!r}: the lookup of layer {layer!r} in {self.path} looks up the words of a text: they are "
                f"not ids; layers that are towers: {', '.join(self.tower_layers()) or 'none'}; choose with "
                f"--tower {name}=LAYER"
            )
        if found and not lookups and len(embeddings) == 1:
            lookups = self._feeding(layer, found, embeddings[0])
        if not found or len(lookups) != 1 or len(embeddings) != 1:
            problem = (
                f"holds {len(lookups)} lookup(s) and {len(embeddings)} embedding(s) instead of one of each"
                if found
                else "does not exist"
            )
            raise TowerMissingError(
                f"tower {name!r}: layer {layer!r} {problem} in {self.path}; layers that are towers: "
                f"{', '.join(self.tower_layers()) or 'none'}; choose with --tower {name}=LAYER{self._missing(name)}"
            )
        return found, lookups[0], embeddings[0]

    def _missing(self, name: str) -> str:
        missing = ", ".join(self.embeddings_without_ids())
        return f"; embeddings without ids: {missing} (name their ids with --ids {name}=PATH)" if missing else ""

    def tails(self, layers: Mapping[str, str], without_lookup: Collection[str] = ()) -> dict[str, Tail]:
        """Returns how towers go on after their embeddings, until they meet each other or are returned.

        The code of a subclassed model is not in the file: of that only the layers inside of a tower can be seen.

        Args:
            layers: of all towers that are published together: name → layer, as `tower` takes them.
            without_lookup: names of those towers whose layers are as `matrix` takes them.

        Raises:
            TowerMissingError: there is no such tower.
        """
        found: dict[str, tuple[_Layer, _Layer]] = {}
        for name, layer in layers.items():
            if name in without_lookup:
                found[name] = self._without_lookup(name, layer)
            else:
                holder, _, embedding = self._parts_of_tower(name, layer)
                found[name] = holder, embedding
        numbers = {name: self._number(embedding.path) for name, (_, embedding) in found.items()}
        inside = {
            name: {self._number(each.path) for each in self._parts(holder)[1]} for name, (holder, _) in found.items()
        }
        is_graph = _is_graph(self._root)
        calls = Calls(self._number_of, self._number_of)
        trace = Trace(
            calls.function,
            {number: self._weights.width(path) for path, number in self._numbers.items()},
            rivals([(numbers[name], inside[name]) for name in layers]),
            Steps(self.path, _MAX_STEPS),
        )
        of_model = [[trace.returned(calls.add(self._root.config or {}), [])]] if is_graph else []
        tails = {}
        for name, (holder, embedding) in found.items():
            config = holder.config if is_graph else self._holding(embedding.name)
            own = [[trace.returned(calls.add(config), [])]] if config and _is_graph(_Layer("", config)) else []
            tails[name] = tail(numbers[name], of_model, own, trace.meetings)
            if not is_graph and tails[name].ending != Ending.GOES_ON:
                tails[name] = self._tail_by_layers(holder, tails[name], layers[name])
        return tails

    def _holding(self, embedding: str) -> Mapping[str, Any] | None:
        """Returns the config of the outermost Functional or Sequential model that holds an embedding of that name."""
        queue, wanted = deque[Any]([self._root.config]), self._by_name.get(embedding)
        while queue and wanted is not None:
            one = queue.popleft()
            if isinstance(one, dict):
                if _is_graph(_Layer("", one)) and any(each is wanted for each in _everything(one)):
                    return one
                queue += one.values()
            elif isinstance(one, list):
                queue += one
        return None

    def _tail_by_layers(self, holder: _Layer, seen: Tail, asked: str) -> Tail:
        """Returns what the layers beside the embedding of a subclassed model's tower say of its tail."""
        operations, scales = [], False
        for path in self._weights.below(holder.path):
            layer = self._described(path)
            last = path.rsplit("/", 1)[-1]
            noted = self._weights.groups.get(path, "")
            kind = re.sub(r"_\d+$", "", last if path.endswith(f"layers/{last}") else noted)
            if self._role(layer) or last == "layers" or kind in _BESIDE:
                continue
            if kind == "unit_normalization":
                scales = True
            elif self._weights.count(path) or path.endswith(f"layers/{last}"):
                operations.append((noted or last, "weights" if self._weights.count(path) else "layer"))
        if operations:
            return Tail(Ending.GOES_ON, tuple(operations))
        reason = "the model is subclassed, and the code of its call is not in the file"
        if others := self._weighty_layers():
            reason += f", which has layers with weights beside its towers: {', '.join(others)}"
        if holder.path != asked.replace(".", "/"):
            reason += f"; {asked!r} is taken to be {holder.path}"
        if scales or seen.ending == Ending.SCALED:
            return Tail(Ending.SCALED, seen.operations or (("unit_normalization", "L2"),), reason=reason)
        return Tail(Ending.UNKNOWN, reason=reason)

    def _weighty_layers(self) -> list[str]:
        """Returns some of the layers that have weights and are in no tower."""
        towers = self._tower_paths()
        paths = (path for path in self._weights.groups if path and self._weights.count(path))
        outside = [path for path in paths if not any(path == one or path.startswith(f"{one}/") for one in towers)]
        return [self._weights.groups[path] or path for path in outside][:_MAX_NAMED]

    def tower_layers(self) -> list[str]:
        """Returns all layers that are towers, outermost ones only."""
        return sorted(self._tower_paths())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    # config.json.

    def _is_of_keras_2(self) -> bool:
        member = self._members.get(METADATA, Member(Span(0, 0), 0))
        text = self._file.read(member.span.start, min(member.span.end - member.span.start, _SLICE))
        return re.search(rb'"keras_version"\s{0,8}:\s{0,8}"[12]\.', text) is not None

    def _read_config(self) -> tuple[Mapping[str, Any], list[Span | None]]:
        """Returns config.json with each list of ids replaced by its number, and where these lists are.

        A list is None if its elements are not plain strings or numbers.
        """
        member = self._members[CONFIG]
        text, searched, crc, lists = bytearray(), 0, 0, list[Span | None]()
        start: int | None = None  # of the list that is being skipped
        plain, scanner, width = True, encodings.JsonScanner(), _SLICE
        for offset, block in self._file.blocks(member.span.start, member.span.end, _BLOCK):
            crc, at = zlib.crc32(block, crc), 0
            while at < len(block):
                if start is None:
                    before = len(text)
                    text += block[at : at + _SLICE]
                    head = _LIST.search(text, searched)
                    if head:
                        at += head.end() - before
                        start, plain, scanner, width = offset + at, True, encodings.JsonScanner(), _SLICE
                        del text[head.end() - 1 :]
                    else:
                        at, searched = at + len(text) - before, max(searched, len(text) - _LONGEST_LIST_HEAD)
                    if len(text) > _MAX_CONFIG:
                        raise UnsupportedModelError(
                            f"{self.path}: config.json has more than {_MAX_CONFIG:,} bytes besides the vocabularies of "
                            "its lookups; give the model its ids as files or through lookups, not as arguments"
                        )
                else:
                    part = block[at : at + width]
                    marks = scanner.outside(part, b"[]{}")
                    end = next((int(mark) for mark in marks if part[mark] == ord("]")), None)
                    plain = plain and (not marks.size or marks[0] == end)
                    at, width = at + (len(part) if end is None else end), 2 * width
                    if end is not None:
                        if len(lists) == _MAX_LISTS:
                            raise UnsupportedModelError(
                                f"{self.path}: config.json has more than {_MAX_LISTS:,} vocabularies; split the model"
                            )
                        lists.append(Span(start, offset + at) if plain else None)
                        text += b"%d" % (len(lists) - 1)
                        start, searched, at = None, len(text), at + 1
        if crc != member.crc:
            raise ChecksumError(
                f"{self.path}: config.json does not match its CRC-32; the file is damaged, log it again"
            )
        try:
            config = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CorruptFileError(f"{self.path}: config.json is no JSON ({error}); log the model again") from error
        if start is not None or not isinstance(config, dict):
            raise CorruptFileError(f"{self.path}: config.json describes no model; log the model again")
        if _is_deeper(config, _MAX_NESTING):
            raise CorruptFileError(
                f"{self.path}: config.json is nested more than {_MAX_NESTING} levels deep; log the model again"
            )
        return config, lists

    def _read_layers(self, parent: _Layer) -> None:
        """Notes the layers of a Functional or Sequential model, in the order in which Keras saves them."""
        used: dict[str, int] = {}
        children = self._inside.setdefault(id(parent.config), [])
        for entry in _entries(parent):
            base = _snake_case(str(entry.get("class_name")))
            used[base] = used.get(base, -1) + 1
            path = joined(parent.path, "layers", f"{base}_{used[base]}" if used[base] else base)
            # What is used twice is saved where it is met first.
            shared = entry.get("shared_object_id")
            layer = _Layer(self._first_paths.setdefault(shared, path) if isinstance(shared, int) else path, entry)
            self._positions[id(entry)] = len(children)
            self._paths[id(entry)] = layer.path
            children.append(layer)
            named = self._named.setdefault(id(parent.config), {})
            named[layer.name] = None if layer.name in named else layer
            if _is_graph(layer):
                self._read_layers(layer)

    # Towers.

    def _find(self, layer: str) -> _Layer | None:
        names = layer.replace("/", ".").split(".")
        if _is_graph(self._root):
            return self._find_by_names(names)
        path = "/".join(names)
        if path in self._weights.groups:
            return self._described(path)
        return self._find_by_name(layer) or self._find_left(layer)

    def _find_by_names(self, names: Sequence[str]) -> _Layer | None:
        found = self._root
        for name in names:
            child = self._child(found, name)
            if child is None:
                return None
            found = child
        return found

    def _find_by_name(self, layer: str) -> _Layer | None:
        """Returns the only layer with this name, or with the name of what the model's config has as `layer`."""
        attribute = self._root.settings.get(layer)
        names = {layer}
        if isinstance(attribute, dict) and isinstance(attribute.get("config"), dict):
            names.add(str(attribute["config"].get("name")))
        paths = [path for path, name in self._weights.groups.items() if name in names]
        return self._described(paths[0]) if len(paths) == 1 else None

    def _find_left(self, layer: str) -> _Layer | None:
        """Returns the tower that is left when all other layers that are asked for were found."""
        missing = {
            asked for asked in self._asked if "/".join(asked.split(".")) not in self._weights.groups
            and self._find_by_name(asked) is None
        }  # fmt: skip
        found = [self._find(asked) for asked in self._asked - missing]
        claimed = {one.path for one in found if one}
        left = [path for path in self._tower_paths() if path not in claimed]
        is_attribute = re.fullmatch(r"\w+", layer) and not layer.startswith("_") and layer != "layers"
        met_after = (layer > "layers") is not self._reverse
        if missing == {layer} and is_attribute and met_after and len(left) == 1 and left[0].startswith("layers/"):
            return self._described(left[0])
        return None

    def _number(self, path: str) -> int:
        """Returns the number by which a layer is followed through calls."""
        return self._numbers.setdefault(path, len(self._numbers))

    def _number_of(self, config: Mapping[str, Any]) -> int:
        """Returns the same by a layer's config; one that is serialized elsewhere is known by its name alone."""
        layer = _Layer("", config)
        if id(config) in self._paths:
            return self._number(self._paths[id(config)])
        return self._number(
            next((path for path, name in self._weights.groups.items() if name == layer.name), layer.name)
        )

    def _described(self, path: str) -> _Layer:
        """Returns what lies at a path in the HDF5 file, with its config if config.json has a layer of that name."""
        return _Layer(path, self._by_name.get(self._weights.groups.get(path, "")))

    def _children(self, layer: _Layer) -> list[_Layer]:
        """Returns the layers directly inside of a layer of a Functional or Sequential model."""
        return self._inside.get(id(layer.config), [])

    def _child(self, layer: _Layer, name: str) -> _Layer | None:
        """Returns the only layer of that name directly inside of a layer of a Functional or Sequential model."""
        return self._named.get(id(layer.config), {}).get(name)

    def _below(self, layer: _Layer) -> Iterator[_Layer]:
        """Yields a layer and all layers inside of it."""
        self._steps += 1
        if self._steps > _MAX_STEPS:
            raise CorruptFileError(f"{self.path}: its layers share each other too often; log the model again")
        yield layer
        if layer.kind == _TEXT:  # Its words are in a lookup of its own.
            return
        if _is_graph(layer):
            for child in self._children(layer):
                yield from self._below(child)
        else:
            for path in self._weights.below(layer.path):
                self._steps += 1
                yield self._described(path)

    def _parts(self, layer: _Layer) -> tuple[list[_Layer], list[_Layer]]:
        """Returns the lookups and the embeddings that a layer is or holds."""
        parts: dict[str, dict[str, _Layer]] = {kind: {} for kind in ("lookup", "embedding", "table", "")}
        for below in self._below(layer):
            parts[self._role(below)][below.path] = below
        return list(parts["lookup"].values()), list((parts["embedding"] or parts["table"]).values())

    def _role(self, layer: _Layer) -> str:
        """Returns "lookup", "embedding", "table" for what may be an embedding, or ""."""
        key = layer.path, id(layer.config)
        if key not in self._roles:
            self._roles[key] = self._find_role(layer)
        return self._roles[key]

    def _is_text(self, layer: _Layer) -> bool:
        """Whether a layer is a TextVectorization, or its lookup: words are not ids."""
        return layer.kind == _TEXT or layer.path.rsplit("/", 1)[-1] == "_lookup_layer"

    def _find_role(self, layer: _Layer) -> str:
        """Returns the role of a layer.

        Without a config, its class shows in its path, unless that has an attribute's name, or in the layer's name.
        """
        if self._is_text(layer):
            return ""
        if layer.kind:
            kinds = [layer.kind]
        else:
            names = (layer.path.rsplit("/", 1)[-1], self._weights.groups.get(layer.path, ""))
            bases = [re.sub(r"_\d+$", "", name) for name in names]
            kinds = [kind for kind in (*_LOOKUPS, _EMBEDDING, _TEXT, *_MATRICES) if _snake_case(kind) in bases]
        if any(kind in _LOOKUPS for kind in kinds):
            return "lookup"
        if _EMBEDDING in kinds:
            return "embedding"
        if kinds:
            return ""
        if self._asset(layer):
            return "lookup"
        return "table" if self._weights.is_table(layer.path) else ""

    def _tower_paths(self) -> list[str]:
        """Returns the outermost layers with one lookup and one embedding, as `tower` takes them."""
        if _is_graph(self._root):
            return [".".join(names) for names in self._tower_names(self._root, ())]
        counts: dict[str, Counter[str]] = {}
        for path in self._weights.groups:
            role = self._role(self._described(path))
            names = path.split("/") if role else []
            for depth in range(1, len(names)):
                counts.setdefault("/".join(names[:depth]), Counter())[role] += 1
        found: dict[str, None] = {}
        for path, count in sorted(counts.items(), key=lambda item: item[0].count("/")):
            one_of_each = count["lookup"] == (count["embedding"] or count["table"]) == 1
            is_container = path.rsplit("/", 1)[-1] == "layers"
            outer = (path[: slash.start()] for slash in re.finditer("/", path))
            if one_of_each and not is_container and not any(one in found for one in outer):
                found[path] = None
        return list(found)

    def _tower_names(self, parent: _Layer, names: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        for child in self._children(parent):
            lookups, embeddings = self._parts(child)
            own = (*names, child.name)
            if child.kind == _EMBEDDING:
                try:
                    lookups = self._feeding(".".join(own), child, child)
                except UnsupportedModelError:
                    lookups = []
            if len(lookups) == len(embeddings) == 1:
                yield own
            elif lookups and embeddings:
                yield from self._tower_names(child, own)

    def _feeding(self, layer: str, found: _Layer, embedding: _Layer) -> list[_Layer]:
        """Returns the lookups that feed an embedding of a Functional or Sequential model."""
        where = f"{self.path}: embedding {layer!r}"
        if not _is_graph(self._root) and found.path != embedding.path:
            raise UnsupportedModelError(f"{where}: the ids of a lookup beside it are not in the file: {_KEEP_IDS}")
        if not _is_graph(self._root):
            raise UnsupportedModelError(
                f"{where}: a subclassed Keras model does not say which lookup feeds it; put the two into one layer "
                "(keras.Sequential([lookup, embedding])), name that, and log the model again; if it has none, name its "
                "ids with --ids TOWER=PATH"
            )
        parent = self._find_by_names(layer.replace("/", ".").split(".")[:-1])
        siblings = self._children(parent) if parent else []
        at = self._positions.get(id(embedding.config), len(siblings))
        if parent is None or at >= len(siblings) or siblings[at].config is not embedding.config:
            return []
        if not _is_functional(parent):
            before = [sibling for sibling in siblings[max(0, at - _MAX_FEEDING) : at] if sibling.kind not in _SHAPING]
            return before[-1:] if before and before[-1].kind in _LOOKUPS else []
        lookups, queue, seen = dict[str, _Layer](), [embedding], set[str]()
        while queue:
            for source in self._sources(queue.pop()):
                if source in seen:
                    continue
                seen.add(source)
                if len(seen) > _MAX_FEEDING:
                    raise UnsupportedModelError(
                        f"{where} is fed by more than {_MAX_FEEDING} layers before there is a lookup"
                    )
                feeding = self._child(parent, source) or _Layer("")
                if feeding.kind in _LOOKUPS:
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

    def _sources(self, layer: _Layer) -> list[str]:
        """Returns the names of the layers that feed a layer of a Functional model."""
        config = layer.config or {}
        if id(config) not in self._fed_by:
            self._fed_by[id(config)] = list(dict.fromkeys(_sources(config.get("inbound_nodes"))))
        return self._fed_by[id(config)]

    # The embedding matrix.

    def _matrix(self, embedding: _Layer) -> Matrix:
        where = f"{self.path}: embedding {embedding.path!r}"
        noted = self._weights.groups.get(embedding.path)
        if noted and embedding.config and noted != embedding.name:
            raise CorruptFileError(f"{where} is called {noted!r} in {WEIGHTS}, {embedding.name!r} in {CONFIG}")
        dtype = embedding.settings.get("dtype")
        policy = str(dtype.get("class_name", "")) if isinstance(dtype, dict) else ""
        if "Quantized" in policy or self._weights.count(embedding.path) > 1:
            raise UnsupportedModelError(f"{where} is quantized; save the model before quantize()")
        offset, shape, stored = self._weights.dataset(f"{embedding.path}/vars/0", where)
        if stored not in _DTYPES:
            raise UnsupportedModelError(f"{where} has values of type {stored}, not one of the float types")
        if len(shape) != 2 or not all(shape):
            raise UnsupportedModelError(f"{where} has shape {list(shape)}, not [rows, dimension]")
        member = self._members[WEIGHTS]
        checksum = Checksum("crc32", member.crc, member.span)
        matrix = Matrix(self.path, member.span.start + offset, *shape, _DTYPES[stored], checksum)
        if matrix.offset < member.span.start or matrix.span.end > member.span.end:
            raise CorruptFileError(
                f"{where} has shape {list(shape)} and begins at byte {offset:,} of {WEIGHTS}, which has only "
                f"{member.span.end - member.span.start:,}: the file is damaged, log the model again"
            )
        return matrix

    # The ids.

    def _asset(self, lookup: _Layer) -> Member | None:
        return self._members.get(f"assets/{lookup.path}/vocabulary.txt")

    def _vocabulary(self, lookup: _Layer, *, include_oov: bool) -> Vocabulary:
        where = f"{self.path}: lookup {lookup.path!r}"
        asset, given = self._asset(lookup), lookup.settings.get("vocabulary")
        if lookup.settings.get("invert") or lookup.settings.get("output_mode", "int") != "int":
            raise UnsupportedModelError(
                f"{where} does not turn ids into row numbers (invert, or output_mode other than 'int')"
            )
        if asset and given is None:
            checksum = Checksum("crc32", asset.crc, asset.span)
            vocabulary = Vocabulary(self.path, asset.span, Encoding.LINES, 0, checksum=checksum)
        elif type(given) is int and 0 <= given < len(self._lists):
            span = self._lists[given]
            if span is None:
                raise UnsupportedModelError(
                    f"{where} has ids of bytes, which Keras itself cannot load; make them strings"
                )
            vocabulary = Vocabulary(self.path, span, Encoding.JSON, 0)
        elif isinstance(given, str):
            raise UnsupportedModelError(
                f"{where} was given the file {given!r}, which Keras < 3.12 does not store; use set_vocabulary(file) or "
                "another Keras, and log the model again"
            )
        elif lookup.config:
            raise UnsupportedModelError(f"{where} has no ids: it was given none before the model was saved")
        else:
            raise UnsupportedModelError(
                f"{self.path}: the ids of lookup {lookup.path!r} are not in the file: {_KEEP_IDS}"
            )
        special, names = self._special_rows(lookup, vocabulary, where)
        size = lookup.settings.get("vocabulary_size")
        size = size if type(size) is int and abs(size) < 1 << 62 else None
        head, end = encodings.first(self._file, vocabulary, len(special)) if special else ([], vocabulary.span.start)
        # As Keras does: the special tokens may stand at the start of a list, and stand at the start of a file.
        if head == special:
            vocabulary = replace(vocabulary, span=Span(end, vocabulary.span.end))
        return replace(
            vocabulary,
            first_row=len(special),
            count=None if size is None else size - len(special),
            special_tokens=tuple(names) if include_oov else (),
        )

    def _special_rows(self, lookup: _Layer, vocabulary: Vocabulary, where: str) -> tuple[list[str], list[str]]:
        """Returns what stands for the rows before the first id, in the file, and names for them that are all distinct.

        The mask token comes first, then one row per out-of-vocabulary bucket.
        """
        if lookup.config:
            settings = lookup.settings
            mask, oov, buckets = settings.get("mask_token"), settings.get("oov_token"), settings.get("num_oov_indices")
            names = special_names(where, mask, oov, buckets)
            tokens = [] if mask is None else [str(mask)]
        else:
            # Without its config the file itself has to tell: it holds the special tokens, and no id is one of them.
            oov = "-1" if "integer_lookup" in f"{lookup.path} {self._weights.groups.get(lookup.path)}" else "[UNK]"
            head, _ = encodings.first(self._file, vocabulary, _MAX_OOV)
            tokens = head[: head[:2].index(oov)] if oov in head[:2] else []
            buckets = next((i for i, token in enumerate(head[len(tokens) :]) if token != oov), len(head) - len(tokens))
            if not buckets:
                raise UnsupportedModelError(
                    f"{where} does not say which rows stand for unknown ids (no {oov} in its first two lines); have "
                    " get_config return the layer (keras.saving.serialize_keras_object) and log the model again"
                )
            names = special_names(where, tokens[0] if tokens else None, oov, buckets)
        return [*tokens, *[str(oov)] * (len(names) - len(tokens))], names


def _is_graph(layer: _Layer) -> bool:
    """Whether the config has all layers of a model: it is Functional or Sequential."""
    return isinstance(layer.settings.get("layers"), list)


def _is_deeper(config: Any, levels: int) -> bool:
    """Whether something of JSON is nested more than so many levels deep."""
    level = [config]
    for _ in range(levels):
        lists_and_dicts = [one for one in level if isinstance(one, dict | list)]
        level = [child for one in lists_and_dicts for child in (one.values() if isinstance(one, dict) else one)]
    return bool(level)


def _everything(config: Any) -> Iterator[Any]:
    """Yields all dicts of a config."""
    queue = [config]
    while queue:
        one = queue.pop()
        if isinstance(one, dict):
            yield one
            queue += one.values()
        elif isinstance(one, list):
            queue += one


def _is_functional(layer: _Layer) -> bool:
    return "input_layers" in layer.settings


def _entries(layer: _Layer) -> list[Mapping[str, Any]]:
    """Returns the configs of a Functional or Sequential model's layers that Keras saves."""
    entries: list[Mapping[str, Any]] = [entry for entry in layer.settings["layers"] if isinstance(entry, dict)]
    if entries and not _is_functional(layer) and entries[0].get("class_name") == "InputLayer":
        return entries[1:]  # `Sequential.layers` leaves it out.
    return entries


def _sources(nodes: Any) -> list[str]:
    """Returns the names of the layers whose outputs are inputs of an entry's `inbound_nodes`.

    Keras 3 has a `__keras_tensor__` with its `keras_history` for each, Keras 2 a list: name, two numbers, arguments.
    """
    found, queue = [], [nodes]
    while queue:
        one = queue.pop()
        if isinstance(one, list) and len(one) > 2 and isinstance(one[0], str) and type(one[1]) is type(one[2]) is int:
            found.append(one[0])
            queue += one[3:]
        elif isinstance(one, list):
            queue += one
        elif isinstance(one, dict):
            history = one["config"].get("keras_history") if isinstance(one.get("config"), dict) else None
            if isinstance(history, list) and history:
                found.append(str(history[0]))
            else:
                queue += one.values()
    return found


def _serialized_layers(config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Returns the lookups and embeddings anywhere in a config by name, without names that are there twice."""
    found: dict[str, Mapping[str, Any]] = {}
    twice, queue = set(), list[Any]([config])
    while queue:
        one = queue.pop()
        if isinstance(one, list):
            queue += one
        elif isinstance(one, dict):
            layer = _Layer("", one)
            if layer.kind in (*_LOOKUPS, _EMBEDDING) and layer.name:
                twice |= {layer.name} & found.keys()
                found[layer.name] = one
            queue += one.values()
    return {name: entry for name, entry in found.items() if name not in twice}


def _snake_case(name: str) -> str:
    """As keras/src/utils/naming.py has it."""
    name = re.sub(r"\W+", "", name)
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()
