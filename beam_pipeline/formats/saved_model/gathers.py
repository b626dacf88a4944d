"""Which lookup feeds which embedding: what a SavedModel's functions compute (tensorflow/core/framework/function.proto).

Keras 3's `export()` keeps variables and tables in flat lists, and a Functional model has a lookup and its embedding in
separate layers. There, only the graph of a call says which belong together: the row numbers that a gather takes from a
variable come from a table, unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from beam_pipeline.errors import UnsupportedModelError
from beam_pipeline.formats.saved_model.functions import FunctionLibrary
from beam_pipeline.formats.tails import Function, Steps

_GATHERS = ("ResourceGather", "GatherV2", "Gather")
_SELECTS = ("SelectV2", "Select")
_PASSING = (
    "Cast",
    "EnsureShape",
    "ExpandDims",
    "Identity",
    "LookupTableFindV2",
    "ReadVariableOp",
    "Reshape",
    "Squeeze",
    "StopGradient",
    "StridedSlice",
    "Transpose",
)
"""Operations that leave the values of their first input as they are; looking up is taken for reading a table."""

_MAX_STEPS = 2_000_000
"""Nodes and what is known of each, of all functions: some seconds, though each node may depend on all objects."""
_MAX_PAIRS = 1000

_PASSES = 8
"""Nodes come after their inputs, except in loops: as a rule the second pass finds nothing new."""


@dataclass
class Gather:
    """A variable whose rows are gathered, in a function that has a table.

    Attributes:
        table, variable: numbers of the objects.
        scopes: where in calls it happens: the names of the layers, from the outermost to that of the embedding.
        fed: whether the rows are gathered by row numbers of that table; if not, by something that is not from it.
    """

    table: int
    variable: int
    scopes: list[str] = field(default_factory=list)
    fed: bool = True

    def is_within(self, layer: str) -> bool:
        """Whether a layer of this name, or path of names, is around it.

        TensorFlow adds _1, _2, … to a name that its graph has already.
        """
        names = "/".join(rf"{re.escape(name)}(_\d+)?" for name in layer.split("/"))
        return any(re.search(rf"(^|/){names}(/|$)", scope) for scope in self.scopes)


def find(
    path: str,
    library: FunctionLibrary,
    captured: Mapping[str, Sequence[int]],
    tables: set[int],
    variables: set[int],
) -> list[Gather]:
    """Returns every pair of a table and a variable that belong together, or certainly do not.

    Args:
        path: of saved_model.pb, for a message.
        library: the functions of its graph.
        captured: of each concrete function, the objects that are its last arguments.
        tables: which objects are tables.
        variables: which are matrices.
    """
    steps = Steps(path, _MAX_STEPS)
    found: dict[tuple[int, int], Gather] = {}
    apart = set[tuple[int, int]]()
    for name, objects in captured.items():
        if not tables & {*objects} or not variables & {*objects}:
            continue
        if function := library.function(name):
            for table, variable, node in _of_function(function, objects, tables, variables, steps):
                if node is None:
                    apart.add((table, variable))
                    continue
                gather = found.setdefault((table, variable), Gather(table, variable))
                scope = node.rpartition("/")[0]
                if scope not in gather.scopes:
                    gather.scopes.append(scope)
                steps.take(len(gather.scopes))
            if len(found) > _MAX_PAIRS:
                raise UnsupportedModelError(
                    f"{path}: more than {_MAX_PAIRS:,} embeddings are fed by lookups; split the model"
                )
    return [*found.values(), *(Gather(*pair, fed=False) for pair in sorted(apart - found.keys()))]


_Objects = frozenset[int]
_NONE: tuple[_Objects, _Objects] = (frozenset(), frozenset())


def _of_function(
    function: Function, objects: Sequence[int], tables: set[int], variables: set[int], steps: Steps
) -> list[tuple[int, int, str | None]]:
    """Returns (table, variable, name of the node that gathers by the table, or None if it gathers by others).

    Only a function's own operations are seen: Keras and TensorFlow save at least one function with all of a call's.
    """
    arguments = function.arguments
    nodes = [(each.name, each.kind, [source for source, _ in each.inputs]) for each in function.operations.values()]
    # Of each node: the tables and variables whose values it has, unchanged and not.
    values = {
        argument: (frozenset([number]), frozenset[int]())
        for argument, number in zip(arguments[-len(objects) :], objects, strict=False)
        if number in tables or number in variables
    }
    captured_tables = tables & {*objects}
    found: list[tuple[int, int, str | None]] = []
    # Until nothing is learned any more: a node in a loop may come before its input.
    for _ in range(_PASSES):
        found, before = [], dict(values)
        for name, op, inputs in nodes:
            taken = [values.get(source, _NONE) for source in inputs]
            steps.take(1 + sum(1 + len(unchanged) + len(changed) for unchanged, changed in taken))
            if op in _GATHERS and len(taken) > 1 and variables & taken[0][0]:
                same, changed = taken[1]
                for variable in variables & taken[0][0]:
                    steps.take(len(captured_tables))
                    if len(taken[0][0]) == len(same) == 1 and same <= tables and not changed:
                        found += [(table, variable, name) for table in same]
                    found += [(table, variable, None) for table in captured_tables - same - changed]
                values[name] = _NONE
            elif op in _PASSING and taken:
                values[name] = taken[0]
            elif op in _SELECTS and any(unchanged for unchanged, _ in taken[1:]):
                # Unknown ids, the mask, or rows counted from the end take the other branch.
                values[name] = (frozenset().union(*(unchanged for unchanged, _ in taken[1:])), frozenset())
            else:
                values[name] = (frozenset(), frozenset().union(*(a | b for a, b in taken)))
        if values == before:
            return found
    return []
