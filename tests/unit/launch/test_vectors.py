"""What the report says of towers whose vectors cannot be compared with each other."""

from dataclasses import replace
from datetime import date

import pytest

from beam_pipeline.bigquery.publication import Publication
from beam_pipeline.bigquery.tables import Destination
from beam_pipeline.formats.model import Checksum, Encoding, Ending, Matrix, Tail, Tower, Vocabulary
from beam_pipeline.formats.protobuf import Span
from beam_pipeline.launch import vectors
from beam_pipeline.launch.preflight import Findings
from beam_pipeline.training import Run, Training, by_name


def tower(folder, name, ids, dimension=4, tail=Ending.EMBEDDING, layer=None):
    path = folder / f"{name}.txt"
    path.write_text("".join(f"{one}\n" for one in ids))
    size = len(ids) * dimension * 4
    matrix = Matrix("weights", 0, len(ids), dimension, "float32", Checksum("crc32c", 0, Span(0, size)))
    vocabulary = Vocabulary(str(path), Span(0, path.stat().st_size), Encoding.LINES, 0)
    return Tower(name, layer or f"{name}_tower", matrix, vocabulary, tail=Tail(tail))


def findings(*towers, discovered=False):
    run = Run("run", "", "1", "", date(2026, 3, 1), "")
    publication = Publication(
        destination=Destination("p", "d", "US", "two_tower"),
        trainings=(Training(run, "model", by_name(towers)),),
        temp_location="gs://b/t",
        if_partition_taken="fail",
        launch_prefix="t",
        job_name="job",
    )
    report = Findings()
    vectors.examine(report, publication, embedding_rows=False, discovered=discovered)
    return [(line.status, line.text) for line in report.lines]


def test_towers_that_can_be_searched_against_each_other(tmp_path):
    assert findings(tower(tmp_path, "user", ["a", "b"]), tower(tmp_path, "item", ["a", "c"])) == []


@pytest.mark.parametrize(
    ("items", "dimension", "problem"),
    [
        (["b", "a"], 4, "user and item have the same ids"),
        (["x", "y"], 8, "user and item have vectors of 4 and of 8 values"),
    ],
)
def test_towers_that_cannot(tmp_path, items, dimension, problem):
    towers = tower(tmp_path, "user", ["a", "b"]), tower(tmp_path, "item", items, dimension)
    assert findings(*towers) == [("note", f"{problem}: they cannot be searched against each other")]
    ((status, text),) = findings(*towers, discovered=True)
    assert status == "stop"
    assert text.startswith(f"{problem}: 'user_tower' and 'item_tower', which nobody named, cannot be searched")


def test_the_default_layers_are_as_good_as_named(tmp_path):
    towers = [tower(tmp_path, name, ["a"], layer=f"{name}_layer") for name in ("user", "item")]
    assert [status for status, _ in findings(*towers, discovered=True)] == ["note"]


def test_what_cannot_be_told_is_a_note_with_the_reason(tmp_path):
    untold = tower(tmp_path, "user", ["a"], tail=Ending.UNKNOWN)
    ((status, text),) = findings(untold)
    assert status == "note"
    assert text.startswith("it is unknown whether user_tower continues after its embedding")


def test_vectors_of_files_that_differ_in_length_are_refused(tmp_path):
    user, item = (replace(tower(tmp_path, name, ["a"], dimension), source="file", tail=Tail(Ending.LOGGED))
                  for name, dimension in (("user", 4), ("item", 8)))  # fmt: skip
    stop = next(text for status, text in findings(user, item) if status == "stop")
    assert stop.startswith(
        "user and item have vectors of 4 and of 8 values: user_tower and item_tower cannot be searched"
    )
    assert not [text for status, text in findings(user, replace(item, source="index")) if status == "stop"]
