"""Search indexes: what the reader finds in models of the real libraries, against what these answer."""

import io

import pytest
from models import made_by
from towers import read_tower
from wire_format import field

from beam_pipeline.errors import BadIdError, BadVectorError, CorruptFileError, TowerMissingError, UnsupportedModelError
from beam_pipeline.files import ByteFile, open_file
from beam_pipeline.formats.model import Ending
from beam_pipeline.formats.protobuf import Span
from beam_pipeline.formats.saved_model.functions import FunctionLibrary
from beam_pipeline.formats.saved_model.reader import SavedModel
from beam_pipeline.formats.tails import Shape, State, Steps, Trace, Use, Value
from beam_pipeline.launch.inspection import describe
from beam_pipeline.launch.selection import discover
from beam_pipeline.model import open_model

NAMES = {
    "tfrs": "candidates",
    "tfrs_integers": "candidates",
    "tfrs_numbered": "candidates",
    "beside": "index",
    "beside_dense": "index",
    "own_constant": "vectors",
    "own_in_the_graph": "vectors",
    "own_integers_in_the_graph": "vectors",
    "own_variable": "vectors",
    "own_long_integers": "vectors",
    "own_titled": "vectors",
    "scann": "_serialized_searcher",
    "keras_rs": "candidate_embeddings",
}


@pytest.fixture(scope="module")
def indexes():
    return made_by("make_indexes.py")


@pytest.fixture
def opened(indexes):
    models = []

    def open_saved(name):
        models.append(SavedModel(str(indexes(name).folder), open_file))
        return models[-1]

    yield open_saved
    for model in models:
        model.close()


@pytest.mark.parametrize("name", NAMES)
def test_an_index_holds_what_it_answers(indexes, opened, name):
    model = opened(name)
    layers = discover(model.tower_layers(), model.index_layers())
    assert layers["item"] == NAMES[name]
    tower = model.tower("item", layers["item"])
    assert read_tower(tower, 100) == indexes(name).rows("item")
    assert tower.vector_source == "index"
    tails = model.tails(layers)
    assert tails["item"].ending == (Ending.UNKNOWN if name == "scann" else Ending.EMBEDDING)
    assert not tails["item"].meeting
    assert tails["user"].is_row == (name != "beside_dense")
    if tails["user"].is_row:
        assert read_tower(model.tower("user", layers["user"])).items() >= indexes(name).rows("user").items()


@pytest.mark.parametrize("name", [name for name in NAMES if name != "scann"])
def test_a_tower_alone_ends_where_an_index_is_searched(opened, name):
    model = opened(name)
    for tower, layer in discover(model.tower_layers(), model.index_layers()).items():
        tail = model.tails({tower: layer})[tower]
        assert tail.ending == (Ending.GOES_ON if (name, tower) == ("beside_dense", "user") else Ending.EMBEDDING)


def test_other_names_of_an_index(opened):
    model = opened("beside")
    assert model.tower("item", "index.candidates").matrix == model.tower("item", "index").matrix


def test_candidates_that_are_scaled_while_searching(opened):
    model = opened("own_normalised")
    assert model.tails({"item": "vectors"})["item"].ending == Ending.SCALED


def test_ids_and_vectors_of_different_number(opened):
    with pytest.raises(CorruptFileError, match=r"the ids of index 'vectors' are 21, and its vectors 20"):
        opened("mismatched").tower("item", "vectors")


def test_an_id_twice(indexes):
    with (
        open_model(indexes("tfrs_repeated").folder) as model,
        pytest.raises(BadIdError, match="id 'ítem 0 ü' appears 2 times"),
    ):
        model.tower("candidates").read()


def test_nan_is_named_by_its_id(indexes):
    with open_model(indexes("diverged").folder) as model, pytest.raises(BadVectorError, match="'ítem 3 ü'"):
        model.tower("vectors").read()


def test_a_quantised_index_is_refused(opened):
    model = opened("scann_quantised")
    assert model.index_layers() == ["_serialized_searcher"]
    with pytest.raises(UnsupportedModelError, match="holds its vectors quantised only; build it with num_reord"):
        model.tower("item", "_serialized_searcher")
    with pytest.raises(UnsupportedModelError, match="quantised"):
        model.tails({"item": "_serialized_searcher"})


def test_inspection_shows_an_index(indexes, opened):
    folder = str(indexes("beside").folder)
    lines = list(describe(opened("beside"), folder, open_file, {}))
    at = lines.index("layer       index")
    assert lines[at + 1] == "  index     20 rows × 8 float32, 640 bytes in variables/variables.data-00000-of-00001"
    assert lines[at + 2].startswith("  ids       20, ")
    assert lines[at + 3] == "  such as   'ítem 0 ü', 'item-1', 'item-2', …"
    assert lines[at + 5] == "  then      ends at the embedding"


# Calls of every kind, crafted as a graph's library of functions.


def found(*nodes, arguments=("queries", "matrix", "ids")):
    """Returns matrix → lists of ids; a node is (name, op, *inputs) or (name, op, attribute, *inputs)."""
    signature = field(1, b"call") + b"".join(field(2, field(1, name.encode())) for name in arguments)
    signature += field(3, field(1, b"output"))
    body = b"".join(
        field(3, field(1, name.encode()) + field(2, op.encode()) + b"".join(field(3, i.encode()) for i in inputs)
              + b"".join(field(5, field(1, flag) + field(2, bytes([5 << 3, 1]))) for flag in flags))
        for name, op, flags, *inputs in nodes
    )  # fmt: skip
    ends = field(4, field(1, b"output") + field(2, f"{nodes[-1][0]}:0".encode()))
    data = field(2, field(1, field(1, signature) + body + ends))
    file = ByteFile("saved_model.pb", io.BytesIO(data), len(data))
    functions = FunctionLibrary(file, Span(0, len(data)))
    trace = Trace(functions.function, {7: 8}, lambda *_: False, Steps("saved_model.pb", 1000))
    returned = trace.returned("call", [Value(), Value(rows=((Use(7, ""), State(Shape.ROW)),), matrix=7), Value(ids=9)])
    ends = [max(meeting.states.values()).shape for meeting in trace.meetings.values()]
    assert not ends or returned.meetings
    return trace.indexes, ends


SCORES = ("scores", "MatMul", [b"transpose_b"], "queries", "matrix")
TOP = ("top", "TopKV2", [], "scores:0")
GATHER = ("gather", "GatherV2", [], "ids", "top:indices:0")


@pytest.mark.parametrize(
    "nodes",
    [
        [SCORES, TOP, GATHER],
        [("turned", "Transpose", [], "matrix"), ("scores", "MatMul", [], "queries", "turned:0"), TOP, GATHER],
        [("scores", "BatchMatMulV2", [], "matrix", "queries"), TOP, GATHER],
        [SCORES, ("soft", "Softmax", [], "scores:0"), ("top", "ArgMax", [], "soft:0"), GATHER],
        [SCORES, TOP, ("part", "StridedSlice", [], "top:indices:0"), ("gather", "ResourceGather", [], "ids", "part:0")],
        [
            ("handle", "Scann>TensorsToScann", [], "matrix"),
            ("top", "Scann>ScannSearchBatched", [], "handle:0", "queries"),
            GATHER,
        ],
    ],
)
def test_ids_that_belong_to_rows(nodes):
    both = ("answer", "IdentityN", [], nodes[-1][0] + ":0")
    assert found(*nodes, both)[0] == {7: {9}}


@pytest.mark.parametrize(
    "nodes",
    [
        # The columns are scored, as those of a classifier's last layer.
        [("scores", "MatMul", [], "queries", "matrix"), TOP, GATHER],
        [("scores", "MatMul", [b"transpose_a"], "matrix", "queries"), TOP, GATHER],
        # Some of the rows, or of the ids, or of the scores: row and id no longer have one number.
        [("part", "StridedSlice", [], "matrix"), ("scores", "MatMul", [b"transpose_b"], "queries", "part:0"), TOP,
         GATHER],
        [SCORES, TOP, ("part", "Slice", [], "ids"), ("gather", "GatherV2", [], "part:0", "top:indices:0")],
        [SCORES, ("part", "StridedSlice", [], "scores:0"), ("top", "TopKV2", [], "part:0"), GATHER],
        # Numbers that are computed with the best ones.
        [SCORES, TOP, ("next", "AddV2", [], "top:indices:0", "queries"), ("gather", "GatherV2", [], "ids", "next:0")],
    ],
)  # fmt: skip
def test_ids_that_do_not(nodes):
    assert found(*nodes)[0] == {}


def test_scann_compares_the_rows_as_they_are():
    handle = ("handle", "Scann>TensorsToScann", [], "matrix")
    assert found(handle, ("top", "Scann>ScannSearchBatched", [], "handle:0", "queries"))[1] == [Shape.ROW]


def test_raw_queries_meet_the_rows_where_the_best_are_chosen():
    assert found(SCORES, TOP)[1] == [Shape.ROW]


def test_two_lists_of_which_none_says_that_it_holds_ids(opened):
    model = opened("own_titled")
    index = model._index("vectors")
    assert len(index.lists) == 1
    model._found_indexes = {"vectors": type(index)("vectors", index.matrix, (index.lists[0], index.lists[0] + 1))}
    with pytest.raises(TowerMissingError, match=r"index 'vectors' in .* answers with 2 lists"):
        model.tower("item", "vectors")
