"""Kinds of models that people save: each by the flags of the README's table, every row what the library answers.

Deep towers are in test_computed.py, search indexes in test_indexes.py, embeddings without a lookup in test_files.py.
"""

import numpy as np
import pytest
from job import MARCH_1, refused
from models import made_by

BOTH = "--compute=user,item"


@pytest.fixture(scope="module")
def kinds():
    return made_by("make_kinds.py")


def features(model, *towers):
    beside = model.folder.parent
    return [f"--features={tower}={beside / model.folder.name}.{tower}.parquet" for tower in towers]


@pytest.mark.parametrize(
    ("name", "flags", "with_features", "sources"),
    [
        ("packed", [], (), {"user": "embedding", "item": "embedding"}),
        ("scaled", ["--tower=user=user_layer,item=item_layer", BOTH], (), {"user": "computed", "item": "computed"}),
        ("hashed", [BOTH], ("user",), {"user": "computed", "item": "computed"}),
        ("session", ["--tower=item=candidate_model"], (), {"item": "embedding"}),
        (
            "session",
            ["--tower=user=query_model,item=candidate_model", "--compute=user"],
            ("user",),
            {"user": "computed", "item": "embedding"},
        ),
        ("words", ["--tower=user=user_tower"], (), {"user": "embedding"}),
        (
            "words",
            ["--tower=user=user_tower,item=item_tower", "--compute=item"],
            ("item",),
            {"user": "embedding", "item": "computed"},
        ),
        ("several", [BOTH], ("user", "item"), {"user": "computed", "item": "computed"}),
    ],
)
def test_every_row_is_what_the_library_answers(job, store, kinds, capsys, name, flags, with_features, sources):
    model = kinds(name)
    run = store.log(model, name, MARCH_1)
    assert job.run(run, *flags, *features(model, *with_features)) == 0, capsys.readouterr().err
    assert dict(job.query("SELECT tower, vector_source FROM {log}")) == sources
    for tower, source in sources.items():
        ((key, found),) = job.rows(tower).items()
        assert key == ("2026-03-01", run)
        assert found.keys() == set(model.ids(tower))
        for each, vector in model.rows(tower).items():
            np.testing.assert_allclose(found[each], vector, rtol=0, atol=1e-6 if source == "computed" else 0)


@pytest.mark.parametrize(
    ("name", "flags", "problem"),
    [
        ("hashed", [], "layer 'user_layer' holds 2 embeddings"),
        ("session", [], "tower 'user': the model goes on after the embedding of 'query_model': TensorArrayUnstack"),
        ("words", ["--tower=user=user_tower,item=item_tower"], "looks up the words of a text: they are not ids"),
        ("several", [], "tower 'user': layer 'user_layer' holds 2 embeddings"),
        ("several", [BOTH], "tower 'user' takes time (float32), user_id (string), not an id alone"),
    ],
)
def test_what_lacks_flags_is_refused(job, store, kinds, capsys, name, flags, problem):
    line = refused(job, capsys, store.log(kinds(name), name, MARCH_1), *flags)
    assert problem in line, line
