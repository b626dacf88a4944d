"""Keras 2 SavedModels (tf-keras): finds a tower's lookup and embedding without building a Keras object.

`saved_model.pb` is a `SavedModel` (tensorflow/core/protobuf/saved_model.proto, meta_graph.proto,
saved_object_graph.proto). Its object graph is a tree of named children: root → `user_layer` → … → `embeddings` (a
variable) and → `lookup_table` (a resource). The lookup's `_initialize` function says where the ids are: two
captured constants (ids and their rows) or an asset (a file with an id per line). The bytes of a variable are found
through the checkpoint's own object graph (trackable_object_graph.proto).
"""

from __future__ import annotations

import io
import json
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from beam_pipeline.errors import ArtifactMissingError, CorruptFileError, NotAModelError, TowerMissingError
from beam_pipeline.files import ByteFile, OpenFile, join
from beam_pipeline.formats import checkpoint, wire
from beam_pipeline.formats.artifact import Checksum, Encoding, Matrix, Tower, Vocabulary
from beam_pipeline.formats.wire import Span

_DT_STRING, _DT_INT64 = 7, 9
_IMPORT_OPS = ("LookupTableImportV2", "InitializeTableV2")
_FILE_OP = "InitializeTableFromTextFileV2"
_WHOLE_LINE, _LINE_NUMBER = -2, -1


@dataclass
class _Node:
    """A `SavedObject`; `kind` is the field number of its oneof."""

    kind: int = 0
    content: Span = field(default=Span(0, 0))
    children: dict[str, int] = field(default_factory=dict)


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
        graphs = list(wire.spans(self._file, Span(0, self._file.size), 2))
        if not graphs:
            raise CorruptFileError(f"{self._file.path} holds no graph; log the model again")
        parts = {number: value for number, value in wire.scan(self._file, graphs[0]) if isinstance(value, Span)}
        self._graph = parts.get(2, Span(0, 0))
        self._assets = [
            wire.text(self._file, name)
            for asset in wire.spans(self._file, graphs[0], 6)
            for name in wire.spans(self._file, asset, 2)
        ]
        if 7 not in parts or 2 not in parts:
            raise NotAModelError(f"{self._file.path} holds no objects: saved by TensorFlow 1? save it with tf-keras")
        self._nodes: list[_Node] = []
        self._functions: dict[str, Span] = {}
        self._tensors: dict[str, Span] | None = None
        self._read_objects(parts[7])
        self._bundle = checkpoint.read_bundle(join(folder, "variables", "variables"), open_file)
        self._checkpoint_nodes = self._read_checkpoint_graph()

    def tower(self, name: str, layer: str, *, include_oov: bool = False) -> Tower:
        """Returns the tower whose layer has the attribute path `layer`, such as "user_layer" or "towers.user".

        Raises:
            TowerMissingError: no such layer, or it does not hold one lookup and one embedding.
            NotAModelError: it holds them in a form that cannot be read.
            CorruptFileError: the files contradict each other.
        """
        path = layer.replace("/", ".").split(".")
        node = self._walk(path)
        lookups, embeddings = self._parts(node) if node is not None else ([], [])
        if len(lookups) != 1 or len(embeddings) != 1:
            problem = (
                f"holds {len(lookups)} lookup(s) and {len(embeddings)} embedding(s) instead of one of each"
                if node is not None
                else "does not exist"
            )
            raise TowerMissingError(
                f"tower {name!r}: layer {layer!r} {problem} in {self.folder}; layers that are towers: "
                f"{', '.join(self.tower_layers()) or 'none'}; choose with --tower {name}=LAYER"
            )
        matrix = self._matrix([*path, *embeddings[0]])
        vocabulary = self._vocabulary([*path, *lookups[0]])
        if include_oov:
            vocabulary = replace(vocabulary, special_tokens=self._special_tokens([*path, *lookups[0][:-1]], vocabulary))
        return Tower(name, layer, matrix, vocabulary)

    def tower_layers(self) -> list[str]:
        """Returns the paths of all layers that hold exactly one lookup and one embedding, outermost ones only."""
        found = []
        queue: deque[tuple[int, tuple[str, ...]]] = deque([(0, ())])
        seen = {0}
        while queue:
            node, path = queue.popleft()
            lookups, embeddings = self._parts(node)
            if path and len(lookups) == len(embeddings) == 1:
                found.append(".".join(path))
            elif lookups and embeddings:
                queue.extend((child, (*path, name)) for name, child in self._objects(node, seen))
        return sorted(found)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    # The object graph.

    def _read_objects(self, span: Span) -> None:
        for number, value in wire.scan(self._file, span):
            if not isinstance(value, Span):
                continue
            if number == 1:
                node = _Node()
                for kind, content in wire.scan(self._file, value):
                    if not isinstance(content, Span):
                        continue
                    if kind == 1:
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

    def _parts(self, root: int) -> tuple[list[list[str]], list[list[str]]]:
        """Returns the paths, from a layer, of all lookup tables and all embedding variables below it."""
        lookups, embeddings = [], []
        queue: deque[tuple[int, list[str]]] = deque([(root, [])])
        seen = {root}
        while queue:
            node, path = queue.popleft()
            children = self._nodes[node].children
            table, variable = children.get("lookup_table"), children.get("embeddings")
            if table is not None and self._nodes[table].kind == _RESOURCE:
                lookups.append([*path, "lookup_table"])
            if variable is not None and self._nodes[variable].kind == _VARIABLE:
                embeddings.append([*path, "embeddings"])
            queue.extend((child, [*path, name]) for name, child in self._objects(node, seen))
        return lookups, embeddings

    # The embedding matrix.

    def _read_checkpoint_graph(self) -> list[tuple[dict[str, int], str]]:
        """Returns (children, checkpoint key) of each node of the checkpoint's object graph."""
        data = self._bundle.read_string(checkpoint.OBJECT_GRAPH_KEY, self._open)
        file = ByteFile(f"{self._bundle.prefix} ({checkpoint.OBJECT_GRAPH_KEY})", io.BytesIO(data), len(data))
        nodes = []
        for span in wire.spans(file, Span(0, file.size), 1):
            children: dict[str, int] = {}
            key = ""
            for number, value in wire.scan(file, span):
                if number == 1 and isinstance(value, Span):
                    child, name = self._reference(file, value)
                    children[name] = child
                elif number == 2 and isinstance(value, Span):
                    attribute = {n: wire.text(file, v) for n, v in wire.scan(file, value) if isinstance(v, Span)}
                    if attribute.get(1) == "VARIABLE_VALUE":
                        key = attribute.get(3, "")
            nodes.append((children, key))
        return nodes

    def _matrix(self, path: list[str]) -> Matrix:
        where = f"{self._bundle.prefix}.index: embedding {'.'.join(path)!r}"
        node = 0
        for name in path:
            children = self._checkpoint_nodes[node][0] if node < len(self._checkpoint_nodes) else {}
            if name not in children:
                raise CorruptFileError(f"{where} is in the graph but not in the checkpoint; log the model again")
            node = children[name]
        entry = self._bundle.entries.get(self._checkpoint_nodes[node][1] if node < len(self._checkpoint_nodes) else "")
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
        if matrix.rows * matrix.row_bytes != entry.size:
            raise CorruptFileError(f"{where} has {entry.size:,} bytes, which do not fit its shape {list(entry.shape)}")
        with self._open(matrix.path) as data:
            data.read(entry.offset + entry.size, 0)  # Raises, before anything is written, if the file is too short.
        return matrix

    # The ids.

    def _vocabulary(self, path: list[str]) -> Vocabulary:
        where = f"{self._file.path}: lookup {'.'.join(path)!r}"
        table = self._walk(path)
        initializer = self._nodes[table].children.get("_initialize") if table is not None else None
        if initializer is None or self._nodes[initializer].kind != _FUNCTION:
            raise NotAModelError(f"{where} has no initializer: its ids are not in the artifact")
        names = list(wire.spans(self._file, self._nodes[initializer].content, 1))
        function = wire.text(self._file, names[0]) if names else ""
        if function not in self._functions:
            raise CorruptFileError(f"{where}: its initializer is missing; log the model again")
        captured = wire.integers(self._file, self._functions[function], 2)
        op, inputs, attributes = self._initializer(function, where)
        # The function's arguments are what it captured, in the order of `bound_inputs`.
        nodes = [captured[i] for i in inputs if i < len(captured)]
        if len(nodes) != len(inputs) or any(node >= len(self._nodes) for node in nodes):
            raise CorruptFileError(f"{where}: its initializer names objects that are not there")
        if op == _FILE_OP:
            return self._file_vocabulary(nodes[1], attributes, where)
        return self._constant_vocabulary(nodes[1], nodes[2], where)

    def _initializer(self, function: str, where: str) -> tuple[str, list[int], Mapping[str, int]]:
        """Returns (op, argument number of each of its inputs, its integer attributes) of an initializer function."""
        for library in wire.spans(self._file, self._graph, 2):
            for definition in wire.spans(self._file, library, 1):
                signature = next(wire.spans(self._file, definition, 1), None)
                if signature is None or self._string(signature, 1) != function:
                    continue
                arguments = [self._string(argument, 1) for argument in wire.spans(self._file, signature, 2)]
                for node in wire.spans(self._file, definition, 3):
                    op = self._string(node, 2)
                    if op == _FILE_OP or op in _IMPORT_OPS:
                        inputs = [wire.text(self._file, span) for span in wire.spans(self._file, node, 3)]
                        if len(inputs) < (2 if op == _FILE_OP else 3) or any(i not in arguments for i in inputs):
                            raise CorruptFileError(f"{where}: its initializer has other inputs than its arguments")
                        return op, [arguments.index(name) for name in inputs], self._integer_attributes(node)
        raise NotAModelError(f"{where} is initialized in a way that is not known: neither from a list nor from a file")

    def _integer_attributes(self, node: Span) -> dict[str, int]:
        attributes = {}
        for entry in wire.spans(self._file, node, 5):
            value = next(wire.spans(self._file, entry, 2), None)
            for number, content in wire.scan(self._file, value) if value is not None else ():
                if number == 3 and isinstance(content, int):  # AttrValue.i, two's complement in 64 bits
                    attributes[self._string(entry, 1)] = content - (1 << 64) if content >> 63 else content
        return attributes

    def _file_vocabulary(self, node: int, attributes: Mapping[str, int], where: str) -> Vocabulary:
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
        path = join(self.folder, "assets", self._assets[index])
        with self._open(path) as file:
            return Vocabulary(path, Span(0, file.size), Encoding.LINES, first_row=attributes.get("offset", 0))

    def _constant_vocabulary(self, keys: int, values: int, where: str) -> Vocabulary:
        ids, count, ids_type = self._constant(keys, where)
        rows, row_count, rows_type = self._constant(values, where)
        if ids_type != _DT_STRING or rows_type != _DT_INT64:
            raise NotAModelError(f"{where} maps TensorFlow type {ids_type} to {rows_type}; only strings are supported")
        if count != row_count:
            raise CorruptFileError(f"{where} has {count:,} ids and {row_count:,} rows; log the model again")
        content = next(wire.spans(self._file, rows, 4), None)
        if content is not None:
            if content.end - content.start != 8 * count or not count:
                raise CorruptFileError(
                    f"{where}: its rows have {content.end - content.start:,} bytes, not {8 * count:,}"
                )
            first_row = int.from_bytes(self._file.read(content.start, 8), "little", signed=True)
        else:  # A list of one is written as a number instead.
            numbers = wire.integers(self._file, rows, 10)
            if count > 1 or len(numbers) != count:
                raise NotAModelError(f"{where}: its rows are not stored as a plain array")
            first_row = numbers[0] if numbers else 0
        if not 0 <= first_row < 1 << 62:
            raise CorruptFileError(f"{where}: its first id has row {first_row}")
        first = wire.position(self._file, ids, 8) if count else ids.end
        if first is None:
            raise NotAModelError(f"{where}: its ids are not stored as a list of strings")
        return Vocabulary(
            self._file.path, Span(first, ids.end), Encoding.PROTOBUF, first_row, count, row_numbers=content
        )

    def _special_tokens(self, path: list[str], vocabulary: Vocabulary) -> tuple[str, ...]:
        """Returns names for the rows before the first id, from the lookup's config in `keras_metadata.pb`.

        The file is Keras's `SavedMetadata` (tf_keras/protobuf/saved_metadata.proto): of each object the node number
        (field 2) and a JSON config (field 5). The mask token comes first, then one row per out-of-vocabulary bucket.
        """
        node = self._walk(path)
        with self._open(join(self.folder, "keras_metadata.pb")) as file:
            for entry in wire.spans(file, Span(0, file.size), 1):
                fields = dict(wire.scan(file, entry))
                metadata = fields.get(5)
                if fields.get(2) != node or not isinstance(metadata, Span):
                    continue
                try:
                    config = json.loads(wire.text(file, metadata))["config"]
                    mask, oov, buckets = config["mask_token"], config["oov_token"], config["num_oov_indices"]
                except (ValueError, KeyError, TypeError) as error:
                    raise CorruptFileError(f"{file.path}: no lookup's config for {'.'.join(path)!r}") from error
                # Rows are told apart: ids are unique. An empty mask token is Keras's old default, and no id.
                tokens = [] if mask is None else [str(mask) or "[MASK]"]
                tokens += [oov if bucket == 0 else f"{oov}:{bucket}" for bucket in range(buckets)]
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
                                self._tensors[self._string(node, 1)] = tensor
        return self._tensors

    def _string(self, message: Span, number: int) -> str:
        span = next(wire.spans(self._file, message, number), None)
        return wire.text(self._file, span) if span is not None else ""
