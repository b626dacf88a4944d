"""Search indexes in a `.keras` file: layers whose two variables are a matrix of vectors, and the list of their ids.

The layers are those of TensorFlow Recommenders (`BruteForce`: identifiers, candidates) and of Keras Recommenders
(`BruteForceRetrieval`: candidate_embeddings, candidate_ids). Neither library builds them again from the file alone,
but both write all of their variables to it. ScaNN's searcher is no variable, and so is not there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from beam_pipeline.formats.keras.config import INDEXES, Layer, snake_case
from beam_pipeline.formats.keras.towers import Layers
from beam_pipeline.formats.keras.weights import STRINGS, Dataset

_AT_ROOT = "candidates"
"""Name of an index that is the model itself."""
_INTEGERS = ("<i4", "<i8")
_WITHOUT_VECTORS = "ScaNN"


@dataclass(frozen=True)
class Index:
    """A search index.

    Attributes:
        name: of its layer, as a user names it.
        path: of its layer in the HDF5 file.
        kind: the class of its layer, empty if that is unknown.
        vectors: the variable of its vectors; None if the file does not have them.
        ids: that of their ids; None if it has none.
    """

    name: str
    path: str
    kind: str
    vectors: Dataset | None
    ids: Dataset | None

    @property
    def is_certain(self) -> bool:
        """Whether it is an index, and not some other layer with a list of integers beside a matrix."""
        return bool(self.kind) or (self.ids is not None and self.ids.dtype == STRINGS)


def find(layers: Layers) -> list[Index]:
    """Returns the layers of a model that are, or may be, search indexes."""
    named = dict(_paths(layers.root, ())) if layers.root.is_graph else {}
    found = []
    for path in layers.weights.groups:
        variables = layers.weights.variables(path)
        matrices = [each for each in variables if len(each.shape) == 2 and each.dtype not in (*_INTEGERS, STRINGS)]
        lists = [each for each in variables if len(each.shape) == 1 and each.dtype in (*_INTEGERS, STRINGS)]
        kind = _kind(layers, path, named)
        if kind or (len(variables) == 2 and len(matrices) == len(lists) == 1):
            name = (named[path][0] if path in named else path) or path or _AT_ROOT
            vectors, ids = (each[0] if len(each) == 1 else None for each in (matrices, lists))
            found.append(Index(name, path, kind, vectors, ids))
    return found


def _paths(parent: Layer, names: tuple[str, ...]) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yields (path, (name, class)) of all layers inside of a Functional or Sequential model."""
    for child in parent.children:
        own = (*names, child.name)
        yield child.path, (".".join(own), child.kind)
        yield from _paths(child, own)


def _kind(layers: Layers, path: str, named: dict[str, tuple[str, str]]) -> str:
    """Returns the class of an index by the config, or by the names that Keras gave to its layer and its place."""
    if not path or path in named:
        kind = named[path][1] if path in named else layers.root.kind
        return kind if kind in (*INDEXES, _WITHOUT_VECTORS) else ""
    names = (path.rsplit("/", 1)[-1], layers.weights.groups[path])
    bases = [re.sub(r"_\d+$", "", name) for name in names]
    return next((kind for kind in (*INDEXES, _WITHOUT_VECTORS) if snake_case(kind) in bases), "")
