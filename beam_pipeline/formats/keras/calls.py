"""The calls in the config of a Keras model, as functions that a trace follows: layers as TensorFlow's operations.

A Functional model's config names for each layer its calls and where their inputs come from (`inbound_nodes`), a
Sequential one has its layers in order. Layers that change nothing when a model serves (dropout) pass rows on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from beam_pipeline.formats.keras.config import EMBEDDING, INDEXES, LOOKUPS, TEXT, Config, Layer, is_reference
from beam_pipeline.formats.tails import SCALING, UNKNOWN, Function, Operation, Shape, State, Use, Value

_PASSING = frozenset(
    {
        "ActivityRegularization", "AlphaDropout", "BroadcastTo", "Cast", "Dropout", "ExpandDims", "Flatten",
        "GaussianDropout", "GaussianNoise", "GetItem", "Identity", "Masking", "Permute", "RepeatVector",
        "SlicingOpLambda", "SpatialDropout1D", "Squeeze", "StopGradient", "Transpose",
    }
)  # fmt: skip
"""Layers and operations that leave the values of a row as they are when a model serves."""
_NAMES = {
    "Absolute": "Abs", "Add": "AddV2", "Concatenate": "ConcatV2", "Divide": "RealDiv", "Matmul": "MatMul", "Max": "Max",
    "Multiply": "Mul", "Norm": "EuclideanNorm", "Power": "Pow", "Reciprocal": "Reciprocal", "Stack": "Pack",
    "Subtract": "Sub", "TrueDivide": "RealDiv", "Where": "SelectV2", "Tensordot": "MatMul", "Vdot": "MatMul",
    "Inner": "MatMul",
    # TFOpLambda of Keras 2, by its function.
    "__operators__.add": "AddV2", "add": "AddV2", "abs": "Abs", "concat": "ConcatV2", "divide": "RealDiv",
    "einsum": "Einsum", "matmul": "MatMul", "maximum": "Maximum", "multiply": "Mul", "norm": "EuclideanNorm",
    "reduce_mean": "Mean", "reduce_sum": "Sum", "rsqrt": "Rsqrt", "sqrt": "Sqrt", "square": "Square", "stack": "Pack",
    "subtract": "Sub", "truediv": "RealDiv", "squared_difference": "SquaredDifference", "pow": "Pow",
}  # fmt: skip
"""Names of Keras's layers and operations, and what TensorFlow calls them."""
_PASSING_FUNCTIONS = frozenset(
    {"cast", "expand_dims", "getitem", "identity", "reshape", "squeeze", "stop_gradient", "transpose"}
)
_LAST = (-1, 1, [-1], [1], None)
"""Axes of the values of a row: vectors are [rows, values], usually."""


class Calls:
    """The functions of a model's config.

    Args of the constructor:
        number: returns the number by which an embedding or a lookup is followed.
    """

    def __init__(self, number: Callable[[Layer], int]) -> None:
        self._number = number
        self._names: dict[Layer, str] = {}
        self._models: dict[str, Layer] = {}
        self._functions: dict[str, Function] = {}

    def add(self, model: Layer) -> str:
        """Returns the name of the function that a Functional or Sequential model's call is."""
        name = self._names.setdefault(model, str(len(self._names)))
        self._models[name] = model
        return name

    def function(self, name: str) -> Function | None:
        """Returns a function that was added, or a model inside of one."""
        if name not in self._functions and name in self._models:
            model = self._models[name]
            self._functions[name] = self._functional(model) if model.is_functional else self._sequential(model)
        return self._functions.get(name)

    def _sequential(self, model: Layer) -> Function:
        operations: dict[str, Operation] = {}
        at = ("input", 0)
        for layer in model.children:
            if layer.kind == "InputLayer":
                continue
            for operation in self._operations(layer, f"{_name(layer)}/{layer.position}", [at], {}):
                operations[operation.name] = operation
                at = operation.name, 0
        return Function(("input",), operations, (at,))

    def _functional(self, model: Layer) -> Function:
        operations: dict[str, Operation] = {}
        arguments = tuple(f"{name}/0" for name, _, _ in _references(model.settings.get("input_layers")))
        for layer in model.children:
            nodes = layer.config.get("inbound_nodes")
            for number, node in enumerate(nodes if isinstance(nodes, list) else []):
                name = f"{_name(layer)}/{number}"
                inputs = [(f"{source}/{call}", output) for source, call, output in _references(node)]
                inputs = self._by_name(layer, node, inputs)
                numbers = list(_numbers(node))
                for operation in self._operations(layer, name, inputs, _keywords(node), numbers):
                    operations[operation.name] = operation
        outputs = tuple(
            (f"{name}/{call}", output) for name, call, output in _references(model.settings.get("output_layers"))
        )
        return Function(arguments, operations, outputs)

    def _by_name(self, layer: Layer, node: Any, inputs: list[tuple[str, int]]) -> list[tuple[str, int]]:
        """Returns the inputs of a call in the order of the called model's, where both are dicts."""
        wanted = layer.settings.get("input_layers")
        given = node.get("args") if isinstance(node, dict) else None
        given = given[0] if isinstance(given, list) and len(given) == 1 else None
        if not isinstance(wanted, dict) or not isinstance(given, dict) or not wanted.keys() <= given.keys():
            return inputs
        return [(f"{name}/{call}", output) for key in wanted for name, call, output in _references(given[key])]

    def _operations(
        self,
        layer: Layer,
        name: str,
        inputs: Sequence[tuple[str, int]],
        keywords: Config,
        numbers: Sequence[float] = (),
    ) -> Iterator[Operation]:
        """Yields the operations of a layer's call, the last of which has the layer's outputs."""
        kind, settings = layer.kind, layer.settings
        constants = [Operation(f"{name}/number-{i}", "Const", value=Value(numbers=(n,))) for i, n in enumerate(numbers)]
        yield from constants
        sources = (*inputs, *((constant.name, 0) for constant in constants))
        if layer.is_graph:
            yield Operation(name, "PartitionedCall", tuple(inputs), bodies=(self.add(layer),))
        elif kind == EMBEDDING:
            rows = ((Use(self._number(layer), ""), State(Shape.ROW)),)
            yield Operation(f"{name}/matrix", "Const", value=Value(rows=rows))
            yield Operation(name, "GatherV2", ((f"{name}/matrix", 0), *inputs))
        elif kind in INDEXES:
            number = self._number(layer)
            rows = ((Use(number, ""), State(Shape.ROW)),)
            yield Operation(f"{name}/matrix", "Const", value=Value(rows=rows, matrix=number))
            yield Operation(f"{name}/scores", "MatMul", (*inputs, (f"{name}/matrix", 0)), is_transposed=True)
            yield Operation(name, "TopKV2", ((f"{name}/scores", 0),))
        elif kind in LOOKUPS or kind == TEXT:
            yield Operation(f"{name}/table", "Const", value=Value(table=self._number(layer)))
            found = f"{name}/found" if settings.get("output_mode", "int") != "int" else name
            words = ((f"{name}/words", 0),) if kind == TEXT else tuple(inputs)
            if kind == TEXT:
                yield Operation(f"{name}/words", "StringSplitV2", tuple(inputs))
            yield Operation(found, "LookupTableFindV2", ((f"{name}/table", 0), *words))
            if found != name:
                yield Operation(name, "OneHot", ((found, 0),))
        else:
            yield from self._simple(layer, name, sources, keywords)

    def _simple(
        self, layer: Layer, name: str, sources: tuple[tuple[str, int], ...], keywords: Config
    ) -> Iterator[Operation]:
        settings, kind = layer.settings, layer.kind
        function = str(settings.get("function")) if kind == "TFOpLambda" else ""
        last = function.rpartition(".")[2]
        kind = (function and (_NAMES.get(function) or _NAMES.get(last) or last)) or _NAMES.get(kind, kind)
        axis = keywords.get("axis", settings.get("axis", -1))
        if last in _PASSING_FUNCTIONS or kind in _PASSING or (kind == "Activation" and _is_linear(settings)):
            if kind == "Flatten" and _is_list(layer):
                yield Operation(name, "Flatten of a list", sources)
            else:
                yield Operation(name, "Identity", sources[:1])
        elif kind in ("UnitNormalization", "Normalize", "l2_normalize"):
            scales = axis in _LAST and settings.get("order", 2) == 2
            yield Operation(name, SCALING if scales else kind, sources[:1])
        elif kind == "Rescaling" and settings.get("offset", 0) == 0 and _is_number(settings.get("scale")):
            yield Operation(f"{name}/scale", "Const", value=Value(numbers=(float(settings["scale"]),)))
            yield Operation(name, "Mul", (*sources, (f"{name}/scale", 0)))
        elif kind == "Reshape":
            shape = settings.get("target_shape", settings.get("newshape"))
            whole = isinstance(shape, list) and shape and all(map(_is_number, shape))
            yield Operation(
                f"{name}/shape", "Const", value=Value(numbers=tuple(map(float, shape))) if whole else UNKNOWN
            )
            yield Operation(name, "Reshape", (*sources[:1], (f"{name}/shape", 0)))
        elif kind in ("ConcatV2", "EuclideanNorm", "Max", "Mean", "Sum"):
            axes = axis if isinstance(axis, list) else [axis]
            value = Value(numbers=tuple(float(n) for n in axes)) if all(map(_is_number, axes)) else UNKNOWN
            yield Operation(f"{name}/axis", "Const", value=value)
            yield Operation(name, kind, (*sources, (f"{name}/axis", 0)))
        else:
            yield Operation(name, kind, sources, is_transposed=keywords.get("transpose_b") is True)


def _name(layer: Layer) -> str:
    return str(layer.config.get("name", layer.settings.get("name"))).replace("/", "_")


def _is_linear(settings: Config) -> bool:
    return settings.get("activation") in ("linear", None)


def _is_list(layer: Layer) -> bool:
    """Whether what a layer flattens is more than one vector, by the shape that Keras noted when it was built."""
    build = layer.config.get("build_config")
    shape = build.get("input_shape") if isinstance(build, dict) else None
    return isinstance(shape, list) and len(shape) > 2 and any(size != 1 for size in shape[1:-1])


def _walk(call: Any) -> Iterator[tuple[str, Any]]:
    """Yields the tensors (as layer, call, output) and numbers of a call, in the order of its arguments."""
    stack = [call]
    while stack:
        node = stack.pop()
        if is_reference(node):
            yield "tensor", (node[0].replace("/", "_"), node[1], node[2])
            stack += reversed(node[3:])
        elif isinstance(node, list):
            stack += reversed(node)
        elif isinstance(node, dict):
            config = node.get("config")
            history = config.get("keras_history") if isinstance(config, dict) else None
            if isinstance(history, list) and is_reference(history):
                yield "tensor", (history[0].replace("/", "_"), history[1], history[2])
            else:
                stack += [value for key, value in reversed(node.items()) if key not in ("axis", "name", "slice_spec")]
        elif _is_number(node):
            yield "number", float(node)


def _is_number(one: Any) -> bool:
    return type(one) is float or (type(one) is int and abs(one) < 1 << 53)


def _references(node: Any) -> list[tuple[str, int, int]]:
    return [value for kind, value in _walk(node) if kind == "tensor"]


def _numbers(node: Any) -> list[float]:
    return [value for kind, value in _walk(node) if kind == "number"]


def _keywords(node: Any) -> Config:
    """Returns the keyword arguments of a call."""
    if isinstance(node, dict):
        keywords = node.get("kwargs")
    else:
        keywords = node[-1] if isinstance(node, list) and node else None
        if isinstance(keywords, list) and keywords:
            keywords = keywords[-1]
    return keywords if isinstance(keywords, dict) else {}
