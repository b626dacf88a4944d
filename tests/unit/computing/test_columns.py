import numpy as np
import pyarrow as pa
import pytest

from beam_pipeline.computing.columns import arrays, bind, ids_of, of_ids
from beam_pipeline.computing.signature import Input, Signature
from beam_pipeline.errors import BadIdError, FeaturesError

TEXT, NUMBERS = Input("user_id", "string"), Input("age", "int32")


def bound(inputs, **columns):
    table = pa.RecordBatch.from_pydict(columns)
    return bind("user", Signature(tuple(inputs), 8), table.schema, "a table"), table


def called(inputs, **columns):
    """Returns what a tower is called with: rows → arrays."""
    found, table = bound(inputs, **columns)
    return [
        (None if rows is None else rows.tolist(), [value.tolist() for value in values])
        for rows, values in arrays(table, found, ids_of(table, found))
    ]


def test_a_column_is_the_input_of_its_name():
    assert called([NUMBERS, TEXT], age=[1, 2], user_id=["a", "b"]) == [(None, [[1, 2], ["a", "b"]])]


def test_an_id_may_be_no_input():
    assert called([NUMBERS], user_id=["a"], age=[7]) == [(None, [[7]])]


def test_the_column_of_a_single_input_has_any_name():
    assert called([Input("inputs", "float32")], user_id=["a"], weight=[1]) == [(None, [[1.0]])]
    assert called([Input("inputs", "string")], user_id=["a"]) == [(None, [["a"]])]


def test_lists_of_one_length_go_in_together():
    history = Input("history", "string", (None,))
    found = called([history, TEXT], user_id=["a", "b", "c"], history=[["x"], ["x", "y"], ["z"]])
    assert found == [([0, 2], [[["x"], ["z"]], ["a", "c"]]), ([1], [[["x", "y"]], ["b"]])]


def test_lists_of_any_length_go_into_a_ragged_tensor():
    found, table = bound([Input("history", "int64", (None,), True)], user_id=["a", "b"], history=[[1, 2], [3]])
    ((rows, (flat_and_splits,)),) = arrays(table, found, ids_of(table, found))
    assert rows is None
    assert [each.tolist() for each in flat_and_splits] == [[1, 2, 3], [0, 2, 3]]


def test_an_empty_chunk_is_called_with_nothing():
    table = pa.RecordBatch.from_pydict({"user_id": pa.array([], pa.string())})
    ((_, (values,)),) = arrays(table, of_ids("user", Signature((TEXT,), 8)), table.column(0))
    assert values.shape == (0,)


def test_a_slice_is_read_where_it_begins():
    found, table = bound(
        [Input("age", "float32"), Input("last", "string", (2,))],
        user_id=["a", "b", "c"],
        age=[1.5, 2.5, 3.5],
        last=[["x", "y"], ["p", "q"], ["v", "w"]],
    )
    part = table.slice(1, 2)
    ((_, values),) = arrays(part, found, ids_of(part, found))
    assert [value.tolist() for value in values] == [[2.5, 3.5], [["p", "q"], ["v", "w"]]]


@pytest.mark.parametrize(
    ("inputs", "columns", "message"),
    [
        ([TEXT, NUMBERS], {"user_id": ["a"]}, "lack the column 'age'; the tower takes user_id, age (int32)"),
        ([TEXT], {"user": ["a"]}, "have no column 'user_id', which names the rows; they have user"),
        ([TEXT], {"user_id": ["a"], "city": ["x"]}, "have the column 'city', which is not an input of the tower"),
        ([TEXT, NUMBERS], {"user_id": ["a"], "age": [1.5]}, "column 'age' is double, and the tower takes int32: CAST"),
        ([TEXT, NUMBERS], {"user_id": ["a"], "age": ["1"]}, "column 'age' is string, and the tower takes int32"),
        ([TEXT], {"user_id": [1]}, "column 'user_id' is int64, and the tower takes string"),
        ([NUMBERS], {"user_id": [1.5], "age": [1]}, "is double, and an id is a string or an integer"),
        ([TEXT, NUMBERS], {"user_id": ["a"], "age": [[1]]}, "is a list (list<item: int64>), and the tower takes one"),
        (
            [TEXT, Input("last", "string", (3,))],
            {"user_id": ["a"], "last": ["x"]},
            "is not a list (string), and the tower takes 3 values of string for each row",
        ),
    ],
)
def test_a_table_that_does_not_fit_is_refused(inputs, columns, message):
    with pytest.raises(FeaturesError) as error:
        bound(inputs, **columns)
    assert "the features of tower 'user' (a table)" in str(error.value)
    assert message in str(error.value)


def test_a_tower_of_several_inputs_needs_features():
    with pytest.raises(FeaturesError, match=r"takes user_id \(string\), age \(int32\), not an id alone; .*--features"):
        of_ids("user", Signature((TEXT, NUMBERS), 8))


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        ({"user_id": ["a", None], "age": [1, 2]}, FeaturesError, "user_id is NULL in 1 of 2 rows"),
        ({"user_id": ["a", ""], "age": [1, 2]}, BadIdError, "an id is empty"),
        ({"user_id": [b"a", b"\xff"], "age": [1, 2]}, BadIdError, "is not UTF-8"),
        ({"user_id": ["a", "b"], "age": [1, None]}, FeaturesError, "for id 'b', age is NULL"),
        ({"user_id": ["a", "b"], "age": [1, -(1 << 31) - 1]}, FeaturesError, "for id 'b', age is -2,147,483,649"),
    ],
)
def test_a_value_that_does_not_fit_is_named(columns, error, message):
    with pytest.raises(error, match=message):
        called([NUMBERS], **columns)


def test_null_in_a_list_and_a_wrong_length_are_named():
    last = Input("last", "string", (2,))
    with pytest.raises(FeaturesError, match="for id 'b', last holds a NULL"):
        called([TEXT, last], user_id=["a", "b"], last=[["x", "y"], ["x", None]])
    with pytest.raises(FeaturesError, match="for id 'b', last has 3 values, and the tower takes 2"):
        called([TEXT, last], user_id=["a", "b"], last=[["x", "y"], ["x", "y", "z"]])


def test_integers_are_ids_by_their_digits():
    found, table = bound([Input("user_id", "int64")], user_id=[7, -13])
    assert ids_of(table, found).to_pylist() == ["7", "-13"]
    ((_, (values,)),) = arrays(table, found, ids_of(table, found))
    assert values.dtype == np.int64


def test_text_that_is_not_utf8_is_named():
    def text(*values):
        offsets = np.cumsum([0, *map(len, values)]).astype(np.int32)
        return pa.Array.from_buffers(
            pa.string(), len(values), [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(values))]
        )

    cities = text(b"Lyon", b"M\xe4tz")
    with pytest.raises(
        FeaturesError, match=r"for id 'b', city is 'M\\\\xe4tz', which is not UTF-8; make the column BYTES"
    ):
        called([Input("city", "string")], user_id=["a", "b"], city=cities)
    lists = pa.ListArray.from_arrays(pa.array([0, 1, 2], pa.int32()), cities)
    with pytest.raises(FeaturesError, match=r"the features of tower 'user': city is 'M\\\\xe4tz', which is not UTF-8"):
        called([Input("city", "string", (None,))], user_id=["a", "b"], city=lists)
    as_bytes = pa.array([b"Lyon", b"M\xe4tz"])
    assert called([Input("city", "string")], user_id=["a", "b"], city=as_bytes) == [(None, [[b"Lyon", b"M\xe4tz"]])]
