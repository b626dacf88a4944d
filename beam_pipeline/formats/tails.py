"""How a model uses the rows of an embedding after they are gathered, whatever format its graph came from.

The graph is followed from the arguments of a call to its outputs. Of every tensor the trace knows which embeddings'
rows it holds and in which state: the row itself, the row times a factor of the row, something else. Where two towers
meet, or where a call returns, the state says whether the row is the vector that the model serves.

Operations have TensorFlow's names (https://www.tensorflow.org/mlir/tf_ops); readers of other formats translate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import NamedTuple

from beam_pipeline.errors import CorruptFileError
from beam_pipeline.formats.model import Ending, Tail
from beam_pipeline.formats.protobuf import Span

_MAX_DEPTH = 60
"""Functions that call each other; a model inside of a model is some ten."""
_MAX_NAMED = 12
"""Operations of a tail that a message names."""

GATHERS = frozenset({"ResourceGather", "ResourceGatherNd", "GatherV2", "Gather", "GatherNd"})
BRANCHES = frozenset({"If", "StatelessIf", "Case", "StatelessCase"})
_LOOPS = frozenset({"While", "StatelessWhile"})
_PASSING = frozenset(
    {
        "BroadcastTo", "Cast", "CheckNumerics", "EnsureShape", "ExpandDims", "Identity", "IdentityN", "ParallelConcat",
        "PlaceholderWithDefault", "PreventGradient", "RaggedTensorToTensor", "ReadVariableOp", "Reshape",
        "Scann>TensorsToScann", "Slice", "Snapshot", "Split", "SplitV", "Squeeze", "StopGradient", "StridedSlice",
        "Tile", "Transpose", "Unpack",
    }
)  # fmt: skip
"""Operations that leave the values of a row as they are."""
_WITHOUT_VALUES = frozenset(
    {"Assert", "IsFinite", "IsNan", "OnesLike", "Print", "PrintV2", "Rank", "Shape", "ShapeN", "Size", "ZerosLike"}
)
"""Operations whose result does not depend on the values of a row."""
_SELECTS = frozenset({"Select", "SelectV2"})
_MULTIPLICATIONS = frozenset({"Mul", "MulNoNan"})
_DIVISIONS = frozenset({"Div", "DivNoNan", "RealDiv"})
_MATRIX_PRODUCTS = frozenset({"BatchMatMul", "BatchMatMulV2", "BatchMatMulV3", "Einsum", "MatMul", "Dot"})
_DIFFERENCES = frozenset({"SquaredDifference", "Sub"})
_PAIRINGS = _MULTIPLICATIONS | _MATRIX_PRODUCTS | _DIFFERENCES
"""Operations that compare two vectors of one embedding, such as the vectors of two items."""
_POWERS = frozenset({"Abs", "Pow", "Square"})
_REDUCTIONS = frozenset({"EuclideanNorm", "Max", "Mean", "Sum"})
_OF_NORMS = frozenset(
    {
        "Abs", "Add", "AddV2", "Greater", "GreaterEqual", "Inv", "Less", "LessEqual", "Maximum", "Minimum", "Pow",
        "Reciprocal", "Rsqrt", "Sqrt", "Square", "Sub", *_MULTIPLICATIONS, *_DIVISIONS, *_REDUCTIONS,
    }
)  # fmt: skip
_OF_SCORES = frozenset({"Add", "AddV2", "BiasAdd", "Mean", "Sum", *_MULTIPLICATIONS, *_DIVISIONS})
"""Operations after which a sum of products is still a score."""
_SEARCHES = frozenset({"Scann>ScannSearch", "Scann>ScannSearchBatched"})
"""Operations that compare something with all rows of a matrix and number the best (scann/scann_ops/cc/ops)."""
_TOP = frozenset({"ApproxTopK", "ArgMax", "TopK", "TopKV2"})
_WHOLE = frozenset(
    {"Cast", "CheckNumerics", "EnsureShape", "ExpandDims", "Identity", "PreventGradient", "ReadVariableOp", "Snapshot",
     "Scann>TensorsToScann", "Squeeze", "StopGradient"}
)  # fmt: skip
"""Operations after which the rows of a matrix, or the elements of a list, are still all there and in their order."""
_EACH_SCORE = frozenset(
    {
        "Add", "AddV2", "BiasAdd", "Exp", "Log", "LogSoftmax", "Neg", "Reshape", "Sigmoid", "Softmax", "Sub", "Tanh",
        "Transpose", *_MULTIPLICATIONS, *_DIVISIONS, *_SELECTS, *_WHOLE,
    }
)  # fmt: skip
"""Operations after which the scores of all rows are still all there and in their order."""
_SPLITS = frozenset(
    {"StringNGrams", "StringSplit", "StringSplitV2", "UnicodeDecode", "UnicodeDecodeWithOffsets", "WordpieceTokenize"}
)
"""Operations that turn one text into several words."""
OPAQUE = frozenset({"EagerPyFunc", "PyFunc", "PyFuncStateless", "XlaCallModule", "XlaLaunch"})
"""Operations whose work is not in the graph."""
SCALING = "Normalize"
"""A layer that divides a vector by its length; of Keras, TensorFlow has no such operation."""


class Shape(IntEnum):
    """What a tensor holds of a row; the larger, the further it is from the row."""

    ROW = 0
    SCALED = 1
    FACTOR = 2
    """A number of the row alone, such as its norm."""
    SQUARES = 3
    """A function of each value, on the way to such a number."""
    SCORES = 4
    """Products with the rows of another matrix, which an index sorts."""
    OPAQUE = 5
    CHANGED = 6


_VECTORS = tuple(shape for shape in Shape if shape != Shape.FACTOR)


class State(NamedTuple):
    """The shape that a row has taken, and the operations that it passed, each as (layer, operation)."""

    shape: Shape
    operations: tuple[tuple[str, str], ...] = ()


class Use(NamedTuple):
    """A place where rows of an embedding are gathered; "" is the whole matrix."""

    embedding: int
    place: str


@dataclass(frozen=True)
class Value:
    """What is known of a tensor.

    Attributes:
        rows: the embeddings' rows that it holds.
        numbers: its elements, if it is a small constant; one that is unknown is NaN.
        table: the lookup table that it is.
        is_text: whether it came from splitting text into words.
        is_one_hot: whether it is all zeros but for a one.
        is_gathered: whether it was gathered from something that is not followed, such as a bias per id.
        meetings: where towers met on the way to it.
        products: the meetings that it is the product of, not summed yet or not added to.
        matrix: the matrix that it is, with all of its rows.
        is_transposed: whether it is that transposed.
        scores: the matrices with all rows of which something was multiplied.
        best: the matrices whose best rows it numbers.
        ids: the list of ids that it is, all of them: the number of an object, or where in the file its tensor is.
    """

    rows: tuple[tuple[Use, State], ...] = ()
    numbers: tuple[float, ...] | None = None
    table: int | None = None
    is_text: bool = False
    is_one_hot: bool = False
    is_gathered: bool = False
    meetings: frozenset[str] = frozenset()
    products: frozenset[str] = frozenset()
    matrix: int | None = None
    is_transposed: bool = False
    scores: frozenset[int] = frozenset()
    best: frozenset[int] = frozenset()
    ids: int | Span | None = None

    @property
    def is_scalar(self) -> bool:
        """Whether it is one constant number."""
        return self.numbers is not None and len(self.numbers) == 1


UNKNOWN = Value()
SCALAR = Value(numbers=(float("nan"),))


Rivals = Callable[[int, int, bool], bool]
"""Whether two embeddings, combined by a product (True) or in another way, belong to different towers."""


@dataclass(frozen=True)
class Operation:
    """A node of a graph.

    Attributes:
        name: unique in its function; layers around it, separated by slashes, come first.
        kind: TensorFlow's name of the operation.
        inputs: names of arguments or nodes, with the number of the output that is taken.
        value: of a constant.
        bodies: functions that it calls.
        is_transposed: whether a matrix product takes its second matrix transposed.
        is_first_transposed: whether it takes its first matrix transposed.
    """

    name: str
    kind: str
    inputs: tuple[tuple[str, int], ...] = ()
    value: Value = UNKNOWN
    bodies: tuple[str, ...] = ()
    is_transposed: bool = False
    is_first_transposed: bool = False


@dataclass(frozen=True)
class Function:
    """A function of a graph: names of its arguments, its operations by name, and what it returns."""

    arguments: tuple[str, ...]
    operations: Mapping[str, Operation]
    outputs: tuple[tuple[str, int], ...]


@dataclass
class Meeting:
    """An operation that combines two towers.

    Attributes:
        operation: layer and operation.
        states: the state of each tower's rows at that operation.
        is_summed: whether a product was summed up to a dot product.
        is_biased: whether something of an id was added to it.
    """

    operation: tuple[str, str]
    states: dict[Use, State]
    is_summed: bool = False
    is_biased: bool = False


@dataclass(frozen=True)
class Returned:
    """What a call returns: the states of the rows that reach its outputs alone, and where towers met before."""

    states: tuple[tuple[Use, State], ...]
    meetings: frozenset[str]


class Steps:
    """A limit on the work that a graph may cause: a crafted one could take days."""

    def __init__(self, path: str, limit: int) -> None:
        self._path = path
        self._left = limit

    def take(self, number: int) -> None:
        """Counts steps.

        Raises:
            CorruptFileError: they are more than any real model takes.
        """
        self._left -= number
        if self._left < 0:
            raise CorruptFileError(f"{self._path}: its functions depend on each other too often; log the model again")


@dataclass
class Trace:
    """Follows rows through functions.

    Attributes:
        function: returns a function by its name, None if there is none.
        dimensions: values in a row, of each embedding that is followed.
        are_rivals: whether two embeddings belong to different towers, which meet.
        steps: bounds the work.
        keeps_changed: whether rows that were changed are followed, too.
        meetings: the operations where towers met, found so far.
        gathered: embeddings whose rows were gathered somewhere.
        words: tables that looked up words of a text.
        indexes: matrix → the lists from which ids of its best rows were taken.
    """

    function: Callable[[str], Function | None]
    dimensions: Mapping[int, int]
    are_rivals: Rivals
    steps: Steps
    keeps_changed: bool = True
    meetings: dict[str, Meeting] = field(default_factory=dict)
    gathered: set[int] = field(default_factory=set)
    words: set[int] = field(default_factory=set)
    indexes: dict[int, set[int | Span]] = field(default_factory=dict)
    _results: dict[tuple[str, tuple[Value, ...], str], tuple[Value, ...]] = field(default_factory=dict)

    def returned(self, name: str, arguments: Sequence[Value]) -> Returned:
        """Returns the states of the rows that a call of a function returns."""
        values = self._call(name, tuple(arguments), "", 0)
        states: dict[Use, State] = {}
        for value in values:
            for use, state in value.rows:
                if state.shape in _VECTORS:
                    state = _arrived(state)
                    states[use] = max(states.get(use, state), state, key=lambda one: one.shape)
        return Returned(tuple(states.items()), frozenset().union(*(value.meetings for value in values)))

    def _call(self, name: str, arguments: tuple[Value, ...], scope: str, depth: int) -> tuple[Value, ...]:
        function = self.function(name)
        if function is None or depth > _MAX_DEPTH:
            return ()
        key = name, arguments, scope
        if key not in self._results:
            self._results[key] = ()  # A function that calls itself gives nothing.
            self._results[key] = self._evaluated(function, name, arguments, scope, depth)
        return self._results[key]

    def _evaluated(
        self, function: Function, name: str, arguments: tuple[Value, ...], scope: str, depth: int
    ) -> tuple[Value, ...]:
        """Evaluates what the outputs depend on, inputs first, without recursion: chains may be long."""
        values: dict[str, tuple[Value, ...]] = {
            argument: (value,) for argument, value in zip(function.arguments, arguments, strict=False)
        }
        stack = [source for source, _ in function.outputs]
        begun = set[str]()
        while stack:
            node = stack.pop()
            operation = function.operations.get(node)
            if node in values or operation is None:
                continue
            if node not in begun:
                begun.add(node)
                self.steps.take(1 + len(operation.inputs))
                stack.append(node)
                stack += [source for source, _ in operation.inputs if source not in begun]
                continue
            inputs = [_output(values, source) for source in operation.inputs]
            self.steps.take(sum(len(value.rows) + len(value.scores) + len(value.best) for value in inputs))
            values[node] = self._apply(operation, inputs, f"{name}:{node}", scope, depth)
        return tuple(_output(values, source) for source in function.outputs)

    def _apply(
        self, operation: Operation, inputs: list[Value], place: str, scope: str, depth: int
    ) -> tuple[Value, ...]:
        kind = operation.kind
        if kind == "Const" or kind in _WITHOUT_VALUES:
            return (operation.value,)
        layers = [part for part in operation.name.split("/")[:-1] if part]
        layer = layers[-1] if layers else scope
        if operation.bodies and kind not in OPAQUE:
            return self._apply_bodies(operation, inputs, layer, depth)
        if kind == "IdentityN":
            return tuple(inputs)
        result = self._result(operation, inputs, place, (layer, kind))
        if result.rows and not self.keeps_changed:
            result = replace(result, rows=tuple(each for each in result.rows if each[1].shape != Shape.CHANGED))
        return (self._indexed(operation, inputs, result),)

    def _indexed(self, operation: Operation, inputs: list[Value], result: Value) -> Value:
        """Adds what concerns a search index: a matrix, the scores of its rows, the best of them, and their ids."""
        kind = operation.kind
        matrix, is_transposed, ids = None, False, None
        scores, best = frozenset[int](), frozenset[int]()
        if kind in _MATRIX_PRODUCTS:
            scores = compared(operation, inputs)
        elif kind in _TOP and inputs:
            best = inputs[0].scores
        elif kind in _SEARCHES:
            best = compared(operation, inputs)
        elif kind in GATHERS and len(inputs) > 1:
            if inputs[0].ids is not None:
                for each in inputs[1].best:
                    self.indexes.setdefault(each, set()).add(inputs[0].ids)
        elif inputs:
            first = inputs[0]
            if kind in _WHOLE:
                matrix, is_transposed, ids = first.matrix, first.is_transposed, first.ids
            elif kind == "Transpose":
                matrix, is_transposed = first.matrix, not first.is_transposed
            elif kind in (*_MULTIPLICATIONS, *_DIVISIONS, SCALING):
                matrices = [value for value in inputs if value.matrix is not None]
                if len({(value.matrix, value.is_transposed) for value in matrices}) == 1:
                    matrix, is_transposed = matrices[0].matrix, matrices[0].is_transposed
            if kind in _EACH_SCORE:
                scores = frozenset().union(*(value.scores for value in inputs))
            if kind in _PASSING or kind in _SELECTS:
                best = frozenset().union(*(value.best for value in inputs))
        return replace(result, matrix=matrix, is_transposed=is_transposed, scores=scores, best=best, ids=ids)

    def _apply_bodies(self, operation: Operation, inputs: list[Value], layer: str, depth: int) -> tuple[Value, ...]:
        if operation.kind in _LOOPS:
            # What a loop passes on is not followed: rows that enter it come out as something else.
            states = _changed(inputs, (layer, operation.kind))
            meetings = frozenset().union(*(value.meetings for value in inputs))
            return tuple(
                value if not value.rows and not states else Value(rows=states, meetings=meetings) for value in inputs
            )
        arguments = tuple(inputs[1:] if operation.kind in BRANCHES else inputs)
        results = [self._call(body, arguments, layer, depth + 1) for body in operation.bodies]
        merged = [_either(values) for values in zip(*results, strict=False)]
        return tuple(merged) or (UNKNOWN,)

    def _result(self, operation: Operation, inputs: list[Value], place: str, label: tuple[str, str]) -> Value:
        kind = operation.kind
        known = Value(
            is_text=kind in _SPLITS or (any(value.is_text for value in inputs) and not kind.startswith("LookupTable")),
            meetings=frozenset().union(*(value.meetings for value in inputs)),
        )
        if kind.startswith("LookupTableFind"):
            if inputs and inputs[0].table is not None and any(value.is_text for value in inputs[1:]):
                self.words.add(inputs[0].table)
            return known
        if kind == "OneHot":
            return replace(known, is_one_hot=True)
        if kind in GATHERS and inputs:
            return self._gather(inputs[0], place, known)
        if kind in _PASSING and inputs:
            first = inputs[0]
            if kind == "Reshape" and len(inputs) > 1 and first.rows:
                return replace(first, numbers=None, rows=_reshaped(first.rows, inputs[1], self.dimensions, label))
            return first
        if kind in _MATRIX_PRODUCTS and len(inputs) > 1 and inputs[0].is_one_hot and inputs[1].rows:
            return replace(known, rows=tuple((Use(use.embedding, place), state) for use, state in inputs[1].rows))
        carriers = [value for value in inputs if value.rows]
        if not carriers:
            return self._without_rows(kind, inputs, known)
        return self._with_rows(operation, inputs, carriers, place, label, known)

    def _gather(self, source: Value, place: str, known: Value) -> Value:
        self.gathered |= {use.embedding for use, _ in source.rows if not use.place}
        rows = tuple((Use(use.embedding, use.place or place), state) for use, state in source.rows)
        return replace(known, rows=rows, is_gathered=not rows)

    def _without_rows(self, kind: str, inputs: list[Value], known: Value) -> Value:
        products = frozenset().union(*(value.products for value in inputs))
        for product in products:
            meeting = self.meetings[product]
            if kind in ("Sum", "Mean"):
                meeting.is_summed = True
            elif kind in ("Add", "AddV2") and any(value.is_gathered for value in inputs):
                meeting.is_biased = True
        if kind == "Pack":  # A shape, of which some lengths are known.
            numbers = tuple(value.numbers[0] if value.numbers else float("nan") for value in inputs)
            return replace(known, numbers=numbers)
        if inputs and all(value.is_scalar for value in inputs):
            return replace(known, numbers=SCALAR.numbers)
        gathered = any(value.is_gathered for value in inputs)
        return replace(known, products=products if kind in _OF_SCORES else frozenset(), is_gathered=gathered)

    def _with_rows(
        self,
        operation: Operation,
        inputs: list[Value],
        carriers: list[Value],
        place: str,
        label: tuple[str, str],
        known: Value,
    ) -> Value:
        kind = operation.kind
        for value in inputs:
            for product in value.products:  # A bias that is followed as another embedding.
                self.meetings[product].is_biased |= kind in ("Add", "AddV2")
        if any(value.products for value in inputs):
            return replace(known, products=frozenset().union(*(value.products for value in inputs)))
        if kind in _SEARCHES or self._do_meet(kind, carriers):
            return self._meet(carriers, place, label, known, is_summed=kind in _MATRIX_PRODUCTS | _SEARCHES)
        if kind in ("TopKV2", "TopK") and any(state.shape == Shape.SCORES for _, state in carriers[0].rows):
            # The matrix is an index of the other tower's vectors.
            rows = tuple((use, _before_scores(state)) for use, state in carriers[0].rows)
            return self._meet([Value(rows=rows)], place, label, known, is_summed=True)
        uses = dict.fromkeys(use for value in carriers for use, _ in value.rows)
        together = all({use for use, _ in value.rows} == {*uses} for value in carriers)
        keeps = kind == "Pack" or kind in _SELECTS or (kind == "ConcatV2" and _axes(inputs[-1]) == (0,))
        advanced = list[tuple[Use, State]]()
        for use in uses:
            states = [state for value in carriers for one, state in value.rows if one == use]
            if keeps:
                advanced.append((use, max(states, key=lambda one: one.shape)))
            elif together:
                advanced.append((use, _advanced(operation, states, inputs, label)))
            else:
                advanced.append((use, _change(states, label)))
        return replace(known, rows=tuple(advanced))

    def _do_meet(self, kind: str, carriers: list[Value]) -> bool:
        for number, first in enumerate(carriers):
            ours = {use for use, _ in first.rows}
            for second in carriers[number + 1 :]:
                theirs = {use for use, _ in second.rows}
                self.steps.take(len(ours) * len(theirs))
                for one in ours - theirs:
                    for other in theirs - ours:
                        if one.embedding == other.embedding:
                            if kind in _PAIRINGS:
                                return True
                        elif self.are_rivals(one.embedding, other.embedding, kind in _PAIRINGS):
                            return True
        return False

    def _meet(
        self, carriers: list[Value], place: str, label: tuple[str, str], known: Value, *, is_summed: bool
    ) -> Value:
        states: dict[Use, State] = {}
        for value in carriers:
            for use, state in value.rows:
                if state.shape in _VECTORS:
                    states[use] = max(states.get(use, state), _arrived(state), key=lambda one: one.shape)
        if not states:  # Of norms alone.
            return known
        key = f"{place} {sorted(states.items())}"
        self.meetings.setdefault(key, Meeting(label, states, is_summed))
        return replace(known, meetings=known.meetings | {key}, products=frozenset([key]))


def compared(operation: Operation, inputs: Sequence[Value]) -> frozenset[int]:
    """Returns the matrices with all rows of which a matrix product compares something."""
    found = set[int]()
    for value, is_turned in zip(inputs, (not operation.is_first_transposed, operation.is_transposed), strict=False):
        if value.matrix is not None and value.is_transposed != is_turned:
            found.add(value.matrix)
    return frozenset(found)


def _output(values: Mapping[str, tuple[Value, ...]], source: tuple[str, int]) -> Value:
    outputs = values.get(source[0], ())
    if not outputs:
        return UNKNOWN
    return outputs[source[1]] if source[1] < len(outputs) else outputs[0]


def _either(values: Sequence[Value]) -> Value:
    """Returns what is known of a tensor that comes from one branch or another."""
    states: dict[Use, State] = {}
    for value in values:
        for use, state in value.rows:
            states[use] = max(states.get(use, state), state, key=lambda one: one.shape)
    same = len({(value.matrix, value.is_transposed, value.ids) for value in values}) == 1
    return Value(
        rows=tuple(states.items()),
        is_text=any(value.is_text for value in values),
        meetings=frozenset().union(*(value.meetings for value in values)),
        products=frozenset().union(*(value.products for value in values)),
        matrix=values[0].matrix if same else None,
        is_transposed=same and values[0].is_transposed,
        scores=frozenset().union(*(value.scores for value in values)),
        best=frozenset().union(*(value.best for value in values)),
        ids=values[0].ids if same else None,
    )


def _axes(value: Value) -> tuple[int, ...]:
    return tuple(int(number) for number in value.numbers or () if number == number)


def _extended(operations: Iterable[tuple[str, str]], label: tuple[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple(dict.fromkeys([*operations, label]))[:_MAX_NAMED]


def _merged(states: Sequence[State]) -> tuple[tuple[str, str], ...]:
    return tuple(dict.fromkeys(operation for state in states for operation in state.operations))


def _change(states: Sequence[State], label: tuple[str, str]) -> State:
    shape = Shape.OPAQUE if label[1] in OPAQUE and not _is_changed(states) else Shape.CHANGED
    return State(shape, _extended(_merged(states), label))


def _is_changed(states: Sequence[State]) -> bool:
    return any(state.shape in (Shape.CHANGED, Shape.SCORES) for state in states)


def _changed(values: Sequence[Value], label: tuple[str, str]) -> tuple[tuple[Use, State], ...]:
    return tuple((use, _change([state], label)) for value in values for use, state in value.rows)


def _arrived(state: State) -> State:
    """Returns a state where vectors are compared or returned: a scale that was not finished is a change."""
    return State(Shape.CHANGED, state.operations) if state.shape in (Shape.SQUARES, Shape.SCORES) else state


def _before_scores(state: State) -> State:
    if state.shape != Shape.SCORES:
        return state
    return State(Shape.SCALED if state.operations[:-1] else Shape.ROW, state.operations[:-1])


def _reshaped(
    rows: tuple[tuple[Use, State], ...], target: Value, dimensions: Mapping[int, int], label: tuple[str, str]
) -> tuple[tuple[Use, State], ...]:
    """Returns the rows after a reshape: rows that were joined into one long row are changed."""
    last = target.numbers[-1] if target.numbers else -1
    return tuple(
        (use, state)
        if last != last or last < 0 or last == dimensions.get(use.embedding, last) or state.shape not in _VECTORS
        else (use, _change([state], label))
        for use, state in rows
    )


def _advanced(operation: Operation, states: Sequence[State], inputs: Sequence[Value], label: tuple[str, str]) -> State:
    """Returns the state of a row after an operation that has it in one or several of its inputs."""
    kind, shapes = operation.kind, [state.shape for state in states]
    others = [value for value in inputs if not value.rows]
    operations = _extended(_merged(states), label)
    vectors = [shape in (Shape.ROW, Shape.SCALED) for shape in shapes]
    if len(states) == 1:
        shape = shapes[0]
        by_numbers = all(value.is_scalar for value in others)
        if kind in ("Add", "AddV2", "Sub") and by_numbers and others and all(_is_zero(value) for value in others):
            return states[0]
        if shape in (Shape.ROW, Shape.SCALED):
            if kind == SCALING:
                return State(Shape.SCALED, operations)
            if kind in (*_MULTIPLICATIONS, *_DIVISIONS) and by_numbers and _is_dividend(kind, inputs):
                return State(Shape.SCALED, operations)
            if kind in _POWERS and by_numbers:
                return State(Shape.SQUARES, operations)
            if kind == "EuclideanNorm" and _is_last(others):
                return State(Shape.FACTOR, operations)
            if (kind == "MatMul" and operation.is_transposed and inputs[0].rows) or compared(operation, inputs):
                return State(Shape.SCORES, operations)
        elif shape == Shape.SQUARES and kind in _REDUCTIONS and _is_last(others):
            return State(Shape.FACTOR, operations)
        elif shape == Shape.SQUARES and kind in ("Sqrt", "Add", "AddV2", "Maximum", *_POWERS) and by_numbers:
            return State(Shape.SQUARES, operations)
        elif shape == Shape.FACTOR and kind in _OF_NORMS:
            return State(Shape.FACTOR, operations)
        elif shape == Shape.SCORES and kind in (*_MULTIPLICATIONS, *_DIVISIONS, "Add", "AddV2", "Softmax"):
            return states[0]
    elif len(states) == 2:
        if kind in _MULTIPLICATIONS and all(vectors):
            return State(Shape.SQUARES, operations)
        if kind in (*_MULTIPLICATIONS, *_DIVISIONS) and Shape.FACTOR in shapes:
            other = shapes[1] if shapes[0] == Shape.FACTOR and kind in _MULTIPLICATIONS else shapes[0]
            if other in (Shape.ROW, Shape.SCALED) and (kind in _MULTIPLICATIONS or shapes[1] == Shape.FACTOR):
                return State(Shape.SCALED, operations)
            if other in (Shape.FACTOR, Shape.SQUARES):
                return State(other, operations)
        if kind in _OF_NORMS and all(shape == Shape.FACTOR for shape in shapes):
            return State(Shape.FACTOR, operations)
    return _change(states, label)


def _is_zero(value: Value) -> bool:
    return value.numbers == (0.0,)


def _is_dividend(kind: str, inputs: Sequence[Value]) -> bool:
    return kind in _MULTIPLICATIONS or bool(inputs[0].rows)


def _is_last(others: Sequence[Value]) -> bool:
    """Whether a reduction is over the values of each row, as far as can be seen: not over the first axis, the rows."""
    return bool(others) and all(0 not in _axes(value) for value in others)


@dataclass(frozen=True)
class _Seen:
    """The states of one embedding's rows in a call: in the outputs, and where they meet another tower."""

    outputs: tuple[tuple[Use, State], ...]
    meetings: tuple[tuple[Meeting, Use, State], ...]

    @property
    def farthest(self) -> Shape:
        states = [*(state for _, state in self.outputs), *(state for _, _, state in self.meetings)]
        return max((state.shape for state in states), default=Shape.ROW)


def tail(
    embedding: int,
    calls: Iterable[Sequence[Returned]],
    tower_calls: Iterable[Sequence[Returned]],
    meetings: Mapping[str, Meeting],
) -> Tail:
    """Returns how a tower continues after its embedding.

    Args:
        embedding: the tower's.
        calls: what the model's calls return; of each all variants that were saved, such as with and without dropout.
        tower_calls: the same of calls of the tower's layer alone.
        meetings: where towers met in them.
    """
    seen = [_served(embedding, variants, meetings) for variants in calls]
    of_layer = [state for variants in tower_calls for _, state in _served(embedding, variants, meetings).outputs]
    if of_layer and all(state.shape >= Shape.SCORES for state in of_layer):
        return _tail(max(of_layer), [])
    met = [each for call in seen for each in call.meetings]
    if any(call.outputs and all(state.shape == Shape.ROW for _, state in call.outputs) for call in seen):
        return _tail(State(Shape.ROW), [meeting for meeting, _, state in met if state.shape == Shape.ROW])
    if not met:
        states = [state for call in seen for _, state in call.outputs] or of_layer
        return _tail(max(states), []) if states else Tail(Ending.UNKNOWN, reason="no call of the model returns it")
    by_use: dict[Use, State] = {}
    for _, use, state in met:
        by_use[use] = min(by_use.get(use, state), state)
    best, worst = min(by_use.values()), max(by_use.values())
    if worst.shape > Shape.SCALED >= best.shape and not of_layer:
        return replace(_tail(worst, []), reason="several inputs share the embedding")
    return _tail(best, [meeting for meeting, _, state in met if state.shape == best.shape])


def rivals(towers: Iterable[tuple[int, set[int]]]) -> Rivals:
    """Returns which embeddings belong to different towers.

    Args:
        towers: of each tower its embedding, and all embeddings that its layer holds.
    """
    towers = list(towers)
    chosen = {embedding for embedding, _ in towers}

    def are_rivals(one: int, other: int, is_pairing: bool) -> bool:
        if one in chosen and other in chosen:
            return True
        # Of a tower that is taken alone, the other one is whatever it is multiplied with from outside of its layer.
        return len(chosen) == 1 and is_pairing and not any({one, other} <= inside for _, inside in towers)

    return are_rivals


def taking_part(calls: Iterable[Sequence[Returned]], meetings: Mapping[str, Meeting]) -> set[int]:
    """Returns the embeddings whose rows reach an output, or a place where towers meet."""
    found = set[int]()
    for returned in (each for variants in calls for each in variants):
        states = [*returned.states, *(each for key in returned.meetings for each in meetings[key].states.items())]
        found |= {use.embedding for use, _ in states}
    return found


def _served(embedding: int, variants: Sequence[Returned], meetings: Mapping[str, Meeting]) -> _Seen:
    """Returns the variant that changes the rows least: others have dropout, which serving does not."""
    seen = [
        _Seen(
            tuple((use, state) for use, state in returned.states if use.embedding == embedding),
            tuple(
                (meetings[key], use, state)
                for key in sorted(returned.meetings)
                for use, state in meetings[key].states.items()
                if use.embedding == embedding
            ),
        )
        for returned in variants
    ]
    return min(seen, key=lambda one: one.farthest)


def _tail(state: State, meetings: Sequence[Meeting]) -> Tail:
    endings = {Shape.ROW: Ending.EMBEDDING, Shape.SCALED: Ending.SCALED, Shape.OPAQUE: Ending.UNKNOWN}
    ending = endings.get(state.shape, Ending.GOES_ON)
    reason = f"{state.operations[-1][1]} is opaque: its code is not in the graph" if ending == Ending.UNKNOWN else ""
    if any(meeting.is_summed and not meeting.is_biased for meeting in meetings):
        return Tail(ending, state.operations, reason=reason)
    # Usually there is one; a model may compare in several ways.
    others = [meeting for meeting in meetings if not meeting.is_summed]
    meeting = "/".join(part for part in others[0].operation if part) if others else ""
    return Tail(ending, state.operations, meeting, is_biased=bool(meetings) and not others, reason=reason)
