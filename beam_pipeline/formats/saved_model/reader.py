"""SavedModels of Keras and of `tf.saved_model.save`: which of their objects are towers.

A tower is a layer that holds a lookup table and an embedding, an embedding that the model's calls feed from a
lookup, or a search index.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from beam_pipeline.errors import CorruptFileError, TowerMissingError, UnsupportedModelError
from beam_pipeline.files import OpenFile
from beam_pipeline.formats.model import Checksum, Ending, Matrix, Tail, Tower
from beam_pipeline.formats.protobuf import Span
from beam_pipeline.formats.saved_model import checkpoint, gathers, indexes, lookup_tables
from beam_pipeline.formats.saved_model.gathers import Gather
from beam_pipeline.formats.saved_model.indexes import Index
from beam_pipeline.formats.saved_model.object_graph import RESOURCE, ObjectGraph
from beam_pipeline.formats.tails import (
    SCALAR,
    UNKNOWN,
    Returned,
    Rivals,
    Shape,
    State,
    Steps,
    Trace,
    Use,
    Value,
    rivals,
    tail,
    taking_part,
)

_MAX_STEPS = 5_000_000
"""Objects that are met while towers are looked for: a few seconds, though each object may hold all the others."""


class SavedModel:
    """A SavedModel directory."""

    def __init__(self, folder: str, open_file: OpenFile) -> None:
        """Reads the object graph and the checkpoint's index.

        Args:
            folder: path of the directory.
            open_file: opens files in it.

        Raises:
            NotAModelError: the folder holds no `saved_model.pb`.
            CorruptFileError: a file contradicts its format.
        """
        self._graph = ObjectGraph(folder, open_file)
        self._steps = 0
        self._gathers: list[Gather] | None = None
        self._reads: Trace | None = None
        self._found_indexes: dict[str, Index] | None = None

    def tower(self, name: str, layer: str, *, include_oov: bool = False) -> Tower:
        """Returns the tower whose layer has the attribute path `layer`, such as "user_layer" or "towers.user".

        If there is none, `layer` is the name of an embedding that a lookup feeds, or of a layer around one. An index
        is the tower of the items that it finds.

        Raises:
            TowerMissingError: no such layer, or it does not hold one lookup and one embedding.
            UnsupportedModelError: it holds them in a form that cannot be read.
            CorruptFileError: the files contradict each other.
        """
        if index := self._index(layer):
            matrix = self._matrix(indexes.require_vectors(name, index, self._graph.folder))
            ids = indexes.vocabulary(name, index, self._graph, matrix.rows)
            return Tower(name, layer, matrix, ids, source="index")
        table, variable = self._table_and_variable(name, layer)
        self._require_ids(name, layer, table)
        matrix = self._matrix(variable)
        vocabulary = lookup_tables.vocabulary(self._graph, table)
        if include_oov:
            vocabulary = replace(
                vocabulary, special_tokens=lookup_tables.special_tokens(self._graph, table, vocabulary)
            )
        return Tower(name, layer, matrix, vocabulary)

    def matrix(self, name: str, layer: str) -> Matrix:
        """Returns the embedding of a layer that has no lookup: its ids are elsewhere.

        Raises:
            TowerMissingError: no such layer, or it holds a lookup, or not one embedding.
            UnsupportedModelError, CorruptFileError: as `tower`.
        """
        return self._matrix(self._without_lookup(name, layer))

    def tails(self, layers: Mapping[str, str], without_lookup: Collection[str] = ()) -> dict[str, Tail]:
        """Returns how towers continue after their embeddings, until they meet each other or are returned.

        Args:
            layers: of all towers that are published together: name → layer, as `tower` takes them.
            without_lookup: names of those towers whose layers are as `matrix` takes them.

        Raises:
            TowerMissingError: a layer holds other embeddings that its tower needs, too.
        """
        variables = {
            name: self._without_lookup(name, layer) if name in without_lookup else self._variable(name, layer)
            for name, layer in layers.items()
        }
        inside = {
            name: {variables[name]} if self._index(layer) else self._embeddings(layer) for name, layer in layers.items()
        }
        towers = [(variable, inside[name]) for name, variable in variables.items()]
        indexed = self._indexed()
        embeddings = self._read_once().gathered.union(indexed, *(found | {variable} for variable, found in towers))
        are_towers = rivals(towers)

        def are_rivals(one: int, other: int, is_pairing: bool) -> bool:
            # Whatever is compared with an index is a tower's vector.
            return are_towers(one, other, is_pairing) or (is_pairing and (one in indexed) != (other in indexed))

        trace = self._trace(embeddings, are_rivals)
        found = {}
        for name, layer in layers.items():
            variable = variables[name]
            calls = self._returned(trace, self._outermost(variable))
            node = None if self._index(layer) else self._walk(layer)
            # What the call of an embedding returns is a row; a layer around it says more.
            is_around = node and variable not in (node, *self._graph.nodes[node].children.values())
            has_ids = node and self._parts(node)[0]
            of_layer = self._returned(trace, self._graph.calls(node) if node and (has_ids or is_around) else [])
            found[name] = tail(variable, calls, of_layer, trace.meetings) if calls else self._untraced(node, variable)
            others = inside[name] - {variable}
            if others and (not found[name].is_row or others & taking_part(calls, trace.meetings)):
                paths = sorted(self._path_below(node or 0, each, layer) for each in inside[name])
                raise TowerMissingError(
                    f"tower {name!r}: layer {layer!r} holds {len(paths)} embeddings ({', '.join(paths)}) in "
                    f"{self._graph.folder}, and none of them alone is its vector; {self._choose(name)}"
                )
        return found

    def tower_layers(self) -> list[str]:
        """Returns what could be given as `layer`.

        These are the paths of all layers that hold exactly one lookup and one embedding, outermost ones only, the
        names of all other embeddings that a lookup feeds, and those of search indexes.
        """
        found, covered, words = self.index_layers(), set[int](), self._read_once().words
        queue: deque[tuple[int, tuple[str, ...]]] = deque([(0, ())])
        seen = {0}
        while queue:
            node, path = queue.popleft()
            tables, variables = self._parts(node)
            tables = [table for table in tables if table not in words]
            is_tower = len(tables) == len(variables) == 1 and self._is_embedding(variables[0])
            if path and is_tower and not self._index(".".join(path)):
                found.append(".".join(path))
                covered.update(variables)
            elif tables and variables:
                queue.extend((child, (*path, name)) for name, child in self._graph.objects(node, seen))
        fed = (gather for gather in self._fed() if gather.variable not in covered and gather.table not in words)
        return sorted([*found, *(self._name(gather) for gather in fed)])

    def embeddings_without_ids(self) -> list[str]:
        """Returns what could be given as `layer` to `matrix`: the names of embeddings that no lookup feeds."""
        fed = {gather.variable for gather in self._fed()}
        found = list[str]()
        for number in range(1, len(self._graph.nodes)):
            if number not in fed and self._graph.is_matrix(number) and self._is_looked_up(number):
                path = self._path_below(0, number, "").removeprefix(".").removesuffix(".embeddings")
                # Keras numbers the layers of a Functional model, and says their names in those of the variables.
                name = self._own_layer(number) if path.startswith(("layer", "variables", "_")) else ""
                found.append(next((each for each in (name, path) if each and self._bare(each) == [number]), path))
        return sorted(set(found))

    def index_layers(self) -> list[str]:
        """Returns those of the layers that are search indexes."""
        return list(dict.fromkeys(index.layer for index in self._indexes().values()))

    def close(self) -> None:
        """Closes the file."""
        self._graph.close()

    def _indexes(self) -> dict[str, Index]:
        """Returns the search indexes of the model, by all of their names."""
        if self._found_indexes is None:
            found = indexes.find(self._graph, self._read_once().indexes)
            aliases = {alias: index for index in found for alias in index.aliases}
            self._found_indexes = {**aliases, **{index.layer: index for index in found}}
        return self._found_indexes

    def _indexed(self) -> set[int]:
        """Returns the matrices of all search indexes."""
        return {index.matrix for index in self._indexes().values() if index.matrix is not None}

    def _index(self, layer: str) -> Index | None:
        return self._indexes().get(layer.replace("/", ".")) or self._indexes().get(layer)

    def _variable(self, name: str, layer: str) -> int:
        """Returns the variable that holds the vectors of a tower."""
        if index := self._index(layer):
            return indexes.require_vectors(name, index, self._graph.folder)
        return self._table_and_variable(name, layer)[1]

    def _parts(self, root: int) -> tuple[list[int], list[int]]:
        """Returns all lookup tables and all embedding variables of an object.

        Keras calls them `lookup_table` and `embeddings`; where nothing is called so, any table and any matrix counts.
        """
        tables, variables = [], []
        indexed = self._indexed()
        if self._graph.is_matrix(root):
            variables.append(("", root))
        for node in self._graph.below(root):
            children = self._graph.nodes[node].children
            self._steps += 1 + len(children)
            if self._steps > _MAX_STEPS:
                path = self._graph.file.path
                raise CorruptFileError(f"{path}: its objects hold each other too often; log the model again")
            for name, child in children.items():
                if self._graph.nodes[child].kind == RESOURCE:
                    tables.append((name, child))
                elif child not in indexed and (name == "embeddings" or self._graph.is_matrix(child)):
                    variables.append((name, child))
        return _called("lookup_table", tables), _called("embeddings", variables)

    def _table_and_variable(self, name: str, layer: str) -> tuple[int, int]:
        """Returns the lookup table and the variable of a tower."""
        node = self._walk(layer)
        tables, variables = self._parts(node) if node is not None else ([], [])
        if node is None:
            found = self._called(layer)
        else:
            below = self._graph.matrices(node)
            found = [gather for gather in self._fed() if gather.variable in below]
        # What the calls do says more than where things are.
        if len(found) == 1:
            return found[0].table, found[0].variable
        if not found and not tables and len(self._bare(layer)) == 1:
            raise TowerMissingError(
                f"tower {name!r}: no lookup holds the ids of the embedding {layer!r} in {self._graph.folder}; name "
                f"them with --ids {name}=PATH (text, JSON, .npy, CSV or Parquet), or --ids {name}=rows if the ids are "
                "the numbers of the rows"
            )
        if node is None:
            problem = f"is around {len(found)} embeddings that a lookup feeds" if found else "does not exist"
        elif len(tables) != 1 or len(variables) != 1:
            problem = f"holds {len(tables)} lookup(s) and {len(variables)} embedding(s) instead of one of each"
            if variables:
                problem += f", and the model's calls feed {len(found) or 'none'} of its embeddings from a lookup"
        elif any((gather.table, gather.variable) == (tables[0], variables[0]) for gather in self._gathered()):
            problem = "holds a lookup and an embedding that the model feeds from elsewhere"
        elif not self._is_embedding(variables[0]):
            problem = (
                "holds a lookup and a matrix that the model multiplies by (one-hot or multi-hot), not an embedding"
            )
        else:
            return tables[0], variables[0]
        raise TowerMissingError(
            f"tower {name!r}: layer {layer!r} {problem} in {self._graph.folder}; {self._choose(name)}"
        )

    def _choose(self, name: str) -> str:
        layers = ", ".join(self.tower_layers()) or "none"
        missing = ", ".join(self.embeddings_without_ids())
        others = f"; embeddings without ids: {missing} (name their ids with --ids {name}=PATH)" if missing else ""
        return f"layers that are towers: {layers}; choose with --tower {name}=LAYER{others}"

    def _without_lookup(self, name: str, layer: str) -> int:
        """Returns the variable of a layer that holds an embedding and no lookup."""
        found, where = self._bare(layer), f"tower {name!r}: layer {layer!r} in {self._graph.folder}"
        if any(gather.variable in found for gather in self._fed()):
            raise TowerMissingError(f"{where} has a lookup that holds its ids; leave out --ids {name}=…")
        if len(found) != 1:
            problem = f"holds {len(found)} embeddings" if found else "holds no embedding, or does not exist"
            names = ", ".join(self.embeddings_without_ids()) or "none"
            raise TowerMissingError(f"{where} {problem}; embeddings without ids: {names}; choose with --tower {name}=")
        return found[0]

    def _bare(self, layer: str) -> list[int]:
        """Returns the embeddings of a layer, by its path or the name that their variables have."""
        node = self._walk(layer)
        if node is not None:
            return sorted(each for each in self._graph.matrices(node) if self._is_looked_up(each))
        numbers = range(len(self._graph.nodes))
        name = layer.replace(".", "/")
        return [
            each for each in numbers
            if self._graph.is_matrix(each) and self._own_layer(each) == name and self._is_looked_up(each)
        ]  # fmt: skip

    def _is_looked_up(self, variable: int) -> bool:
        """Whether the rows of a matrix are looked up, by its name or by what the model does."""
        if variable in self._indexed():
            return False
        return self._graph.path(variable)[-1] == "embeddings" or variable in self._read_once().gathered

    def _walk(self, layer: str) -> int | None:
        """Returns the object at an attribute path, if there is one."""
        return self._graph.walk(layer.replace("/", ".").split("."))

    def _untraced(self, node: int | None, variable: int) -> Tail:
        """Returns what the weights of a tower's layer say of it where the model was saved without its functions."""
        below = (
            {child for each in self._graph.below(node) for child in self._graph.nodes[each].children.values()}
            if node
            else set[int]()
        )
        weights = sorted(self._graph.path(each) for each in below - {variable} if self._graph.shape(each) is not None)
        if weights:
            return Tail(Ending.GOES_ON, tuple((path[-2] if len(path) > 1 else "", path[-1]) for path in weights))
        return Tail(Ending.UNKNOWN, reason="the model has no function that uses it; it was saved without (save_traces)")

    def _path_below(self, root: int, variable: int, layer: str) -> str:
        """Returns the attribute path of a variable inside of a layer."""
        queue, seen = deque([(root, layer)]), {root}
        while queue:
            node, path = queue.popleft()
            for name, child in self._graph.nodes[node].children.items():
                if child == variable and not name.isdecimal():
                    return f"{path}.{name}"
            queue.extend((child, f"{path}.{name}") for name, child in self._graph.objects(node, seen))
        return ".".join(self._graph.path(variable))

    def _require_ids(self, name: str, layer: str, table: int) -> None:
        if table in self._read_once().words:
            raise UnsupportedModelError(
                f"tower {name!r}: the lookup of layer {layer!r} in {self._graph.folder} looks up the words of a text: "
                f"they are not ids; {self._choose(name)}"
            )

    def _is_embedding(self, variable: int) -> bool:
        """Whether a matrix is one whose rows are looked up, as far as that is known."""
        if self._graph.path(variable)[-1] == "embeddings" or variable in self._read_once().gathered:
            return True
        return not self._outermost(variable)

    def _embeddings(self, layer: str) -> set[int]:
        """Returns the matrices of a layer whose rows are looked up, by their name or by what the model does."""
        node = self._walk(layer)
        if node is None:
            return set()
        named = {child for each in self._graph.below(node) for name, child in self._graph.nodes[each].children.items()
                 if name == "embeddings" and self._graph.is_matrix(child)}  # fmt: skip
        return named | (self._graph.matrices(node) & self._read_once().gathered)

    def _outermost(self, variable: int) -> list[list[str]]:
        """Returns the outermost calls in which a variable takes part: those of the model, as a rule."""
        level, seen = [0], {0}
        while level:
            # A model's signatures are calls of its own.
            owners = [*level, *(self._graph.nodes[0].children.get("signatures", 0) for _ in level if 0 in level)]
            calls = [names for owner in dict.fromkeys(owners) for names in self._graph.calls(owner)]
            found = [names for names in calls if any(variable in self._graph.captured(name) for name in names)]
            if found:
                return found
            level = [child for node in level for _, child in self._graph.objects(node, seen)]
        return []

    def _read_once(self) -> Trace:
        """Returns what the model's calls do with tables and matrices: which are looked up in, and by what."""
        if self._reads is None:
            matrices = [number for number in range(len(self._graph.nodes)) if self._graph.is_matrix(number)]
            self._reads = self._trace(matrices, lambda *_: False, keeps_changed=False)
            done = set[str]()
            for matrix in matrices:
                calls = [[name for name in names if name not in done] for names in self._outermost(matrix)]
                done.update(name for names in calls for name in names)
                self._returned(self._reads, calls)
        return self._reads

    def _trace(self, embeddings: Iterable[int], are_rivals: Rivals, *, keeps_changed: bool = True) -> Trace:
        return Trace(
            function=self._graph.library.function,
            dimensions={each: (self._graph.shape(each) or (0,))[-1] for each in embeddings},
            are_rivals=are_rivals,
            steps=Steps(self._graph.file.path, _MAX_STEPS),
            keeps_changed=keeps_changed,
        )

    def _returned(self, trace: Trace, calls: Iterable[Sequence[str]]) -> list[list[Returned]]:
        return [[trace.returned(name, self._arguments(trace, name)) for name in names] for names in calls]

    def _arguments(self, trace: Trace, name: str) -> list[Value]:
        """Returns what a concrete function is called with: what it captured comes last."""
        captured = [self._captured(trace, number) for number in self._graph.captured(name)]
        function = self._graph.library.function(name)
        return [UNKNOWN] * (len(function.arguments) - len(captured) if function else 0) + captured

    def _captured(self, trace: Trace, number: int) -> Value:
        if number in trace.dimensions:
            return Value(rows=((Use(number, ""), State(Shape.ROW)),), matrix=number)
        if number < len(self._graph.nodes) and self._graph.nodes[number].kind == RESOURCE:
            return Value(table=number)
        if number < len(self._graph.nodes) and self._graph.is_list(number):
            return Value(ids=number)
        is_scalar = number < len(self._graph.nodes) and self._graph.shape(number) in ((), (1,))
        return SCALAR if is_scalar else UNKNOWN

    def _gathered(self) -> list[Gather]:
        """Returns what the model's functions say about tables and embeddings."""
        if self._gathers is None:
            captured = {name: self._graph.captured(name) for name in self._graph.functions}
            tables = {number for number, node in enumerate(self._graph.nodes) if node.kind == RESOURCE}
            matrices = {number for number in range(len(self._graph.nodes)) if self._graph.is_matrix(number)}
            self._gathers = gathers.find(self._graph.file.path, self._graph.library, captured, tables, matrices)
        return self._gathers

    def _fed(self) -> list[Gather]:
        """Returns the embeddings that a lookup feeds."""
        return [gather for gather in self._gathered() if gather.fed]

    def _called(self, layer: str) -> list[Gather]:
        """Returns the embeddings of that name; more than one if it is not clear which is meant."""
        name = layer.replace(".", "/")
        exact = [gather for gather in self._fed() if name in (*gather.scopes, self._layer_of(gather))]
        # A variable's name is as its layer was called; those in a graph are numbered where they would be double.
        return exact if len(exact) == 1 else [gather for gather in self._fed() if gather.is_within(name)] or exact

    def _layer_of(self, gather: Gather) -> str:
        """Returns the name of the layer that a variable says it belongs to: all but its last part."""
        return self._own_layer(gather.variable)

    def _own_layer(self, variable: int) -> str:
        return self._graph.string(self._graph.nodes[variable].content, 6).rpartition("/")[0]

    def _name(self, gather: Gather) -> str:
        """Returns the shortest name, from the outermost layer inwards, by which an embedding can be asked for."""
        parts = [part for scope in gather.scopes for part in scope.split("/")]
        names = [*(re.sub(r"_\d+$", "", part) for part in parts), *parts, self._layer_of(gather), *gather.scopes]
        path = ".".join(self._graph.path(gather.variable))
        return next((name for name in names if name and self._called(name) == [gather]), path)

    def _matrix(self, variable: int) -> Matrix:
        bundle = self._graph.bundle
        where = f"{bundle.prefix}.index: embedding {'.'.join(self._graph.path(variable))!r}"
        keys = self._graph.keys(variable)
        if keys is None:
            raise CorruptFileError(f"{where} is in the graph but not in the checkpoint; log the model again")
        entry = bundle.entries.get(keys.get("VARIABLE_VALUE", ""))
        if entry is None:
            raise CorruptFileError(f"{where} has no entry in the checkpoint; log the model again")
        if entry.sliced:
            raise UnsupportedModelError(f"{where} is saved in slices (a partitioned variable), which is not supported")
        if entry.dtype not in checkpoint.DTYPES:
            raise UnsupportedModelError(f"{where} has TensorFlow type {entry.dtype}, not one of the float types")
        if len(entry.shape) != 2 or not all(entry.shape):
            raise UnsupportedModelError(f"{where} has shape {list(entry.shape)}, not [rows, dimension]")
        matrix = Matrix(
            path=bundle.data_path(entry),
            offset=entry.offset,
            rows=entry.shape[0],
            dimension=entry.shape[1],
            dtype=checkpoint.DTYPES[entry.dtype],
            checksum=Checksum("crc32c", entry.crc32c, Span(entry.offset, entry.offset + entry.size)),
        )
        if matrix.size != entry.size:
            raise CorruptFileError(f"{where} has {entry.size:,} bytes, which do not fit its shape {list(entry.shape)}")
        with self._graph.open_file(matrix.path) as data:
            data.read(entry.offset + entry.size, 0)  # Raises, before anything is written, if the file is too short.
        return matrix


def _called(name: str, found: list[tuple[str, int]]) -> list[int]:
    """Returns the objects of that name, or all if none has it, each once."""
    named = [node for found_name, node in found if found_name == name]
    return list(dict.fromkeys(named or [node for _, node in found]))
