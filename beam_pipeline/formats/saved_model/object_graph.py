"""The objects of a SavedModel: children by name, variables and where their bytes are, functions, constants.

`saved_model.pb` is a `SavedModel` (tensorflow/core/protobuf/saved_model.proto, meta_graph.proto,
saved_object_graph.proto). Its object graph is a tree of named children: root → `user_layer` → … → `embeddings` (a
variable) and → `lookup_table` (a resource). The bytes of a variable are found through the checkpoint's own object
graph (trackable_object_graph.proto). Nothing is built of it.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from beam_pipeline.errors import ArtifactMissingError, CorruptFileError, NotAModelError, UnsupportedModelError
from beam_pipeline.files import ByteFile, OpenFile, join
from beam_pipeline.formats import protobuf
from beam_pipeline.formats.protobuf import Span
from beam_pipeline.formats.saved_model import checkpoint
from beam_pipeline.formats.saved_model.functions import FunctionLibrary

_MAX_OBJECTS = 1_000_000
"""Objects, their children's names, functions, constants: half a kilobyte of memory each, for a few bytes of a file."""

USER_OBJECT, ASSET, FUNCTION, VARIABLE, BARE_FUNCTION, CONSTANT, RESOURCE = 4, 5, 6, 7, 8, 9, 10
"""Kinds of objects: field numbers of `SavedObject`'s oneof."""


@dataclass
class Node:
    """A `SavedObject`.

    Attributes:
        kind: one of the above, or 0.
        content: its own message.
        children: name → number of the node.
        shape: of a variable of floats, once `is_read`.
    """

    kind: int = 0
    content: Span = field(default=Span(0, 0))
    children: dict[str, int] = field(default_factory=dict)
    shape: tuple[int, ...] | None = None
    is_read: bool = False


class ObjectGraph:
    """The object graph of a SavedModel directory.

    Attributes:
        folder: path of the directory.
        open_file: opens files in it.
        file: its `saved_model.pb`.
        nodes: the objects; the first is the model.
        functions: the concrete functions, by name.
        bundle: the checkpoint.
    """

    def __init__(self, folder: str, open_file: OpenFile) -> None:
        """Reads the object graph and the checkpoint's index.

        Raises:
            NotAModelError: the folder holds no `saved_model.pb`.
            CorruptFileError: a file contradicts its format.
        """
        self.folder = folder
        self.open_file = open_file
        try:
            self.file = open_file(join(folder, "saved_model.pb"))
        except ArtifactMissingError as error:
            raise NotAModelError(
                f"{folder} does not hold a model: {error}; name its folder inside the run with --artifact_path"
            ) from error
        self._counted = 0
        graph = next(protobuf.spans(self.file, Span(0, self.file.size), 2), None)
        if graph is None:
            raise CorruptFileError(f"{self.file.path} holds no graph; log the model again")
        # MetaGraphDef: graph_def (2), asset_file_def (6), object_graph_def (7), which TensorFlow 1 does not write.
        parts = {number: value for number, value in protobuf.scan(self.file, graph) if isinstance(value, Span)}
        self._graph = parts.get(2, Span(0, 0))
        self._assets = []
        for asset in protobuf.spans(self.file, graph, 6):
            self._count()
            self._assets += [protobuf.text(self.file, name) for name in protobuf.spans(self.file, asset, 2)]
        if 7 not in parts or 2 not in parts:
            raise UnsupportedModelError(
                f"{self.file.path} holds no objects: saved by TensorFlow 1? save it with tf-keras"
            )
        self.nodes: list[Node] = []
        self.functions: dict[str, Span] = {}
        self._tensors: dict[str, Span] | None = None
        self._library: FunctionLibrary | None = None
        self._parents: dict[int, tuple[int, str]] | None = None
        self._read_objects(parts[7])
        self.bundle = checkpoint.read_bundle(join(folder, "variables", "variables"), open_file)
        self._checkpoint_nodes = self._read_checkpoint_graph()

    def walk(self, path: list[str]) -> int | None:
        """Returns the object of that path from the root, if there is one."""
        node = 0
        for name in path:
            if name not in self.nodes[node].children:
                return None
            node = self.nodes[node].children[name]
        return node

    def objects(self, node: int, seen: set[int]) -> Iterator[tuple[str, int]]:
        """Yields the children that are Keras objects and were not met before; `keras_api` only lists them again."""
        for name, child in self.nodes[node].children.items():
            if child not in seen and name != "keras_api" and self.nodes[child].kind == USER_OBJECT:
                seen.add(child)
                yield name, child

    def below(self, root: int) -> Iterator[int]:
        """Yields an object and all Keras objects inside of it, each once, outer ones first."""
        queue, seen = deque([root]), {root}
        while queue:
            node = queue.popleft()
            yield node
            queue.extend(child for _, child in self.objects(node, seen))

    def path(self, node: int) -> list[str]:
        """Returns a path from the root to an object: the shortest, since all are the same to the checkpoint."""
        if self._parents is None:
            self._parents = {0: (0, "")}
            queue = deque([0])
            while queue:
                parent = queue.popleft()
                for name, child in self.nodes[parent].children.items():
                    if child not in self._parents:
                        self._parents[child] = (parent, name)
                        queue.append(child)
        path = []
        while node:
            if node not in self._parents:
                raise CorruptFileError(f"{self.file.path}: object {node:,} belongs to no other; log the model again")
            node, name = self._parents[node]
            path.append(name)
        return path[::-1]

    def shape(self, node: int) -> tuple[int, ...] | None:
        """Returns the shape of a variable of floats; None if the object is anything else."""
        variable = self.nodes[node]
        if variable.kind == VARIABLE and not variable.is_read:
            dtype, sizes = checkpoint.read_type(self.file, variable.content)
            variable.shape = tuple(sizes) if dtype in checkpoint.DTYPES else None
            variable.is_read = True
        return variable.shape

    def is_list(self, node: int) -> bool:
        """Whether an object may be a list of ids: a variable of strings or integers in one dimension, or a constant."""
        if self.nodes[node].kind != VARIABLE:
            return self.nodes[node].kind == CONSTANT
        dtype, sizes = checkpoint.read_type(self.file, self.nodes[node].content)
        return dtype in checkpoint.ID_TYPES and len(sizes) == 1

    def is_matrix(self, node: int) -> bool:
        """Whether an object is a variable of floats in two dimensions."""
        return len(self.shape(node) or ()) == 2

    def matrices(self, root: int) -> set[int]:
        """Returns all matrices of an object, whatever they are called."""
        children = (child for node in self.below(root) for child in self.nodes[node].children.values())
        return {node for node in (root, *children) if self.is_matrix(node)}

    def keys(self, node: int) -> dict[str, str] | None:
        """Returns the checkpoint key of each attribute of an object; None if the checkpoint does not know it."""
        number = 0
        for name in self.path(node):
            children = self._checkpoint_nodes[number][0] if number < len(self._checkpoint_nodes) else {}
            if name not in children:
                return None
            number = children[name]
        return self._checkpoint_nodes[number][1] if number < len(self._checkpoint_nodes) else {}

    def function(self, node: int | None) -> str | None:
        """Returns the name of the first concrete function of a function object."""
        if node is None or self.nodes[node].kind != FUNCTION:
            return None
        return next(iter(self.variants(node)), None)

    def variants(self, node: int) -> list[str]:
        """Returns the names of a function object's concrete functions: one for each way in which it was called."""
        if self.nodes[node].kind not in (FUNCTION, BARE_FUNCTION):
            return []
        names = [protobuf.text(self.file, span) for span in protobuf.spans(self.file, self.nodes[node].content, 1)]
        return [name for name in names if name in self.functions]

    def calls(self, node: int) -> list[list[str]]:
        """Returns the concrete functions of each function object that an object has."""
        found = (self.variants(child) for child in self.nodes[node].children.values())
        return [names for names in found if names]

    def captured(self, function: str) -> list[int]:
        """Returns the objects that a concrete function captured: its last arguments."""
        # SavedConcreteFunction.bound_inputs
        return protobuf.integers(self.file, self.functions[function], 2)

    @property
    def library(self) -> FunctionLibrary:
        """The functions that the graph has, which are found once."""
        if self._library is None:
            self._library = FunctionLibrary(self.file, self._graph)
        return self._library

    def asset(self, node: int, where: str) -> str:
        """Returns the path of an asset below `assets/`."""
        if self.nodes[node].kind != ASSET:
            raise CorruptFileError(f"{where}: its vocabulary file is not an asset of the model")
        indices = [value for number, value in protobuf.scan(self.file, self.nodes[node].content) if number == 1]
        index = indices[0] if indices and isinstance(indices[0], int) else 0
        if index >= len(self._assets):
            raise CorruptFileError(f"{where}: asset {index} of {len(self._assets)} is missing")
        return self._assets[index]

    def constant(self, node: int, where: str) -> tuple[Span, int, int]:
        """Returns (TensorProto, number of elements, data type) of a captured constant."""
        operation = self.string(self.nodes[node].content, 1) if self.nodes[node].kind == CONSTANT else None
        tensor = self._constants().get(operation or "")
        if tensor is None:
            raise CorruptFileError(f"{where}: constant {operation!r} is not in the graph; log the model again")
        dtype, sizes = checkpoint.read_type(self.file, tensor)
        if len(sizes) != 1:
            raise UnsupportedModelError(f"{where}: constant {operation!r} has shape {sizes}, not a list")
        return tensor, sizes[0], dtype

    def string(self, message: Span, number: int) -> str:
        """Returns a text field of a message in `saved_model.pb`, "" if it is not there."""
        span = next(protobuf.spans(self.file, message, number), None)
        return protobuf.text(self.file, span) if span is not None else ""

    def close(self) -> None:
        """Closes `saved_model.pb`."""
        self.file.close()

    def _count(self) -> None:
        """Counts something that is kept."""
        self._counted += 1
        if self._counted > _MAX_OBJECTS:
            raise CorruptFileError(f"{self.file.path} has more than {_MAX_OBJECTS:,} objects; log the model again")

    def _read_objects(self, span: Span) -> None:
        # SavedObjectGraph: nodes (1), each with its children (1) and one of the kinds above; concrete_functions (2).
        for number, value in protobuf.scan(self.file, span):
            if not isinstance(value, Span):
                continue
            self._count()
            if number == 1:
                node = Node()
                for kind, content in protobuf.scan(self.file, value):
                    if not isinstance(content, Span):
                        continue
                    if kind == 1:
                        self._count()
                        child, name = self._reference(self.file, content)
                        node.children[name] = child
                    elif USER_OBJECT <= kind <= RESOURCE:
                        node.kind, node.content = kind, content
                self.nodes.append(node)
            elif number == 2:
                entry = {number: part for number, part in protobuf.scan(self.file, value) if isinstance(part, Span)}
                if 1 in entry and 2 in entry:
                    self.functions[protobuf.text(self.file, entry[1])] = entry[2]
        if not self.nodes or any(c >= len(self.nodes) for node in self.nodes for c in node.children.values()):
            raise CorruptFileError(f"{self.file.path}: its object graph is incomplete; log the model again")

    @staticmethod
    def _reference(file: ByteFile, span: Span) -> tuple[int, str]:
        """Returns (node number, local name) of an ObjectReference."""
        node, name = 0, ""
        for number, value in protobuf.scan(file, span):
            if number == 1 and isinstance(value, int):
                node = value
            elif number == 2 and isinstance(value, Span):
                name = protobuf.text(file, value)
        return node, name

    def _read_checkpoint_graph(self) -> list[tuple[dict[str, int], dict[str, str]]]:
        """Returns (children, checkpoint key of each attribute) of each node of the checkpoint's object graph."""
        data = self.bundle.read_string(checkpoint.OBJECT_GRAPH_KEY, self.open_file)
        file = ByteFile(f"{self.bundle.prefix} ({checkpoint.OBJECT_GRAPH_KEY})", io.BytesIO(data), len(data))
        nodes = []
        # TrackableObjectGraph: nodes (1), each with children (1) and attributes (2): name (1), checkpoint_key (3).
        for span in protobuf.spans(file, Span(0, file.size), 1):
            children: dict[str, int] = {}
            keys: dict[str, str] = {}
            self._count()
            for number, value in protobuf.scan(file, span):
                self._count()
                if number == 1 and isinstance(value, Span):
                    child, name = self._reference(file, value)
                    children[name] = child
                elif number == 2 and isinstance(value, Span):
                    attribute = {
                        n: protobuf.text(file, v) for n, v in protobuf.scan(file, value) if isinstance(v, Span)
                    }
                    keys[attribute.get(1, "")] = attribute.get(3, "")
            nodes.append((children, keys))
        return nodes

    def _constants(self) -> dict[str, Span]:
        """Returns the TensorProto of each Const of the graph, by name."""
        if self._tensors is None:
            self._tensors = {}
            for node in protobuf.spans(self.file, self._graph, 1):
                if self.string(node, 2) != "Const":
                    continue
                for entry in protobuf.spans(self.file, node, 5):
                    if self.string(entry, 1) == "value":
                        for value in protobuf.spans(self.file, entry, 2):
                            for tensor in protobuf.spans(self.file, value, 8):
                                self._count()
                                self._tensors[self.string(node, 1)] = tensor
        return self._tensors
