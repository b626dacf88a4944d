"""Against the real TensorFlow and Keras: what a model's parts take and return, and what is no tower."""

import importlib.util

import numpy as np
import pyarrow as pa
import pytest
from models import made_by

from beam_pipeline.computing import model
from beam_pipeline.computing.columns import bind
from beam_pipeline.computing.sources import ParquetFiles, Query, Vocabulary
from beam_pipeline.computing.tower import computed_tower
from beam_pipeline.errors import (
    ArtifactMissingError,
    ConfigError,
    CorruptFileError,
    FeaturesError,
    NotAModelError,
    TowerMissingError,
)
from beam_pipeline.files import open_file
from beam_pipeline.formats import open_artifact


@pytest.fixture(scope="module")
def deep():
    return made_by("make_deep_towers.py")


def test_a_layer_and_a_signature_return_what_keras_returns(deep):
    ids = np.array(deep("deep").ids("user"), object)
    for layer in ("user_layer", "one"):
        vectors = model.loaded(str(deep("deep").folder)).part("user", layer)([ids])
        np.testing.assert_allclose(vectors, deep("deep").vectors("user"), atol=1e-6)


def test_inputs_are_named_by_the_model(deep):
    part = model.loaded(str(deep("features").folder)).part("user", "query_model")
    assert str(part.signature) == (
        "age (int32), history (string[]), last (string[3]), member (bool), time (float32), user_id (string) → 16 values"
    )
    keras = model.loaded(str(deep("keras3").folder / "model.keras")).part("user", "user_tower")
    assert {str(each) for each in keras.signature.inputs} == {"age (float32[1])", "user_id (string)"}


@pytest.mark.parametrize(
    ("name", "layer", "message"),
    [
        ("deep", "nowhere", "does not exist; parts that compute a vector: item_layer: "),
        ("deep", "two", "returns 2 outputs (norm, vector) instead of one vector"),
        ("deep", "fixed", "takes 'user_id' of exactly 2 row(s), not of any number"),
        ("deep", "serving_default", "does not exist"),
        ("exported", "user_tower", "does not exist; parts that compute a vector: none"),
        ("exported", "serve", "returns one number for each row, not a vector"),
    ],
)
def test_what_computes_no_vector_is_refused_with_what_does(deep, name, layer, message):
    with pytest.raises(TowerMissingError) as error:
        model.loaded(str(deep(name).folder)).part("user", layer)
    assert message in str(error.value)


def test_code_in_a_keras_file_is_not_run(deep):
    with pytest.raises(NotAModelError, match="Lambda"):
        model.load(str(deep("lambda").folder / "model.keras"))


def test_without_tensorflow_the_extra_is_named(deep, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'beam-pipeline\[compute\]'"):
        model.load(str(deep("deep").folder))


def test_ids_come_from_the_lookup(deep):
    folder = str(deep("features").folder)
    with pytest.raises(FeaturesError, match="tower 'user' takes age"):
        computed_tower("user", "query_model", folder, open_artifact(folder, open_file), None)
    tower = computed_tower("item", "candidate_model", folder, open_artifact(folder, open_file), None)
    shares = [share for share, _ in tower.ids_from.cut(tower.columns, None)]
    tables = [table for share in shares for table in tower.ids_from.read(share, tower.columns)]
    assert pa.Table.from_batches(tables).to_pydict() == {"item_id": [3, 5, 8, -13]}
    assert (tower.vector_source, tower.matrix.dimension, tower.matrix.checksum) == ("computed", 16, None)


def test_parquet_is_read_by_row_group(deep, tmp_path):
    path = deep("features").folder.parent / "features.user.parquet"
    signature = model.loaded(str(deep("features").folder)).part("user", "query_model").signature
    files = ParquetFiles(str(path), (str(path),))
    columns = bind("user", signature, files.schema(), "here")
    shares = list(files.cut(columns, None))
    assert [rows for _, rows in shares] == [25, 25, 10]
    assert sum(table.num_rows for share, _ in shares for table in files.read(share, columns)) == 60

    import pyarrow.parquet as pq

    other = pq.read_table(path).drop_columns(["age"])
    pq.write_table(other, tmp_path / "other.parquet")
    with pytest.raises(FeaturesError, match="column 'age' is there 0 times in"):
        list(ParquetFiles("", (str(path), str(tmp_path / "other.parquet"))).cut(columns, None))


def test_damaged_parquet_is_one_line(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1" + bytes(50) + b"PAR0")
    with pytest.raises(CorruptFileError, match="is not a Parquet file, or truncated; write it again"):
        ParquetFiles("", (str(tmp_path / "a.parquet"),)).schema()
    with pytest.raises(ArtifactMissingError, match="does not exist"):
        ParquetFiles("", (str(tmp_path / "b.parquet"),)).schema()


def test_a_source_says_what_it_is():
    assert str(Query("SELECT  user_id\nFROM t", "p")) == "SELECT user_id FROM t"
    assert str(ParquetFiles("*", ("a", "b", "c"))) == "a and 2 more"
    assert Vocabulary.__doc__
