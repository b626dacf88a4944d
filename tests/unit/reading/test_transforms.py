"""The transforms in a pipeline, and what their reports add up to."""

import dataclasses
import functools
import re
from datetime import date

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pytest
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.testing.test_pipeline import TestPipeline
from apache_beam.testing.util import assert_that, equal_to
from towers import described

from beam_pipeline import metrics
from beam_pipeline.errors import AuditError, BadIdError, BadVectorError, ChecksumError
from beam_pipeline.files import open_file
from beam_pipeline.formats.model import Checksum, Encoding, Matrix, Tower, Vocabulary
from beam_pipeline.formats.protobuf import Span
from beam_pipeline.formats.saved_model.reader import SavedModel
from beam_pipeline.reading import pieces, rows
from beam_pipeline.reading.rows import Batch, read_piece, to_rows
from beam_pipeline.reading.tally import Report, tally
from beam_pipeline.reading.transforms import PIECES, REPORTS, ROWS, CutTower, ReadRows
from beam_pipeline.training import Run, Training, by_name


def tower_of(model, name):
    return SavedModel(str(model.folder), open_file).tower(name, f"{name}_layer")


def read(pipeline, tower):
    """Reads a tower by rows, as dicts with a day."""
    towers = {"run": tower}
    split = functools.partial(to_rows, tower=tower.name, constants={"run": {"day": 1}})
    cut = pipeline | CutTower(towers)
    read = cut[PIECES] | ReadRows(towers, split)
    return {ROWS: read[ROWS], REPORTS: (cut[REPORTS], read[REPORTS]) | beam.Flatten()}


def training(*towers):
    return [Training(Run("run", "", "", "", date(2026, 3, 1), ""), "", by_name(towers))]


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1000)


@pytest.mark.parametrize("name", ["plain", "special", "one"])
@pytest.mark.parametrize("tower", ["user", "item"])
def test_read_tower_emits_every_row(models, small_pieces, name, tower):
    model = models(name)
    with TestPipeline(runner=FnApiRunner()) as pipeline:
        rows = read(pipeline, tower_of(model, tower))[ROWS]
        expected = [
            {"day": 1, f"{tower}_id": key, f"{tower}_embedding": vector} for key, vector in model.rows(tower).items()
        ]
        assert_that(rows, equal_to(expected))


def test_counters(models, small_pieces):
    pipeline = TestPipeline(runner=FnApiRunner())
    _ = read(pipeline, tower_of(models("special"), "user"))
    result = pipeline.run()
    assert metrics.committed(result, "read-rows") == 150
    assert metrics.committed(result, "read-bytes") == 150 * 16


def reports_of(tower, piece_bytes=500):
    return [read_piece("run", piece, tower, open_file)[1] for piece in pieces.cut(tower, open_file, piece_bytes)]


def test_all_reports_together_give_the_number_of_ids(models):
    tower = tower_of(models("special"), "user")
    reports = reports_of(tower)
    assert len(reports) > 4
    assert tally(reversed(reports), training(tower))["run", "user"].ids == 100


def test_the_norms(models):
    for name in ("plain", "float64"):
        tower = tower_of(models(name), "user")
        norms = np.linalg.norm(models(name).vectors("user"), axis=1)
        found = tally(reports_of(tower), training(tower))["run", "user"]
        assert (found.norm_min, found.norm_max) == pytest.approx((norms.min(), norms.max()), rel=1e-14)
        assert found.norm_mean == pytest.approx(norms.mean(), rel=1e-14)
        assert found.zero_vectors == 0
        assert found.bytes == tower.matrix.rows * tower.matrix.row_bytes


def test_norms_at_the_edges():
    tower = Tower(
        "user",
        "",
        Matrix("", 0, 4, 2, "float64", Checksum("crc32c", 0, Span(0, 64))),
        Vocabulary("", Span(0, 0), Encoding.LINES, 0),
    )
    names = pa.array([b"a", b"b", b"c", b"d"])
    vectors = np.array([[0, -0.0], [3, 4], [1e200, 0], [1.7e308, 1.7e308]])
    norms = rows._checked_norms(vectors, names, range(4), tower)
    assert (norms.smallest, norms.largest, norms.zeros) == (0.0, np.finfo(np.float64).max, 1)
    vectors[2, 1] = np.nan
    with pytest.raises(BadVectorError, match=r"id 'c' \(row 2\) holds NaN"):
        rows._checked_norms(vectors, names, range(4), tower)


def unsummed(tower):
    return dataclasses.replace(tower, matrix=dataclasses.replace(tower.matrix, checksum=None))


def test_a_matrix_without_a_checksum_is_counted(models):
    """Rows and bytes of all pieces, and every piece once; there is nothing to compare the bytes with."""
    user, item = (tower_of(models("special"), name) for name in ("user", "item"))
    towers = pieces.cover([unsummed(user), item])
    assert towers[0].rest == ()
    reports = [report for tower in towers for report in reports_of(tower)]
    found = tally(reports, training(*towers))
    assert found == tally([*reports_of(user), *reports_of(item)], training(user, item))
    with pytest.raises(AuditError, match="tower 'user': rows"):
        tally(reports[1:], training(*towers))


def computed(tower, vectors, ids=None):
    ids = [f"id {at}" for at in range(len(vectors))] if ids is None else ids
    return rows.read(Batch("run", pa.array(ids, pa.string()), np.array(vectors, "f4")), {"run": tower}, open_file)


def test_computed_vectors_are_counted_in_any_order():
    tower = described("user", rows=3, dimension=2, checksum=False)
    batch, first = computed(tower, [[3, 4], [0, 0]])
    assert batch.vectors.tolist() == [[3, 4], [0, 0]]
    _, second = computed(tower, [[6, 8]])
    nothing, third = computed(tower, np.empty((0, 2)))
    assert nothing is None
    found = tally([second, third, first], training(tower))["run", "user"]
    assert (found.ids, found.bytes, found.norm_min, found.norm_max, found.zero_vectors) == (3, 24, 0, 10, 1)
    with pytest.raises(AuditError, match="2 of 3 rows were read"):
        tally([first], training(tower))


@pytest.mark.parametrize(
    ("vectors", "ids", "words"),
    [
        ([[1, 2], [1, np.nan]], None, r"vector of id 'id 1' \(row 1\) holds NaN or infinity"),
        ([[1, 2], [3, 4]], ["a", ""], "the id of row 1 is empty"),
        ([[1, 2, 3]], None, r"vectors of shape \(1, 3\) were computed, not \(1, 2\)"),
        ([[1, 2]], ["a", "b"], r"vectors of shape \(1, 2\) were computed, not \(2, 2\)"),
    ],
)
def test_what_is_wrong_with_computed_vectors_is_reported(vectors, ids, words):
    batch, report = computed(described("user", rows=3, dimension=2), vectors, ids)
    assert batch is None
    assert re.search(words, str(report.problem))


@pytest.mark.parametrize("change", [lambda r: r[1:], lambda r: r[:-1], lambda r: r[:2] + r[3:], lambda r: [*r, r[2]]])
def test_a_report_that_is_missing_or_double(models, change):
    tower = tower_of(models("special"), "user")
    with pytest.raises(AuditError, match="rows"):
        tally(change(reports_of(tower)), training(tower))


def test_pieces_whose_checksums_do_not_add_up(models):
    tower = tower_of(models("special"), "user")
    reports = reports_of(tower)
    reports[2] = dataclasses.replace(reports[2], crc=reports[2].crc ^ 1)
    with pytest.raises(ChecksumError, match="tower 'user' do not match the checkpoint's crc32c"):
        tally(reports, training(tower))


def test_the_first_problem_is_told_and_the_others_counted():
    problems = [BadIdError("second"), BadVectorError("first"), BadIdError("third")]
    reports = [Report("run", "user", row, problem=problem) for row, problem in zip([7, 3, 9], problems, strict=True)]
    with pytest.raises(BadVectorError, match=r"^first \(and 2 more problems\)$"):
        tally(reports, [])


def test_a_problem_is_reported_not_raised(damaged, small_pieces):
    model = damaged("plain")
    items = model.folder / "assets" / "items.txt"
    items.write_bytes(items.read_bytes().replace(b"item 7\n", b"\n") + b"one more\n")

    def check(reports):
        assert sorted(str(r.problem).split(": ")[1][:12] for r in reports if r.problem) == [
            "id 'one more",
            "the id of ro",
        ]

    with TestPipeline(runner=FnApiRunner()) as pipeline:
        assert_that(read(pipeline, tower_of(model, "item"))[REPORTS], check)


def test_an_empty_vocabulary(damaged):
    model = damaged("plain")
    (model.folder / "assets" / "items.txt").write_bytes(b"")
    tower = tower_of(model, "item")
    with pytest.raises(BadIdError, match="tower 'item' has no ids"):
        tally(reports_of(tower), training(tower))
