"""ReadEmbeddings and PublishEmbeddings in pipelines of other people."""

import dataclasses
from datetime import date

import apache_beam as beam
import pytest
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.testing.test_pipeline import TestPipeline
from apache_beam.testing.util import assert_that, equal_to

import beam_pipeline as bp
from beam_pipeline.formats.model import Ending, Tail

LAYERS = {"user": "user_layer", "item": "item_layer"}
RUN = bp.Run("0123abcd", "weekly", "1", "two tower's é", date(2026, 3, 1), "")


def towers_of(model, **changes):
    with bp.open_model(model.folder) as opened:
        return opened.towers(LAYERS, **changes)


@pytest.mark.parametrize(("name", "fixture"), [("plain", "models"), ("special", "models"), ("static", "tables")])
def test_read_embeddings_emits_every_id_once(request, name, fixture):
    model = request.getfixturevalue(fixture)(name)
    with TestPipeline(runner=FnApiRunner()) as pipeline:
        for side, tower in towers_of(model).items():
            read = pipeline | f"Read {side}" >> bp.ReadEmbeddings(tower)
            pairs = read | f"List {side}" >> beam.MapTuple(lambda key, vector: (key, vector.tolist()))
            assert_that(pairs, equal_to([*model.rows(side).items()]), label=f"Check {side}")


def test_read_embeddings_of_a_damaged_file_fails_the_pipeline(damaged):
    model = damaged("plain")
    tower = towers_of(model)["user"]
    (data,) = model.folder.glob("variables/variables.data-*")
    content = bytearray(data.read_bytes())
    content[tower.description.matrix.offset + 100] ^= 1
    data.write_bytes(content)
    pipeline = TestPipeline(runner=FnApiRunner())
    _ = pipeline | bp.ReadEmbeddings(tower)
    with pytest.raises(Exception, match="do not match the checkpoint's crc32c"):
        pipeline.run().wait_until_finish()


def arguments(model, **changes):
    return {
        "towers": towers_of(model),
        "run": RUN,
        "dataset": "p.d",
        "location": "EU",
        "temp_location": "gs://b/tmp",
        **changes,
    }


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"towers": {}}, "towers: one or more, of one model"),
        ({"dataset": "raw_dev"}, "dataset='raw_dev': PROJECT.DATASET"),
        ({"temp_location": "/tmp"}, "temp_location='/tmp': load files need a bucket"),
        ({"if_partition_taken": "maybe"}, "if_partition_taken='maybe': one of fail, replace, keep"),
        ({"run": dataclasses.replace(RUN, run_id="a'b")}, "run: .* is not allowed in the publish script"),
    ],
)
def test_arguments_that_are_refused_before_anything_runs(models, changes, words):
    with pytest.raises(bp.errors.ConfigError, match=words):
        bp.PublishEmbeddings(**arguments(models("plain"), **changes))


def test_towers_of_two_models_or_of_no_name_are_refused(models):
    mixed = {"user": towers_of(models("plain"))["user"], "item": towers_of(models("retrained"))["item"]}
    with pytest.raises(bp.errors.ConfigError, match="vectors of two trainings cannot be compared"):
        bp.PublishEmbeddings(**arguments(models("plain"), towers=mixed))
    named = {"User": towers_of(models("plain"))["user"]}
    with pytest.raises(bp.errors.ConfigError, match="'User' is not a name"):
        bp.PublishEmbeddings(**arguments(models("plain"), towers=named))


def test_a_tower_that_goes_on_is_refused_unless_its_rows_are_wanted(models):
    towers = towers_of(models("plain"))
    tail = Tail(Ending.GOES_ON, (("dense", "MatMul"),))
    user = dataclasses.replace(towers["user"], description=dataclasses.replace(towers["user"].description, tail=tail))
    with pytest.raises(bp.errors.VectorNotServedError, match=r"continues after the embedding of 'user_layer': dense"):
        bp.PublishEmbeddings(**arguments(models("plain"), towers={**towers, "user": user}))
    bp.PublishEmbeddings(**arguments(models("plain"), towers={**towers, "user": user}, embedding_rows=True))
