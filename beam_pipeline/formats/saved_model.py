"""SavedModels of tf-keras and of `tf.saved_model.save`: finds a tower without building an object.

`saved_model.pb` is a `SavedModel` (tensorflow/core/protobuf/saved_model.proto, meta_graph.proto,
saved_object_graph.proto). Its object graph is a tree of named children: root → `user_layer` → … → `embeddings` (a
variable) and → `lookup_table` (a resource). The lookup's `_initialize` function says where the ids are: two
captured constants (ids and their rows) or an asset (a file with an id per line); those of a mutable table are in the
checkpoint. The bytes of a variable are found through the checkpoint's own object graph (trackable_object_graph.proto).
"""

from __future__ import annotations

import io
import json
import re
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import google_crc32c
import numpy as np

from beam_pipeline.errors import (
    ArtifactMissingError,
    ChecksumError,
    CorruptFileError,
    NotAModelError,
    TowerMissingError,
)
from beam_pipeline.files import ByteFile, OpenFile, join
from beam_pipeline.formats import checkpoint, gathers, wire
from beam_pipeline.formats.artifact import Checksum, Encoding, Matrix, Tower, Vocabulary, special_names
from beam_pipeline.formats.gathers import Gather
from beam_pipeline.formats.wire import Span

_DT_STRING, _DT_INT64 = 7, 9
_IMPORT_OPS = ("LookupTableImportV2", "InitializeTableV2")
_FILE_OP = "InitializeTableFromTextFileV2"
_WHOLE_LINE, _LINE_NUMBER = -2, -1
_BLOCK = 4 << 20
_MAX_OBJECTS = 1_000_000
"""Objects, their children's names, functions, constants: half a kilobyte of memory each, for a few bytes of a file."""
_MAX_STEPS = 5_000_000
"""Objects that are met while towers are looked for: a few seconds, though each object may hold all the others."""


@dataclass
class _Node:
    """A `SavedObject`; `kind` is the field number of its oneof."""

    kind: int = 0
    content: Span = field(default=Span(0, 0))
    children: dict[str, int] = field(default_factory=dict)
    is_matrix: bool | None = None


_USER_OBJECT, _ASSET, _FUNCTION, _VARIABLE, _CONSTANT, _RESOURCE = 4, 5, 6, 7, 9, 10


class SavedModel:
    """The object graph of a SavedModel directory.

    Attributes:
        folder: path of the directory.
    """

    def __init__(self, folder: str, open_file: OpenFile) -> None:
        """Reads the object graph and the checkpoint's index.

        Raises:
            NotAModelError: the folder holds no `saved_model.pb`.
            CorruptFileError: a file contradicts its format.
        """
        self.folder = folder
        self._open = open_file
        try:
            self._file = open_file(join(folder, "saved_model.pb"))
        except ArtifactMissingError as error:
            raise NotAModelError(
                f"{folder} does not hold a model: {error}; name its folder inside the run with --artifact_path"
            ) from error
        self._counted = self._steps = 0
        graph = next(wire.spans(self._file, Span(0, self._file.size), 2), None)
        if graph is None:
            raise CorruptFileError(f"{self._file.path} holds no graph; log the model again")
        parts = {number: value for number, value in wire.scan(self._file, graph) if isinstance(value, Span)}
        self._graph = parts.get(2, Span(0, 0))
        self._assets = []
        for asset in wire.spans(self._file, graph, 6):
            self._count()
            self._assets += [wire.text(self._file, name) for name in wire.spans(self._file, asset, 2)]
        if 7 not in parts or 2 not in parts:
            raise NotAModelError(f"{self._file.path} holds no objects: saved by TensorFlow 1? save it with tf-keras")
        self._nodes: list[_Node] = []
        self._functions: dict[str, Span] = {}
        self._tensors: dict[str, Span] | None = None
        self._definitions: dict[str, Span] | None = None
        self._parents: dict[int, tuple[int, str]] | None = None
        self._gathers: list[Gather] | None = None
        self._read_objects(parts[7])
        self._bundle = checkpoint.read_bundle(join(folder, "variables", "variables"), open_file)
        self._checkpoint_nodes = self._read_checkpoint_graph()

    def tower(self, name: str, layer: str, *, include_oov: bool = False) -> Tower:
        """Returns the tower whose layer has the attribute path `layer`, such as "user_layer" or "towers.user".

        If there is none, `layer` is the name of an embedding that a lookup feeds, or of a layer around one.

        Raises:
            TowerMissingError: no such layer, or it does not hold one lookup and one embedding.
            NotAModelError: it holds them in a form that cannot be read.
            CorruptFileError: the files contradict each other.
        """
        lookup, embedding = self._lookup_and_embedding(name, layer)
        matrix = self._matrix(embedding)
        vocabulary = self._vocabulary(lookup)
        if include_oov:
            vocabulary = replace(vocabulary, special_tokens=self._special_tokens(lookup, vocabulary))
        return Tower(name, layer, matrix, vocabulary)

    def tower_layers(self) -> list[str]:
        """Returns what could be given as `layer`.

        These are the paths of all layers that hold exactly one lookup and one embedding, outermost ones only, and the
        names of all other embeddings that a lookup feeds.
        """
        found, covered = list[str](), set[int]()
        queue: deque[tuple[int, tuple[str, ...]]] = deque([(0, ())])
        seen = {0}
        while queue:
            node, path = queue.popleft()
            lookups, embeddings = self._parts(node)
            if path and len(lookups) == len(embeddings) == 1:
                found.append(".".join(path))
                covered.update(embeddings)
            elif lookups and embeddings:
                queue.extend((child, (*path, name)) for name, child in self._objects(node, seen))
        return sorted([*found, *(self._name(gather) for gather in self._fed() if gather.variable not in covered)])

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    # The object graph.

    def _count(self) -> None:
        """Counts something that is kept."""
        self._counted += 1
        if self._counted > _MAX_OBJECTS:
            raise CorruptFileError(f"{self._file.path} has more than {_MAX_OBJECTS:,} objects; log the model again")

    def _read_objects(self, span: Span) -> None:
        for number, value in wire.scan(self._file, span):
            if not isinstance(value, Span):
                continue
            self._count()
            if number == 1:
                node = _Node()
                for kind, content in wire.scan(self._file, value):
                    if not isinstance(content, Span):
                        continue
                    if kind == 1:
                        self._count()
                        child, name = self._reference(self._file, content)
                        node.children[name] = child
                    elif kind in (_USER_OBJECT, _ASSET, _FUNCTION, _VARIABLE, _CONSTANT, _RESOURCE):
                        node.kind, node.content = kind, content
                self._nodes.append(node)
            elif number == 2:
                entry = {number: part for number, part in wire.scan(self._file, value) if isinstance(part, Span)}
                if 1 in entry and 2 in entry:
                    self._functions[wire.text(self._file, entry[1])] = entry[2]
        if not self._nodes or any(c >= len(self._nodes) for node in self._nodes for c in node.children.values()):
            raise CorruptFileError(f"{self._file.path}: its object graph is incomplete; log the model again")

    @staticmethod
    def _reference(file: ByteFile, span: Span) -> tuple[int, str]:
        """Returns (node number, local name) of an ObjectReference."""
        node, name = 0, ""
        for number, value in wire.scan(file, span):
            if number == 1 and isinstance(value, int):
                node = value
            elif number == 2 and isinstance(value, Span):
                name = wire.text(file, value)
        return node, name

    def _walk(self, path: list[str]) -> int | None:
        node = 0
        for name in path:
            if name not in self._nodes[node].children:
                return None
            node = self._nodes[node].children[name]
        return node

    def _objects(self, node: int, seen: set[int]) -> Iterator[tuple[str, int]]:
        """Yields the children that are Keras objects and were not met before; `keras_api` only lists them again."""
        for name, child in self._nodes[node].children.items():
            if child not in seen and name != "keras_api" and self._nodes[child].kind == _USER_OBJECT:
                seen.add(child)
                yield name, child

    def _parts(self, root: int) -> tuple[list[int], list[int]]:
        """Returns all lookup tables and all embedding variables of an object.

        Keras calls them `lookup_table` and `embeddings`; where nothing is called so, any table and any matrix counts.
        """
        tables, variables = [], []
        if self._is_matrix(root):
            variables.append(("", root))
        queue, seen = deque([root]), {root}
        while queue:
            node = queue.popleft()
            self._steps += 1 + len(self._nodes[node].children)
            if self._steps > _MAX_STEPS:
                raise CorruptFileError(f"{self._file.path}: its objects hold each other too often; log the model again")
            for name, child in self._nodes[node].children.items():
                if self._nodes[child].kind == _RESOURCE:
                    tables.append((name, child))
                elif name == "embeddings" or self._is_matrix(child):
                    variables.append((name, child))
            queue.extend(child for _, child in self._objects(node, seen))
        return _called("lookup_table", tables), _called("embeddings", variables)

    def _is_matrix(self, node: int) -> bool:
        """Whether an object is a variable of floats in two dimensions."""
        variable = self._nodes[node]
        if variable.kind != _VARIABLE:
            return False
        if variable.is_matrix is None:
            dtype, dimensions = 0, 0
            for number, value in wire.scan(self._file, variable.content):
                if number == 1 and isinstance(value, int):
                    dtype = value
                elif number == 2 and isinstance(value, Span):
                    dimensions = len(checkpoint.read_shape(self._file, value))
            variable.is_matrix = dtype in checkpoint.DTYPES and dimensions == 2
        return variable.is_matrix

    def _lookup_and_embedding(self, name: str, layer: str) -> tuple[int, int]:
        """Returns the lookup table and the variable of a tower."""
        node = self._walk(layer.replace("/", ".").split("."))
        tables, variables = self._parts(node) if node is not None else ([], [])
        if node is None:
            found = self._called(layer)
        else:
            below = self._matrices(node)
            found = [gather for gather in self._fed() if gather.variable in below]
        # What the calls do says more than what lies where.
        if len(found) == 1:
            return found[0].table, found[0].variable
        if node is None:
            problem = f"is around {len(found)} embeddings that a lookup feeds" if found else "does not exist"
        elif len(tables) != 1 or len(variables) != 1:
            problem = f"holds {len(tables)} lookup(s) and {len(variables)} embedding(s) instead of one of each"
            if variables:
                problem += f", and the model's calls feed {len(found) or 'none'} of its embeddings from a lookup"
        elif any((gather.table, gather.variable) == (tables[0], variables[0]) for gather in self._gathered()):
            problem = "holds a lookup and an embedding that the model feeds from elsewhere"
        else:
            return tables[0], variables[0]
        raise TowerMissingError(
            f"tower {name!r}: layer {layer!r} {problem} in {self.folder}; layers that are towers: "
            f"{', '.join(self.tower_layers()) or 'none'}; choose with --tower {name}=LAYER"
        )

    def _matrices(self, root: int) -> set[int]:
        """Returns all matrices of an object, whatever they are called."""
        found = {root} if self._is_matrix(root) else set[int]()
        queue, seen = deque([root]), {root}
        while queue:
            node = queue.popleft()
            found.update(child for child in self._nodes[node].children.values() if self._is_matrix(child))
            queue.extend(child for _, child in self._objects(node, seen))
        return found

    def _gathered(self) -> list[Gather]:
        """Returns what the model's functions tell of tables and embeddings."""
        if self._gathers is None:
            captured = {name: wire.integers(self._file, span, 2) for name, span in self._functions.items()}
            tables = {number for number, node in enumerate(self._nodes) if node.kind == _RESOURCE}
            matrices = {number for number in range(len(self._nodes)) if self._is_matrix(number)}
            self._gathers = gathers.find(self._file, self._functions_by_name(), captured, tables, matrices)
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
        return self._string(self._nodes[gather.variable].content, 6).rpartition("/")[0]

    def _name(self, gather: Gather) -> str:
        """Returns the shortest name, from the outermost layer inwards, by which an embedding can be asked for."""
        parts = [part for scope in gather.scopes for part in scope.split("/")]
        names = [*(re.sub(r"_\d+$", "", part) for part in parts), *parts, self._layer_of(gather), *gather.scopes]
        path = ".".join(self._path(gather.variable))
        return next((name for name in names if name and self._called(name) == [gather]), path)

    def _path(self, node: int) -> list[str]:
        """Returns a path from the root to an object: the shortest, since all are the same to the checkpoint."""
        if self._parents is None:
            self._parents = {0: (0, "")}
            queue = deque([0])
            while queue:
                parent = queue.popleft()
                for name, child in self._nodes[parent].children.items():
                    if child not in self._parents:
                        self._parents[child] = (parent, name)
                        queue.append(child)
        path = []
        while node:
            if node not in self._parents:
                raise CorruptFileError(f"{self._file.path}: object {node:,} belongs to no other; log the model again")
            node, name = self._parents[node]
            path.append(name)
        return path[::-1]

    # The embedding matrix.

    def _read_checkpoint_graph(self) -> list[tuple[dict[str, int], dict[str, str]]]:
        """Returns (children, checkpoint key of each attribute) of each node of the checkpoint's object graph."""
        data = self._bundle.read_string(checkpoint.OBJECT_GRAPH_KEY, self._open)
        file = ByteFile(f"{self._bundle.prefix} ({checkpoint.OBJECT_GRAPH_KEY})", io.BytesIO(data), len(data))
        nodes = []
        for span in wire.spans(file, Span(0, file.size), 1):
            children: dict[str, int] = {}
            keys: dict[str, str] = {}
            self._count()
            for number, value in wire.scan(file, span):
                self._count()
                if number == 1 and isinstance(value, Span):
                    child, name = self._reference(file, value)
                    children[name] = child
                elif number == 2 and isinstance(value, Span):
                    attribute = {n: wire.text(file, v) for n, v in wire.scan(file, value) if isinstance(v, Span)}
                    keys[attribute.get(1, "")] = attribute.get(3, "")
            nodes.append((children, keys))
        return nodes

    def _keys(self, path: list[str]) -> dict[str, str] | None:
        """Returns the checkpoint key of each attribute of an object; None if the checkpoint does not know it."""
        node = 0
        for name in path:
            children = self._checkpoint_nodes[node][0] if node < len(self._checkpoint_nodes) else {}
            if name not in children:
                return None
            node = children[name]
        return self._checkpoint_nodes[node][1] if node < len(self._checkpoint_nodes) else {}

    def _matrix(self, variable: int) -> Matrix:
        path = self._path(variable)
        where = f"{self._bundle.prefix}.index: embedding {'.'.join(path)!r}"
        keys = self._keys(path)
        if keys is None:
            raise CorruptFileError(f"{where} is in the graph but not in the checkpoint; log the model again")
        entry = self._bundle.entries.get(keys.get("VARIABLE_VALUE", ""))
        if entry is None:
            raise CorruptFileError(f"{where} has no entry in the checkpoint; log the model again")
        if entry.sliced:
            raise NotAModelError(f"{where} is saved in slices (a partitioned variable), which is not supported")
        if entry.dtype not in checkpoint.DTYPES:
            raise NotAModelError(f"{where} has TensorFlow type {entry.dtype}, not one of the float types")
        if len(entry.shape) != 2 or not all(entry.shape):
            raise NotAModelError(f"{where} has shape {list(entry.shape)}, not [rows, dimension]")
        matrix = Matrix(
            path=self._bundle.data_path(entry),
            offset=entry.offset,
            rows=entry.shape[0],
            dimension=entry.shape[1],
            dtype=checkpoint.DTYPES[entry.dtype],
            checksum=Checksum("crc32c", entry.crc32c, Span(entry.offset, entry.offset + entry.size)),
        )
        if matrix.size != entry.size:
            raise CorruptFileError(f"{where} has {entry.size:,} bytes, which do not fit its shape {list(entry.shape)}")
        with self._open(matrix.path) as data:
            data.read(entry.offset + entry.size, 0)  # Raises, before anything is written, if the file is too short.
        return matrix

    # The ids.

    def _vocabulary(self, table: int) -> Vocabulary:
        path = self._path(table)
        for key in (self._keys(path) or {}).values():
            if f"{key}-keys" in self._bundle.entries:
                return self._checkpoint_vocabulary(key)
        where = f"{self._file.path}: lookup {'.'.join(path)!r}"
        function = self._function(self._nodes[table].children.get("_initialize"))
        if function is None:
            raise NotAModelError(f"{where} has no initializer: its ids are not in the artifact")
        captured = wire.integers(self._file, self._functions[function], 2)
        op, inputs, attributes = self._initializer(function, where)
        # The function's arguments are what it captured, in the order of `bound_inputs`.
        nodes = [captured[i] for i in inputs if i < len(captured)]
        if len(nodes) != len(inputs) or any(node >= len(self._nodes) for node in nodes):
            raise CorruptFileError(f"{where}: its initializer names objects that are not there")
        if op == _FILE_OP:
            return self._file_vocabulary(nodes[1], attributes, self._key_type(table, where), where)
        return self._constant_vocabulary(nodes[1], nodes[2], where)

    def _function(self, node: int | None) -> str | None:
        """Returns the name of the first concrete function of a function object."""
        if node is None or self._nodes[node].kind != _FUNCTION:
            return None
        names = [wire.text(self._file, span) for span in wire.spans(self._file, self._nodes[node].content, 1)]
        return next((name for name in names if name in self._functions), None)

    def _initializer(self, function: str, where: str) -> tuple[str, list[int], Mapping[str, int]]:
        """Returns (op, argument number of each of its inputs, its integer attributes) of an initializer function."""
        definition = self._functions_by_name().get(function)
        signature = next(wire.spans(self._file, definition, 1), None) if definition else None
        if definition and signature:
            names = (self._string(argument, 1) for argument in wire.spans(self._file, signature, 2))
            arguments = {name: number for number, name in enumerate(names)}
            for node in wire.spans(self._file, definition, 3):
                op = self._string(node, 2)
                if op == _FILE_OP or op in _IMPORT_OPS:
                    inputs = [wire.text(self._file, span) for span in wire.spans(self._file, node, 3)]
                    if len(inputs) < (2 if op == _FILE_OP else 3) or any(i not in arguments for i in inputs):
                        raise CorruptFileError(f"{where}: its initializer has other inputs than its arguments")
                    return op, [arguments[name] for name in inputs], self._integer_attributes(node)
        raise NotAModelError(f"{where} is initialized in a way that is not known: neither from a list nor from a file")

    def _integer_attributes(self, node: Span) -> dict[str, int]:
        """Returns the attributes of a node that are integers or types."""
        attributes = {}
        for entry in wire.spans(self._file, node, 5):
            value = next(wire.spans(self._file, entry, 2), None)
            for number, content in wire.scan(self._file, value) if value is not None else ():
                # AttrValue.i, two's complement in 64 bits, and AttrValue.type
                if number in (3, 6) and isinstance(content, int):
                    attributes[self._string(entry, 1)] = content - (1 << 64) if content >> 63 else content
        return attributes

    def _key_type(self, table: int, where: str) -> int:
        """Returns TensorFlow's number of the type of a table's keys, which only the function that makes it says."""
        function = self._function(self._nodes[table].children.get("_create_resource"))
        definition = self._functions_by_name().get(function or "")
        for node in wire.spans(self._file, definition, 3) if definition else ():
            key_type = self._integer_attributes(node).get("key_dtype")
            if key_type is not None:
                return key_type
        raise NotAModelError(f"{where}: the type of its ids is not in the artifact")

    def _checkpoint_vocabulary(self, key: str) -> Vocabulary:
        """The vocabulary of a mutable table: in the order of its hashes, so its rows are in none."""
        where = f"{self._bundle.prefix}.index: lookup {key!r}"
        keys, values = (self._bundle.entries.get(f"{key}-{part}") for part in ("keys", "values"))
        if keys is None or values is None:
            raise CorruptFileError(f"{where} has ids but no rows; log the model again")
        if keys.sliced or values.sliced:
            raise NotAModelError(f"{where} is saved in slices, which is not supported")
        if keys.dtype not in (_DT_STRING, _DT_INT64) or values.dtype != _DT_INT64:
            raise NotAModelError(f"{where} {_other_types(keys.dtype, values.dtype)}")
        if len(keys.shape) != 1:  # A dense hash table keeps its empty buckets, and not what an empty one looks like.
            raise NotAModelError(
                f"{where} has ids of shape {list(keys.shape)}, not a list: a DenseHashTable is not supported, "
                "save the model with a MutableHashTable or a StaticHashTable"
            )
        count = keys.shape[0]
        if (
            values.shape != keys.shape
            or values.size != 8 * count
            or (keys.dtype == _DT_INT64 and keys.size != 8 * count)
        ):
            raise CorruptFileError(f"{where} has {count:,} ids, and rows of shape {list(values.shape)}; log it again")
        path, span = self._bundle.data_path(values), Span(values.offset, values.offset + values.size)
        with self._open(path) as file:
            first_row, _, crc = _row_order(file, span)
        if crc != values.crc32c:
            raise ChecksumError(f"{path}: {key}-values does not match its crc32c; log the model again")
        return Vocabulary(
            path=self._bundle.data_path(keys),
            span=Span(keys.offset, keys.offset + keys.size),
            encoding=Encoding.STRING_TENSOR if keys.dtype == _DT_STRING else Encoding.INT64,
            first_row=first_row,
            count=count,
            row_numbers=span,
            in_row_order=False,
            row_numbers_path=path,
            checksum=Checksum("crc32c", keys.crc32c, Span(keys.offset, keys.offset + keys.size)),
        )

    def _file_vocabulary(self, node: int, attributes: Mapping[str, int], key_type: int, where: str) -> Vocabulary:
        asset = self._nodes[node]
        if asset.kind != _ASSET:
            raise CorruptFileError(f"{where}: its vocabulary file is not an asset of the model")
        indices = [value for number, value in wire.scan(self._file, asset.content) if number == 1]
        index = indices[0] if indices and isinstance(indices[0], int) else 0
        if index >= len(self._assets):
            raise CorruptFileError(f"{where}: asset {index} of {len(self._assets)} is missing")
        if attributes.get("key_index", _WHOLE_LINE) != _WHOLE_LINE or (
            attributes.get("value_index", _LINE_NUMBER) != _LINE_NUMBER
        ):
            raise NotAModelError(f"{where} reads columns of its file; only one id per line, in order, is supported")
        encodings = {_DT_STRING: Encoding.LINES, _DT_INT64: Encoding.INTEGER_LINES}
        if key_type not in encodings:
            raise NotAModelError(f"{where} {_other_types(key_type, _DT_INT64)}")
        name, first_row = self._assets[index], attributes.get("offset", 0)
        if {"", ".", ".."} & {*name.split("/")}:
            raise CorruptFileError(f"{where}: its vocabulary file {name!r} is none of the model; log the model again")
        if not 0 <= first_row < 1 << 62:
            raise CorruptFileError(f"{where}: its first id has row {first_row}")
        path = join(self.folder, "assets", name)
        with self._open(path) as file:
            return Vocabulary(path, Span(0, file.size), encodings[key_type], first_row)

    def _constant_vocabulary(self, keys: int, values: int, where: str) -> Vocabulary:
        ids, count, ids_type = self._constant(keys, where)
        rows, row_count, rows_type = self._constant(values, where)
        if ids_type not in (_DT_STRING, _DT_INT64) or rows_type != _DT_INT64:
            raise NotAModelError(f"{where} {_other_types(ids_type, rows_type)}")
        if count != row_count:
            raise CorruptFileError(f"{where} has {count:,} ids and {row_count:,} rows; log the model again")
        content = next(wire.spans(self._file, rows, 4), None)
        in_row_order = True
        if content is not None:
            if content.end - content.start != 8 * count or not count:
                raise CorruptFileError(
                    f"{where}: its rows have {content.end - content.start:,} bytes, not {8 * count:,}"
                )
            first_row, in_row_order, _ = _row_order(self._file, content)
        else:  # A list of one is written as a number instead.
            numbers = wire.integers(self._file, rows, 10)
            if count > 1 or len(numbers) != count:
                raise NotAModelError(f"{where}: its rows are not stored as a plain array")
            first_row = numbers[0] if numbers else 0
            if first_row >= 1 << 62:
                raise CorruptFileError(f"{where}: its first id has row {first_row}")
        encoding, span = self._constant_ids(ids, ids_type, count, where)
        return Vocabulary(
            self._file.path, span, encoding, first_row, count, row_numbers=content, in_row_order=in_row_order
        )

    def _constant_ids(self, tensor: Span, dtype: int, count: int, where: str) -> tuple[Encoding, Span]:
        """Returns how and where the ids of a TensorProto lie."""
        if not count:
            return Encoding.PROTOBUF, Span(tensor.end, tensor.end)
        if dtype == _DT_STRING:
            first = wire.position(self._file, tensor, 8)
            if first is None:
                raise NotAModelError(f"{where}: its ids are not stored as a list of strings")
            return Encoding.PROTOBUF, Span(first, tensor.end)
        content = next(wire.spans(self._file, tensor, 4), None)
        if content is not None:
            if content.end - content.start != 8 * count:
                raise CorruptFileError(
                    f"{where}: its ids have {content.end - content.start:,} bytes, not {8 * count:,}"
                )
            return Encoding.INT64, content
        packed = list(wire.spans(self._file, tensor, 10))
        if len(packed) != 1:
            raise NotAModelError(f"{where}: its ids are not stored as a plain array")
        return Encoding.VARINTS, packed[0]

    def _special_tokens(self, table: int, vocabulary: Vocabulary) -> tuple[str, ...]:
        """Returns names for the rows before the first id, from the lookup's config in `keras_metadata.pb`.

        The file is Keras's `SavedMetadata` (tf_keras/protobuf/saved_metadata.proto): of each object the node number
        (field 2) and a JSON config (field 5). The mask token comes first, then one row per out-of-vocabulary bucket.
        """
        path = self._path(table)[:-1]
        layers = {number for number, node in enumerate(self._nodes) if node.children.get("lookup_table") == table}
        try:
            file = self._open(join(self.folder, "keras_metadata.pb"))
        except ArtifactMissingError as error:
            raise NotAModelError(
                f"{self.folder} has no keras_metadata.pb, which alone names the rows before the ids of "
                f"{'.'.join(path)!r}: it was not saved by Keras 2's model.save; leave out --include_oov"
            ) from error
        with file:
            for entry in wire.spans(file, Span(0, file.size), 1):
                fields = dict(wire.scan(file, entry))
                metadata = fields.get(5)
                if fields.get(2, 0) not in layers or not isinstance(metadata, Span):
                    continue
                try:
                    config = json.loads(wire.text(file, metadata))["config"]
                    mask, oov, buckets = config["mask_token"], config["oov_token"], config["num_oov_indices"]
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    raise CorruptFileError(f"{file.path}: no lookup's config for {'.'.join(path)!r}") from error
                tokens = special_names(f"{file.path}: lookup {'.'.join(path)!r}", mask, oov, buckets)
                if len(tokens) == vocabulary.first_row:
                    return tuple(tokens)
        raise NotAModelError(
            f"{self.folder}: the {vocabulary.first_row} rows before the ids of {'.'.join(path)!r} have no names in "
            "keras_metadata.pb; leave out --include_oov"
        )

    def _constant(self, node: int, where: str) -> tuple[Span, int, int]:
        """Returns (TensorProto, number of elements, data type) of a captured constant."""
        operation = self._string(self._nodes[node].content, 1) if self._nodes[node].kind == _CONSTANT else None
        tensor = self._constants().get(operation or "")
        if tensor is None:
            raise CorruptFileError(f"{where}: constant {operation!r} is not in the graph; log the model again")
        dtype, sizes = 0, list[int]()
        for number, value in wire.scan(self._file, tensor):
            if number == 1 and isinstance(value, int):
                dtype = value
            elif number == 2 and isinstance(value, Span):
                sizes = checkpoint.read_shape(self._file, value)
            elif number > 2:  # Shape and type come first; what follows may be a hundred million strings.
                break
        if len(sizes) != 1:
            raise NotAModelError(f"{where}: constant {operation!r} has shape {sizes}, not a list")
        return tensor, sizes[0], dtype

    def _functions_by_name(self) -> dict[str, Span]:
        """Returns the `FunctionDef` of each function in the graph's library, which is read once."""
        if self._definitions is None:
            self._definitions = gathers.definitions(self._file, self._graph)
        return self._definitions

    def _constants(self) -> dict[str, Span]:
        """Returns the TensorProto of each Const of the graph, by name."""
        if self._tensors is None:
            self._tensors = {}
            for node in wire.spans(self._file, self._graph, 1):
                if self._string(node, 2) != "Const":
                    continue
                for entry in wire.spans(self._file, node, 5):
                    if self._string(entry, 1) == "value":
                        for value in wire.spans(self._file, entry, 2):
                            for tensor in wire.spans(self._file, value, 8):
                                self._count()
                                self._tensors[self._string(node, 1)] = tensor
        return self._tensors

    def _string(self, message: Span, number: int) -> str:
        span = next(wire.spans(self._file, message, number), None)
        return wire.text(self._file, span) if span is not None else ""


def _called(name: str, found: list[tuple[str, int]]) -> list[int]:
    """Returns the objects of that name, or all if none has it, each once."""
    named = [node for own, node in found if own == name]
    return list(dict.fromkeys(named or [node for _, node in found]))


def _other_types(ids: int, rows: int) -> str:
    return f"maps TensorFlow type {ids} to {rows}; only strings and int64 to int64 are supported"


def _row_order(file: ByteFile, span: Span) -> tuple[int, bool, int]:
    """Returns (the lowest row, whether each is the next one of that before, crc32c) of an array of int64."""
    first, lowest, in_order, crc = 0, 0, True, 0
    for offset, block in file.blocks(span.start, span.end, _BLOCK):
        rows = np.frombuffer(block, "<i8")
        if offset == span.start:
            first = lowest = int(rows[0])
        position = first + (offset - span.start) // 8
        in_order = in_order and bool((rows == np.arange(position, position + len(rows))).all())
        lowest = min(lowest, int(rows.min()))
        crc = google_crc32c.extend(crc, block)
    # An id below row 0 is left to whoever reads it, and its name.
    return max(lowest, 0), in_order and first >= 0, crc
