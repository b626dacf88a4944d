"""Search indexes: a matrix of vectors, and the list of their ids, one for each row.

The calls say which list belongs to which matrix: something is multiplied with all rows, and the ids of the best are
gathered. Of a model that was saved without its calls, the names that the layers of TensorFlow Recommenders and
Keras Recommenders give their variables say it. ScaNN keeps the vectors as they are only where it reorders by them.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from beam_pipeline.errors import CorruptFileError, TowerMissingError, UnsupportedModelError
from beam_pipeline.formats.model import Checksum, Encoding, Vocabulary
from beam_pipeline.formats.protobuf import Span
from beam_pipeline.formats.saved_model import checkpoint, lookup_tables
from beam_pipeline.formats.saved_model.object_graph import VARIABLE, ObjectGraph

_NAMES = (("identifiers", "candidates"), ("_identifiers", "_candidates"), ("candidate_ids", "candidate_embeddings"))
_SEARCHERS = ("_serialized_searcher", "serialized_searcher")
_SEARCHER = {"dataset", "hashed_dataset", "scann_config"}
"""Children of ScaNN's state (scann/scann_ops/py/scann_ops.py)."""

_SAYS_IDS = re.compile(r"(^|_)(ids?|identifiers?)(_|$)")


@dataclass(frozen=True)
class Index:
    """A search index.

    Attributes:
        layer: its name.
        matrix: the variable of its vectors; None if they are not in the model as they were.
        lists: its lists of ids, each the number of an object or where in `saved_model.pb` its tensor is; more than one
            if nothing says which is meant.
        aliases: other names.
    """

    layer: str
    matrix: int | None
    lists: tuple[int | Span, ...]
    aliases: tuple[str, ...] = ()


def find(graph: ObjectGraph, called: Mapping[int, Iterable[int | Span]]) -> list[Index]:
    """Returns the search indexes of a model.

    Args:
        graph: its objects.
        called: matrix → lists from which calls take ids of its rows.
    """
    places = _places(graph)
    lists = {matrix: _chosen(graph, places, found) for matrix, found in called.items()}
    quantised = list[tuple[int, int]]()
    for node in graph.below(0):
        children = graph.nodes[node].children
        for ids, matrix in ((children.get(ids), children.get(matrix)) for ids, matrix in _NAMES):
            if ids is not None and matrix is not None and graph.is_list(ids) and graph.is_matrix(matrix):
                lists.setdefault(matrix, (ids,))
        for searcher in (children[name] for name in _SEARCHERS if name in children):
            state = graph.nodes[searcher].children
            ids = children.get("identifiers", children.get("_identifiers"))
            if ids is None or not {*state} >= _SEARCHER:
                continue
            if graph.is_matrix(state["dataset"]):
                lists.setdefault(state["dataset"], (ids,))
            elif (ids, searcher) not in quantised:
                quantised.append((ids, searcher))
    found = [_named(graph, places, matrix, each) for matrix, each in lists.items()]
    found += [replace(_named(graph, places, searcher, (ids,)), matrix=None) for ids, searcher in quantised]
    times = Counter(index.layer for index in found)
    return [
        index if times[index.layer] == 1 else replace(index, layer=index.aliases[-1], aliases=()) for index in found
    ]


@dataclass(frozen=True)
class _Place:
    """Attribute path of the object that has another one as its child, and the child's name."""

    path: tuple[str, ...]
    name: str


@dataclass
class _Places:
    """Where objects are, by their numbers, without the lists that Keras keeps of everything."""

    of: dict[int, _Place] = field(default_factory=dict)


def _places(graph: ObjectGraph) -> _Places:
    places, queue, seen = _Places(), deque[tuple[int, tuple[str, ...]]]([(0, ())]), {0}
    while queue:
        node, path = queue.popleft()
        for name, child in graph.nodes[node].children.items():
            if not name.isdecimal():
                places.of.setdefault(child, _Place(path, name))
        queue.extend((child, (*path, name)) for name, child in graph.objects(node, seen))
    return places


def _named(graph: ObjectGraph, places: _Places, matrix: int, lists: tuple[int | Span, ...]) -> Index:
    """Returns an index by the name of the object that holds its ids, or its matrix."""
    place = places.of.get(matrix)
    if place is None:  # A flat list, as `export()` of Keras 3 writes it.
        name = graph.string(graph.nodes[matrix].content, 6)
        return Index(name or ".".join(graph.path(matrix)), matrix, lists, (".".join(graph.path(matrix)),))
    holders = [places.of[ids].path for ids in lists if isinstance(ids, int) and ids in places.of]
    path = next((path for path in (*holders, place.path) if path), ()) or (*place.path, place.name)[:1]
    return Index(".".join(path), matrix, lists, (".".join((*place.path, place.name)),))


def _chosen(graph: ObjectGraph, places: _Places, lists: Iterable[int | Span]) -> tuple[int | Span, ...]:
    """Returns the list that is called ids, of several that an index answers with, such as ids and titles."""
    found = sorted(lists, key=lambda each: (isinstance(each, Span), each))
    says = [each for each in found if isinstance(each, int) and _SAYS_IDS.search(_list_name(graph, places, each))]
    return tuple(says if len(says) == 1 else found)


def _list_name(graph: ObjectGraph, places: _Places, node: int) -> str:
    if node in places.of:
        return places.of[node].name.lower()
    return graph.string(graph.nodes[node].content, 6).lower() if graph.nodes[node].kind == VARIABLE else ""


def require_vectors(name: str, index: Index, folder: str) -> int:
    """Returns the variable of an index's vectors.

    Raises:
        UnsupportedModelError: they are not in the model as they were.
    """
    if index.matrix is None:
        raise UnsupportedModelError(
            f"tower {name!r}: the ScaNN index {index.layer!r} in {folder} holds its vectors quantised only; build it "
            "with num_reordering_candidates, which keeps them, or save a BruteForce index beside it"
        )
    return index.matrix


def vocabulary(name: str, index: Index, graph: ObjectGraph, rows: int) -> Vocabulary:
    """Returns the ids of an index, one for each row.

    Args:
        name: of the tower.
        index: the index.
        graph: the objects of its model.
        rows: number of its vectors.

    Raises:
        TowerMissingError: it has several lists, and nothing says which are the ids.
        UnsupportedModelError: the ids are in a form that is not read.
        CorruptFileError: there are more or fewer than rows.
    """
    where = f"{graph.file.path}: the ids of index {index.layer!r}"
    if len(index.lists) != 1:
        raise TowerMissingError(
            f"tower {name!r}: index {index.layer!r} in {graph.folder} answers with {len(index.lists)} lists; call the "
            "one that holds the ids identifiers, or have the saved call return it alone"
        )
    (ids,) = index.lists
    if isinstance(ids, int) and graph.nodes[ids].kind == VARIABLE:
        found = _of_variable(graph, ids, where)
    else:
        tensor, count, dtype = graph.constant(ids, where) if isinstance(ids, int) else _of_tensor(graph, ids)
        if dtype not in checkpoint.ID_TYPES:
            raise UnsupportedModelError(f"{where} have TensorFlow type {dtype}, not strings or integers")
        encoding, span = lookup_tables.constant_ids(graph, tensor, dtype, count, where)
        found = Vocabulary(graph.file.path, span, encoding, 0, count)
    if found.count != rows:
        raise CorruptFileError(f"{where} are {found.count:,}, and its vectors {rows:,}: there must be one id for each")
    return found


def _of_tensor(graph: ObjectGraph, tensor: Span) -> tuple[Span, int, int]:
    dtype, sizes = checkpoint.read_type(graph.file, tensor)
    return tensor, sizes[0], dtype


def _of_variable(graph: ObjectGraph, node: int, where: str) -> Vocabulary:
    entry = graph.bundle.entries.get((graph.keys(node) or {}).get("VARIABLE_VALUE", ""))
    if entry is None:
        raise CorruptFileError(f"{where} have no entry in the checkpoint; log the model again")
    if entry.sliced:
        raise UnsupportedModelError(f"{where} are saved in slices, which is not supported")
    encoding = checkpoint.ID_TYPES.get(entry.dtype)
    if encoding is None or len(entry.shape) != 1:
        raise UnsupportedModelError(
            f"{where} have TensorFlow type {entry.dtype} and shape {list(entry.shape)}; only a list of strings or "
            "integers is supported"
        )
    span, count = Span(entry.offset, entry.offset + entry.size), entry.shape[0]
    if (size := {Encoding.INT32: 4, Encoding.INT64: 8}.get(encoding)) and entry.size != size * count:
        raise CorruptFileError(f"{where} have {entry.size:,} bytes, not {size * count:,}; log the model again")
    path = graph.bundle.data_path(entry)
    return Vocabulary(path, span, encoding, 0, count, checksum=Checksum("crc32c", entry.crc32c, span))
