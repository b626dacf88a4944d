"""Reports added up: nothing left out, nothing twice, and the checksum of the whole. Real towers: test_transforms."""

import dataclasses
from datetime import date

import pytest
from towers import computed, described

from beam_pipeline import checksums
from beam_pipeline.errors import AuditError, BadIdError, ChecksumError
from beam_pipeline.formats.model import Checksum
from beam_pipeline.formats.protobuf import Span
from beam_pipeline.reading.tally import Norms, Report, Tally, tally
from beam_pipeline.training import Run, Training, by_name

RUN = Run("run", "", "", "", date(2026, 3, 1), "")


def tower(name="user", rows=10, checksum=None, offset=0):
    found = described(name, rows=rows)
    return dataclasses.replace(found, matrix=dataclasses.replace(found.matrix, checksum=checksum, offset=offset))


def report(first_row, rows, *, name="user", crc=0, at=0, ids=None):
    norms = Norms(1.0, 2.0 * rows, 3.0, 1)
    count = rows if ids is None else ids
    return Report("run", name, first_row, rows, count, at + 32 * first_row, 32 * rows, crc, norms if count else None)


def added(reports, *towers):
    return tally(reports, [Training(RUN, "", by_name(towers or (tower(),)))])


def test_what_is_added_up():
    reports = [report(4, 6), report(0, 4, ids=3), Report("other", "user", 0, 10, 10)]
    assert added(reports) == {("run", "user"): Tally(9, 320, 1.0, pytest.approx(20 / 9), 3.0, 2)}


def test_reports_come_in_any_order():
    """Of the first two rows, one could pass for the other if rows began at 1."""
    assert added([report(1, 9), report(0, 1)]).keys() == {("run", "user")}


def test_one_problem_is_reported_as_it_is_and_two_with_their_number():
    problems = [Report("run", "user", row, problem=BadIdError(f"row {row} is bad")) for row in (2, 1)]
    with pytest.raises(BadIdError, match=r"^row 2 is bad$"):
        tally(problems[:1], [])
    with pytest.raises(BadIdError, match=r"^row 1 is bad \(and 1 more problem\)$"):
        tally(problems, [])


def test_computed_rows_are_as_many_as_their_source_announced():
    sources = [Report("run", "user", None, announced=6), Report("run", "user", None, announced=4)]
    reports = [Report("run", "user", None, rows, rows, norms=Norms(1.0, rows, 1.0, 0)) for rows in (7, 3)]
    assert added([*sources, *reports], computed("user"))["run", "user"].ids == 10
    with pytest.raises(AuditError, match=r"^tower 'user': 7 of 10 rows were read$"):
        added([*sources, reports[0]], computed("user"))
    with pytest.raises(BadIdError, match=r"^tower 'user' has no ids: SELECT 1 is empty$"):
        added([Report("run", "user", None, announced=0)], computed("user"))


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        ([(0, 4), (6, 4)], "rows 4 to 6 were not read once"),
        # As many rows as there are, some of them twice and others never.
        ([(0, 4), (6, 4), (8, 2)], "rows 4 to 6 were not read once"),
        ([(0, 4), (2, 6)], "rows 4 to 2 were not read once"),
        ([(0, 5), (6, 5)], "rows 5 to 6 were not read once"),
        ([(1, 9)], "rows 0 to 1 were not read once"),
        ([(0, 9)], "9 of 10 rows were read"),
        ([(0, 11)], "11 of 10 rows were read"),
        ([], "0 of 10 rows were read"),
    ],
)
def test_rows_that_were_not_read_once(pieces, words):
    with pytest.raises(AuditError) as caught:
        added([report(*piece) for piece in pieces])
    assert str(caught.value) == f"tower 'user': {words}"


def test_a_tower_without_ids():
    with pytest.raises(BadIdError, match=r"^tower 'user' has no ids: its vocabulary is empty; train it with one$"):
        added([report(0, 10, ids=0)])


def halves(content, first=0):
    """Returns reports of the two halves of bytes, with real checksums."""
    parts = content[:160], content[160:]
    return [report(5 * at, 5, crc=checksums.value("crc32c", part), at=first) for at, part in enumerate(parts)]


CONTENT = bytes(range(256)) + bytes(64)


def summed(start=0, end=320, value=None):
    return Checksum("crc32c", checksums.value("crc32c", CONTENT) if value is None else value, Span(start, end))


def test_a_checksum_that_fits_and_one_that_does_not():
    assert added(halves(CONTENT), tower(checksum=summed())).keys() == {("run", "user")}
    with pytest.raises(ChecksumError) as caught:
        added(halves(CONTENT), tower(checksum=summed(value=1)))
    assert str(caught.value) == (
        "gs://bucket/data: the embeddings of tower 'user' do not match the checkpoint's crc32c; "
        "the file was damaged after the training: log the model again"
    )


def test_bytes_that_were_read_twice_and_change_no_checksum():
    """A crc of 0 in front of another changes nothing, so the length has to be compared as well."""
    zero = Report("run", "user", 0, 0, 0, 0, 160, 0)
    with pytest.raises(ChecksumError, match="do not match the checkpoint's crc32c"):
        added([*halves(CONTENT), zero], tower(checksum=summed()))


@pytest.mark.parametrize(
    ("span", "offset", "words"),
    [((0, 400), 80, "bytes 0 to 80 of gs://bucket/data"), ((0, 1400), 0, "bytes 320 to 1,400 of gs://bucket/data")],
)
def test_bytes_that_nobody_read(span, offset, words):
    """The checksum covers a tensor, of which the matrix may be a part."""
    with pytest.raises(AuditError) as caught:
        added(halves(CONTENT, offset), tower(checksum=summed(*span), offset=offset))
    assert str(caught.value) == f"tower 'user': {words} were not read"


def test_towers_that_share_a_matrix_are_named_together():
    shared = tower(checksum=summed(value=1)), tower("item", checksum=summed(value=1))
    reports = halves(CONTENT)
    with pytest.raises(ChecksumError, match="the embeddings of tower 'user', 'item' do not match"):
        added([*reports, *(dataclasses.replace(each, tower="item") for each in reports)], *shared)
