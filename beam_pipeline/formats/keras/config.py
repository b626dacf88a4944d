"""`config.json` of a `.keras` file: a model as a tree of layers, read without the ids that lookups have in it.

Paths in the HDF5 file and below `assets/` are created by Keras's saver (keras/src/saving/saving_lib.py, `_save_state`):
attribute by attribute in alphabetical order, each object where it is met first. A Functional or Sequential model has
its layers below `layers/`, each named after its class: `embedding`, `embedding_1`, … in the order of the config.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from beam_pipeline.errors import ChecksumError, CorruptFileError, UnsupportedModelError
from beam_pipeline.files import ByteFile
from beam_pipeline.formats import encodings
from beam_pipeline.formats.keras.archive import Member
from beam_pipeline.formats.protobuf import Span

_MAX_CONFIG = 8 << 20
"""Bytes of config.json apart from the ids in it; parsed they take up to 25 times that."""
_MAX_LISTS = 10_000
"""Vocabularies in config.json."""
_MAX_NESTING = 200
"""Levels of config.json: a model inside of a model is five. What recurses over it stays below Python's limit."""
_BLOCK, _SLICE = 4 << 20, 4 << 10

_LIST = re.compile(rb'"vocabulary"\s{0,8}:\s{0,8}\[')
_LONGEST_LIST_HEAD = 64

LOOKUPS = ("StringLookup", "IntegerLookup")
EMBEDDING, TEXT = "Embedding", "TextVectorization"  # The latter stores a vocabulary.txt, too: of words.
INDEXES = ("BruteForce", "BruteForceRetrieval")
"""Search indexes that compare a vector with all candidates, by dot product."""

Config = Mapping[str, Any]
"""An object of config.json."""


@dataclass(eq=False, slots=True)
class Layer:
    """A layer that was saved; another one of the same content is another layer.

    Attributes:
        path: where its state is, in the HDF5 file and below `assets/`; "" for the model itself.
        config: its entry in config.json, empty if it has none.
        parent: the Functional or Sequential model that it is directly inside of, if there is one.
        children: the layers directly inside of a Functional or Sequential model, in the order in which Keras saves
            them.
        position: its place among its parent's children.
    """

    path: str
    config: Config = field(default_factory=dict)
    parent: Layer | None = None
    children: Sequence[Layer] = ()
    position: int = 0
    _named: Mapping[str, Layer | None] | None = None
    _sources: Sequence[str] | None = None

    @property
    def kind(self) -> str:
        """Name of its class, "" if that is unknown."""
        return str(self.config.get("class_name", ""))

    @property
    def settings(self) -> Config:
        """The config proper."""
        settings = self.config.get("config")
        return settings if isinstance(settings, dict) else {}

    @property
    def name(self) -> str:
        """Its name, "" if that is unknown."""
        return str(self.settings.get("name", ""))

    @property
    def is_graph(self) -> bool:
        """Whether its config has all layers of a model: it is Functional or Sequential."""
        return isinstance(self.settings.get("layers"), list)

    @property
    def is_functional(self) -> bool:
        """Whether it is a Functional model, given `is_graph`."""
        return "input_layers" in self.settings

    @property
    def sources(self) -> Sequence[str]:
        """Names of the layers that feed it in a Functional model."""
        if self._sources is None:
            self._sources = [*dict.fromkeys(_source_names(self.config.get("inbound_nodes")))]
        return self._sources

    def child(self, name: str) -> Layer | None:
        """Returns the only layer of that name directly inside."""
        if self._named is None:
            named: dict[str, Layer | None] = {}
            for layer in self.children:
                named[layer.name] = None if layer.name in named else layer
            self._named = named
        return self._named.get(name)


def read_config(file: ByteFile, member: Member) -> tuple[Config, list[Span | None]]:
    """Returns config.json with each list of ids replaced by its number, and where these lists are.

    A list is None if its elements are not plain strings or numbers.

    Raises:
        ChecksumError: the bytes do not match the zip's checksum.
        CorruptFileError: it is not JSON, or does not describe a model.
        UnsupportedModelError: it is too large.
    """
    text, searched, crc, lists = bytearray(), 0, 0, list[Span | None]()
    start: int | None = None  # of the list that is being skipped
    plain, scanner, width = True, encodings.JsonScanner(), _SLICE
    for offset, block in file.blocks(member.span.start, member.span.end, _BLOCK):
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
                        f"{file.path}: config.json has more than {_MAX_CONFIG:,} bytes besides the vocabularies of "
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
                            f"{file.path}: config.json has more than {_MAX_LISTS:,} vocabularies; split the model"
                        )
                    lists.append(Span(start, offset + at) if plain else None)
                    text += b"%d" % (len(lists) - 1)
                    start, searched, at = None, len(text), at + 1
    if crc != member.crc:
        raise ChecksumError(f"{file.path}: config.json does not match its CRC-32; the file is damaged, log it again")
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{file.path}: config.json is not JSON ({error}); log the model again") from error
    if start is not None or not isinstance(config, dict):
        raise CorruptFileError(f"{file.path}: config.json describes no model; log the model again")
    if _is_deeper(config, _MAX_NESTING):
        raise CorruptFileError(
            f"{file.path}: config.json is nested more than {_MAX_NESTING} levels deep; log the model again"
        )
    return config, lists


def is_keras_2(file: ByteFile, metadata: Member | None) -> bool:
    """Returns whether Keras 2 saved the model, by the file's metadata.json."""
    if metadata is None:
        return False
    text = file.read(metadata.span.start, min(metadata.span.end - metadata.span.start, _SLICE))
    return re.search(rb'"keras_version"\s{0,8}:\s{0,8}"[12]\.', text) is not None


def read_layers(config: Config) -> Layer:
    """Returns a model, with the layers inside of it if it is Functional or Sequential."""
    root = Layer("", config)
    _add_children(root, {})
    return root


def _add_children(parent: Layer, first_paths: dict[int, str]) -> None:
    if not parent.is_graph:
        return
    used: dict[str, int] = {}
    children: list[Layer] = []
    for entry in _saved_entries(parent):
        base = snake_case(str(entry.get("class_name")))
        used[base] = used.get(base, -1) + 1
        path = joined(parent.path, "layers", f"{base}_{used[base]}" if used[base] else base)
        # What is used twice is saved where it is met first.
        shared = entry.get("shared_object_id")
        if isinstance(shared, int):
            path = first_paths.setdefault(shared, path)
        layer = Layer(path, entry, parent, position=len(children))
        children.append(layer)
        _add_children(layer, first_paths)
    parent.children = children


def _saved_entries(model: Layer) -> list[Config]:
    """Returns the entries of a Functional or Sequential model's layers that Keras saves."""
    entries: list[Config] = [entry for entry in model.settings["layers"] if isinstance(entry, dict)]
    if entries and not model.is_functional and entries[0].get("class_name") == "InputLayer":
        return entries[1:]  # `Sequential.layers` leaves it out.
    return entries


def serialized_layers(config: Config) -> dict[str, Config]:
    """Returns the lookups and embeddings anywhere in a config by name, without names that appear twice."""
    found: dict[str, Config] = {}
    twice = set()
    for entry in objects(config):
        layer = Layer("", entry)
        if layer.kind in (*LOOKUPS, EMBEDDING) and layer.name:
            twice |= {layer.name} & found.keys()
            found[layer.name] = entry
    return {name: entry for name, entry in found.items() if name not in twice}


def outermost_graph(config: Config, wanted: Config) -> Config | None:
    """Returns the outermost Functional or Sequential model in a config that holds an object of it."""
    level: list[Any] = [config]
    while level:
        for node in level:
            if isinstance(node, dict) and Layer("", node).is_graph and any(each is wanted for each in objects(node)):
                return node
        level = [child for node in level for child in _children(node)]
    return None


def objects(config: Any) -> Iterator[Config]:
    """Yields all objects of a config, itself included."""
    queue = [config]
    while queue:
        node = queue.pop()
        if isinstance(node, dict):
            yield node
        queue += _children(node)


def joined(*names: str) -> str:
    """Joins a path; the model itself has the path ""."""
    return "/".join(names[1:] if not names[0] else names)


def snake_case(name: str) -> str:
    """Returns a layer's default name by its class, as keras/src/utils/naming.py forms it."""
    name = re.sub(r"\W+", "", name)
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()


def is_reference(node: Any) -> bool:
    """Whether a list is Keras 2's way to name a tensor: layer, number of its call, number of the output."""
    return (
        isinstance(node, list) and len(node) > 2 and isinstance(node[0], str) and type(node[1]) is type(node[2]) is int
    )


def _children(node: Any) -> list[Any]:
    """Returns what a dict or a list of JSON holds."""
    if isinstance(node, dict):
        return [*node.values()]
    return node if isinstance(node, list) else []


def _is_deeper(config: Any, levels: int) -> bool:
    """Whether something of JSON is nested more than so many levels deep."""
    level = [config]
    for _ in range(levels):
        level = [child for node in level for child in _children(node)]
    return bool(level)


def _source_names(nodes: Any) -> list[str]:
    """Returns the names of the layers whose outputs are inputs of an entry's `inbound_nodes`.

    Keras 3 has a `__keras_tensor__` with its `keras_history` for each, Keras 2 a list: name, two numbers, arguments.
    """
    found, queue = [], [nodes]
    while queue:
        node = queue.pop()
        if is_reference(node):
            found.append(node[0])
            queue += node[3:]
        elif isinstance(node, list):
            queue += node
        elif isinstance(node, dict):
            history = node["config"].get("keras_history") if isinstance(node.get("config"), dict) else None
            if isinstance(history, list) and history:
                found.append(str(history[0]))
            else:
                queue += node.values()
    return found
