"""The functions in a SavedModel's graph: their operations, which inputs these take, and what a function returns.

A `FunctionDef` (tensorflow/core/framework/function.proto) has a signature, nodes (node_def.proto) and, for each output,
the node that it comes from. Nothing of it is run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from beam_pipeline.files import ByteFile
from beam_pipeline.formats import protobuf
from beam_pipeline.formats.protobuf import Span
from beam_pipeline.formats.saved_model import checkpoint
from beam_pipeline.formats.tails import BRANCHES, Function, Operation, Value

_LARGEST_CONSTANT = 1000
"""Bytes of a constant whose numbers are of interest: an axis, a shape, a factor."""
_MAX_NUMBERS = 16
_NUMPY_TYPES = {1: "<f4", 2: "<f8", 3: "<i4", 9: "<i8", 19: "<f2"}
_FLOATS, _DOUBLES, _INTEGERS = (5,), (6,), (7, 10)  # Fields of TensorProto.


class FunctionLibrary:
    """The functions of a graph, read when they are asked for."""

    def __init__(self, file: ByteFile, graph: Span) -> None:
        """Notes where each function is.

        Args:
            file: saved_model.pb.
            graph: its GraphDef.
        """
        self._file = file
        self._definitions: dict[str, Span] = {}
        self._functions: dict[str, Function] = {}
        for library in protobuf.spans(file, graph, 2):
            for definition in protobuf.spans(file, library, 1):
                signature = next(protobuf.spans(file, definition, 1), None)
                name = next(protobuf.spans(file, signature, 1), None) if signature else None
                if name:
                    self._definitions[protobuf.text(file, name)] = definition

    @property
    def definitions(self) -> Mapping[str, Span]:
        """The `FunctionDef` of each function, by name."""
        return self._definitions

    def function(self, name: str) -> Function | None:
        """Returns a function; None if the graph has none of that name."""
        if name not in self._functions and name in self._definitions:
            self._functions[name] = self._read(self._definitions[name])
        return self._functions.get(name)

    def _read(self, definition: Span) -> Function:
        arguments: list[str] = []
        names: list[str] = []
        operations: dict[str, Operation] = {}
        returned: dict[str, tuple[str, int]] = {}
        # FunctionDef: signature (1), node_def (3), ret (4), a map from the name of an output to what it is.
        for number, value in protobuf.scan(self._file, definition):
            if not isinstance(value, Span):
                continue
            if number == 1:
                arguments += self._names(value, 2)
                names += self._names(value, 3)
            elif number == 3:
                operation = self._operation(value)
                operations[operation.name] = operation
            elif number == 4:
                entry = {part: text for part, text in self._texts(value) if part in (1, 2)}
                returned[entry.get(1, "")] = _source(entry.get(2, ""))
        return Function(tuple(arguments), operations, tuple(returned[name] for name in names if name in returned))

    def _names(self, signature: Span, number: int) -> Iterator[str]:
        """Yields the names of a signature's arguments (2) or outputs (3)."""
        for argument in protobuf.spans(self._file, signature, number):
            for name in protobuf.spans(self._file, argument, 1):
                yield protobuf.text(self._file, name)

    def _texts(self, message: Span) -> Iterator[tuple[int, str]]:
        for number, value in protobuf.scan(self._file, message):
            if isinstance(value, Span):
                yield number, protobuf.text(self._file, value)

    def _operation(self, node: Span) -> Operation:
        name, kind, inputs = "", "", []
        attributes: dict[str, Span] = {}
        # NodeDef: name (1), op (2), input (3), attr (5).
        for number, content in protobuf.scan(self._file, node):
            if not isinstance(content, Span):
                continue
            if number == 1:
                name = protobuf.text(self._file, content)
            elif number == 2:
                kind = protobuf.text(self._file, content)
            elif number == 3:
                source = protobuf.text(self._file, content)
                if not source.startswith("^"):  # a control input
                    inputs.append(_source(source))
            elif number == 5:
                entry = {part: value for part, value in protobuf.scan(self._file, content) if isinstance(value, Span)}
                if 1 in entry and 2 in entry:
                    attributes[protobuf.text(self._file, entry[1])] = entry[2]
        value = self._constant(attributes["value"]) if kind == "Const" and "value" in attributes else Value()
        first, second = (
            any(self._is_true(attributes[flag]) for flag in flags if flag in attributes)
            for flags in (("transpose_a", "adj_x"), ("transpose_b", "adj_y"))
        )
        if kind == "Einsum" and "equation" in attributes:
            first, second = self._are_transposed(attributes["equation"])
        return Operation(name, kind, tuple(inputs), value, self._bodies(kind, attributes), second, first)

    def _are_transposed(self, attribute: Span) -> tuple[bool, bool]:
        """Returns what a matrix product would say of its two inputs, from the equation of an Einsum."""
        equation = next((text for number, text in self._texts(attribute) if number == 2), "")
        inputs, _, output = equation.partition("->")
        first, _, second = inputs.partition(",")
        return first[-1:] in output, second[-1:] not in output

    def _bodies(self, kind: str, attributes: Mapping[str, Span]) -> tuple[str, ...]:
        """Returns the functions that a node calls: by its attributes, or by its own kind."""
        if kind in self._definitions:
            return (kind,)
        called = []
        for name in ("f", "then_branch", "else_branch", "branches", "body"):
            for number, value in protobuf.scan(self._file, attributes[name]) if name in attributes else ():
                if number == 10 and isinstance(value, Span):  # AttrValue.func
                    called += [text for part, text in self._texts(value) if part == 1]
                elif number == 1 and isinstance(value, Span) and kind in BRANCHES:  # AttrValue.list.func
                    for function in protobuf.spans(self._file, value, 9):
                        called += [text for part, text in self._texts(function) if part == 1]
        return tuple(called)

    def _is_true(self, attribute: Span) -> bool:
        return any(number == 5 and value == 1 for number, value in protobuf.scan(self._file, attribute))

    def _constant(self, attribute: Span) -> Value:
        """Returns the numbers of a small constant, and where a list is that may be one of ids."""
        tensor = next(protobuf.spans(self._file, attribute, 8), None)
        if tensor is None:
            return Value()
        kind, sizes = checkpoint.read_type(self._file, tensor)
        ids = tensor if kind in checkpoint.ID_TYPES and len(sizes) == 1 else None
        return replace(self._numbers(tensor), ids=ids)

    def _numbers(self, tensor: Span) -> Value:
        if tensor.end - tensor.start > _LARGEST_CONSTANT:
            return Value()
        kind, size = 0, 1
        numbers: list[float] = []
        # TensorProto: dtype (1), tensor_shape (2), and the values as tensor_content (4) or a list of their type.
        for number, value in protobuf.scan(self._file, tensor):
            if number == 1 and isinstance(value, int):
                kind = value
            elif number == 2 and isinstance(value, Span):
                for length in checkpoint.read_shape(self._file, value):
                    size *= length
            elif number == 4 and isinstance(value, Span) and kind in _NUMPY_TYPES:
                numbers += _array(protobuf.read(self._file, value), _NUMPY_TYPES[kind])
            elif number in _INTEGERS:
                values = protobuf.packed(self._file, value) if isinstance(value, Span) else [value]
                numbers += [one - (1 << 64) if one >> 63 else one for one in values]
            elif number in (*_FLOATS, *_DOUBLES):
                width = 4 if number in _FLOATS else 8
                raw = protobuf.read(self._file, value) if isinstance(value, Span) else value.to_bytes(width, "little")
                numbers += _array(raw, f"<f{width}")
        if not numbers or size > _MAX_NUMBERS:
            return Value()
        return Value(numbers=tuple(numbers + numbers[-1:] * (size - len(numbers))))  # Equal ones are written once.


def _source(text: str) -> tuple[str, int]:
    """Returns (node or argument, number of its output) of `node:output:number` or `argument`."""
    name, _, output = text.partition(":")
    number = output.rpartition(":")[2]
    return name, int(number) if number.isdecimal() and len(number) < 9 else 0


def _array(raw: bytes, kind: str) -> list[float]:
    whole = len(raw) // np.dtype(kind).itemsize * np.dtype(kind).itemsize
    return [float(number) for number in np.frombuffer(raw[:whole], kind)]
