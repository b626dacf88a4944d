"""Which lookup feeds which embedding: calls of every kind, crafted as a graph's library of functions."""

import io

import pytest
from wire_format import field

from beam_pipeline.errors import CorruptFileError
from beam_pipeline.files import ByteFile
from beam_pipeline.formats.protobuf import Span
from beam_pipeline.formats.saved_model import gathers
from beam_pipeline.formats.saved_model.functions import FunctionLibrary
from beam_pipeline.formats.saved_model.gathers import Gather

FIND = ("tower/lookup/find", "LookupTableFindV2", "table", "ids", "default")
READ = ("tower/embedding/read", "ReadVariableOp", "matrix")
GATHER = ("tower/embedding/gather", "GatherV2")


def library(*nodes, arguments=("ids", "table", "matrix", "other_table", "other_matrix")):
    """A GraphDef with one function; a node is (name, op, *inputs)."""
    signature = field(1, b"call") + b"".join(field(2, field(1, name.encode())) for name in arguments)
    body = b"".join(
        field(3, field(1, name.encode()) + field(2, op.encode()) + b"".join(field(3, i.encode()) for i in inputs))
        for name, op, *inputs in nodes
    )
    return field(2, field(1, field(1, signature) + body))


def find(*nodes, captured=(10, 20, 11, 21), **options):
    data = library(*nodes, **options)
    file = ByteFile("saved_model.pb", io.BytesIO(data), len(data))
    functions = FunctionLibrary(file, Span(0, len(data)))
    return gathers.find(file.path, functions, {"call": captured}, {10, 11}, {20, 21})


def pairs(*nodes, **options):
    return [gather for gather in find(*nodes, **options) if gather.fed]


@pytest.mark.parametrize(
    "nodes",
    [
        [FIND, READ, (*GATHER, "tower/embedding/read:value:0", "tower/lookup/find:values:0", "axis")],
        [FIND, ("tower/embedding/gather", "ResourceGather", "matrix", "tower/lookup/find:values:0")],
        # In no order, and with a control input.
        [("tower/embedding/gather", "ResourceGather", "matrix", "cast:y:0", "^ids"), ("cast", "Cast", FIND[0]), FIND],
        # Unknown ids go elsewhere, and rows may be counted from the end.
        [
            FIND,
            ("hash", "StringToHashBucketFast", "ids"),
            ("known", "SelectV2", "unknown", "hash:output:0", FIND[0]),
            ("back", "AddV2", "known", "size"),
            ("row", "SelectV2", "negative", "back", "known"),
            ("tower/embedding/gather", "ResourceGather", "matrix", "row"),
        ],
    ],
)
def test_what_a_lookup_feeds(nodes):
    assert pairs(*nodes) == [Gather(10, 20, ["tower/embedding"])]


@pytest.mark.parametrize(
    "nodes",
    [
        # The row numbers, or the vectors, are changed on the way.
        [FIND, ("more", "AddV2", FIND[0], "one"), ("gather", "ResourceGather", "matrix", "more")],
        [FIND, READ, ("norm", "Mul", READ[0], "x"), ("gather", "GatherV2", "norm", FIND[0], "axis")],
        # It is not clear whose they are.
        [
            FIND,
            ("find", "LookupTableFindV2", "other_table", "ids", "default"),
            ("row", "SelectV2", "which", "find", FIND[0]),
            ("gather", "ResourceGather", "matrix", "row"),
        ],
        # They are no rows of a table, or of no variable.
        [("gather", "ResourceGather", "matrix", "ids")],
        [FIND, ("gather", "GatherV2", "ids", FIND[0], "axis")],
        [FIND, ("gather", "ResourceGather", "matrix")],
        [("loop", "Cast", "loop"), ("gather", "ResourceGather", "matrix", "loop")],
        [],
    ],
)
def test_what_is_no_pair(nodes):
    assert pairs(*nodes) == []


def test_every_function_adds_its_pairs_and_scopes():
    nodes = [
        FIND,
        ("a/b/gather", "ResourceGather", "matrix", FIND[0]),
        ("c/gather", "ResourceGather", "matrix", FIND[0]),
        ("d/gather", "ResourceGather", "other_matrix", FIND[0]),
    ]
    assert pairs(*nodes) == [Gather(10, 20, ["a/b", "c"]), Gather(10, 21, ["d"])]
    assert pairs(*nodes, captured=(10, 20)) == []  # These are the last two arguments.


def test_what_certainly_does_not_belong_together():
    by_ids = ("gather", "ResourceGather", "matrix", "ids")
    assert find(FIND, by_ids) == [Gather(10, 20, fed=False), Gather(11, 20, fed=False)]
    by_rows = ("gather", "ResourceGather", "matrix", FIND[0])
    assert find(FIND, by_ids, by_rows) == [Gather(10, 20, [""]), Gather(11, 20, fed=False)]
    changed = ("more", "AddV2", FIND[0], "one")
    assert find(FIND, changed, ("gather", "ResourceGather", "matrix", "more")) == [Gather(11, 20, fed=False)]


@pytest.mark.parametrize(
    ("scope", "layer", "within"),
    [
        ("model/user_embedding", "user_embedding", True),
        ("functional_1/user_embedding_1", "user_embedding", True),
        ("tt_1/user_layer_1/embedding_3", "user_layer", True),
        ("tt_1/user_layer_1/embedding_3", "user_layer/embedding", True),
        ("tt_1/user_layer_1/embedding_3", "tt/embedding", False),
        ("model/user_embedding", "user", False),
        ("model/user_embedding", "embedding", False),
        ("model/user_embedding_1_1", "user_embedding", False),
        ("model/userXembedding", "user.embedding", False),
        ("", "user", False),
    ],
)
def test_names_that_a_graph_numbers(scope, layer, within):
    assert Gather(1, 2, [scope]).is_within(layer) is within


def test_a_function_in_which_each_node_depends_on_all_objects():
    """A thousand objects and five thousand nodes: of each node each object would be kept."""
    arguments = [f"argument {number}" for number in range(1000)]
    nodes = [("all", "AddN", *arguments), *((f"node {number}", "AddN", "all") for number in range(5000))]
    data = library(*nodes, arguments=arguments)
    file = ByteFile("graph", io.BytesIO(data), len(data))
    functions = FunctionLibrary(file, Span(0, len(data)))
    with pytest.raises(CorruptFileError, match="its functions depend on each other too often"):
        gathers.find(file.path, functions, {"call": range(1000)}, {*range(500)}, {*range(500, 1000)})
