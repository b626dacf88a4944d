"""What is usual, and which pair comes before which."""

from dataclasses import replace
from datetime import date, timedelta

import pytest

from beam_pipeline.bigquery.tables import Destination
from beam_pipeline.comparison import measures, publishing, tables
from beam_pipeline.comparison.results import Percentile, Result, earlier_values, previous, require_usual
from beam_pipeline.comparison.tables import Pair, Trained
from beam_pipeline.comparison.work import Comparison
from beam_pipeline.errors import UnusualError


def day(number):
    return date(2026, 1, 1) + timedelta(days=7 * number)


def known(values, tower="item"):
    """Returns the percentiles of successive pairs."""
    return [Percentile(tower, day(n + 1), day(n), f"r{n + 1}", f"r{n}", value) for n, value in enumerate(values)]


def pair(before, after):
    return Pair(*(Trained(day(n), f"r{n}", "", "", {}) for n in (before, after)))


def test_the_previous_pair_ends_where_this_one_begins():
    of_both = [*known([0.1, 0.2, 0.3]), *known([0.7, 0.8, 0.9], "user")]
    assert previous(of_both, "item", pair(3, 4)).value == 0.3
    assert previous(of_both, "user", pair(2, 3)).value == 0.8
    assert previous(of_both, "item", pair(0, 1)) is None
    # One that skips a date, and then one that nothing ends at.
    skips = replace(of_both[2], before=day(1), before_run="r1")
    assert previous([*of_both[:2], skips], "item", pair(3, 4)).value == 0.3
    assert previous(of_both, "item", pair(5, 6)).value == 0.3


def test_the_values_before_are_of_older_trainings_and_of_the_tower():
    of_both = [*known([0.1, 0.2, 0.3]), *known([0.7, 0.8, 0.9], "user")]
    assert earlier_values(of_both, "item", day(3)) == [0.1, 0.2]
    assert earlier_values(of_both, "user", day(9)) == [0.7, 0.8, 0.9]


def test_an_unusual_pair_is_named():
    values = known([0.50, 0.51, 0.49, 0.50, 0.52, 0.51, 0.9])
    require_usual(values[:-1], [pair(5, 6)])
    require_usual(known([0.5] * 4 + [0.9]), [pair(4, 5)])  # too few to say
    message = (
        r"tower 'item', .*: the 99th percentile is 0\.90, outside of the usual 0\.4\d to 0\.5\d of 6 earlier pairs"
    )
    with pytest.raises(UnusualError, match=message):
        require_usual(values, [pair(5, 6), pair(6, 7)])


@pytest.mark.parametrize("asked", [True, False])
def test_the_gate_is_the_jobs_last_step(asked, monkeypatch):
    monkeypatch.setattr(publishing, "percentiles", lambda *_: known([0.50, 0.51, 0.49, 0.50, 0.52, 0.51, 0.9]))
    destination = Destination("p", "d", "EU", "t")
    comparison = Comparison(destination, (pair(6, 7),), "user", "item", "gs://b/t", "t", fail_if_unusual=asked)
    if asked:
        with pytest.raises(UnusualError):
            list(publishing.gate(None, comparison, "launch"))
    else:
        assert list(publishing.gate(None, comparison, "launch")) == ["launch"]


def result(p99, earlier, movers=(), farthest=None, **values):
    columns = {"score_change_p99": p99, "distance_p99": 0.7, "note": None, "unusual_share": None, **values}
    return Result({**columns, "most_moved": list(movers)}, measures.usual(earlier), {}, farthest)


def test_verdicts():
    usual = [0.50, 0.51, 0.49, 0.50, 0.52]
    assert result(0.5, usual[:4]).verdict == "Too few trainings to say whether this is usual (4 of 5)."
    assert result(0.5, usual).verdict == (
        "As usual: the 99th percentile of score change is 0.50, within 0.46 to 0.54 over 5 earlier pairs."
    )
    assert result(0.9, usual, unusual_share=0.026).verdict == (
        "Unusual: the 99th percentile of score change is 0.90, and 0.46 to 0.54 over 5 earlier pairs is usual; "
        "2.6% of the ids are above the previous pair's 99th percentile."
    )
    movers = [{"id": f"i{n}", "score_change": 1.5 - n / 10} for n in range(8)]
    assert result(0.5, usual, movers, 1.05).verdict.endswith(
        "; farther than any id in 5 earlier pairs (1.05): i0, i1, i2 and 2 more."
    )
    assert "farther" not in result(0.5, usual, movers, 1.6).verdict
    assert result(None, [0.7] * 5).verdict.startswith("As usual: the 99th percentile of distance is 0.70")
    nothing = Result({**result(None, usual).values, "distance_p99": None, "note": "no common ids"}, measures.usual([]))
    assert nothing.verdict == "No verdict: no common ids."


def test_statements_carry_keys_labels_and_expiration():
    from datetime import UTC, datetime

    sql = tables.create_joined_sql("p.d.t", "SELECT 1", datetime(2026, 3, 1, tzinfo=UTC), "projects/p/key", {"a": "b"})
    assert sql == (
        "CREATE OR REPLACE TABLE `p.d.t` CLUSTER BY sample OPTIONS (expiration_timestamp = TIMESTAMP "
        "'2026-03-01 00:00:00+00', labels = [('a', 'b')], kms_key_name = 'projects/p/key') AS\nSELECT 1"
    )
    assert "kms" not in tables.create_joined_sql("p.d.t", "SELECT 1", datetime(2026, 3, 1, tzinfo=UTC), None, {})


def test_ids_and_runs_cannot_end_a_literal():
    nasty = Trained(date(2026, 3, 1), "'; DROP TABLE x; --", "`\"'\\", "", {})
    destination = Destination("p", "d", "EU", "t")
    for sql in (
        tables.join_sql(destination, "item", Pair(nasty, nasty)),
        tables.publish_script(destination, 0, Pair(nasty, nasty), "launch", ["item"], ["item"]),
    ):
        assert "DROP" not in sql
        assert '"' not in sql


@pytest.mark.parametrize(("wanted", "of"), [(10, 1_000_000), (100_000, 10_000_000), (5, 3), (100_000, 1_000_000_000)])
def test_a_sample_is_about_as_large_as_wanted_and_rarely_smaller(wanted, of):
    import numpy as np

    limit = int(tables.sample_restriction(wanted, of).removeprefix("sample <= "))
    assert -(1 << 63) <= limit < 1 << 63
    share = (limit + (1 << 63)) / (1 << 64)
    assert share * of >= min(of, wanted + 3 * np.sqrt(wanted)) - 1e-6
    assert share * of <= 1.05 * wanted + 1001


# https://cloud.google.com/bigquery/docs/reference/standard-sql/lexical#reserved_keywords; an emulator takes most of them.
RESERVED = [
    "ALL",
    "AND",
    "ANY",
    "ARRAY",
    "AS",
    "ASC",
    "ASSERT_ROWS_MODIFIED",
    "AT",
    "BETWEEN",
    "BY",
    "CASE",
    "CAST",
    "COLLATE",
    "CONTAINS",
    "CREATE",
    "CROSS",
    "CUBE",
    "CURRENT",
    "DEFAULT",
    "DEFINE",
    "DESC",
    "DISTINCT",
    "ELSE",
    "END",
    "ENUM",
    "ESCAPE",
    "EXCEPT",
    "EXCLUDE",
    "EXISTS",
    "EXTRACT",
    "FALSE",
    "FETCH",
    "FOLLOWING",
    "FOR",
    "FROM",
    "FULL",
    "GROUP",
    "GROUPING",
    "GROUPS",
    "HASH",
    "HAVING",
    "IF",
    "IGNORE",
    "IN",
    "INNER",
    "INTERSECT",
    "INTERVAL",
    "INTO",
    "IS",
    "JOIN",
    "LATERAL",
    "LEFT",
    "LIKE",
    "LIMIT",
    "LOOKUP",
    "MERGE",
    "NATURAL",
    "NEW",
    "NO",
    "NOT",
    "NULL",
    "NULLS",
    "OF",
    "ON",
    "OR",
    "ORDER",
    "OUTER",
    "OVER",
    "PARTITION",
    "PRECEDING",
    "PROTO",
    "QUALIFY",
    "RANGE",
    "RECURSIVE",
    "RESPECT",
    "RIGHT",
    "ROLLUP",
    "ROWS",
    "SELECT",
    "SET",
    "SOME",
    "STRUCT",
    "TABLESAMPLE",
    "THEN",
    "TO",
    "TREAT",
    "TRUE",
    "UNBOUNDED",
    "UNION",
    "UNNEST",
    "USING",
    "WHEN",
    "WHERE",
    "WINDOW",
    "WITH",
    "WITHIN",
]


def test_no_column_is_a_reserved_word():
    columns = [*tables.STAGED_COMPARISON_SCHEMA, *tables.change_schema("item")]
    names = {column.name for column in columns} | {inner.name for column in columns for inner in column.fields}
    assert not {name.upper() for name in names} & {*RESERVED}
