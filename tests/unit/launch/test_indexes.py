"""What the report says of vector indexes, and how one is created; against a small BigQuery that has some."""

import re
from datetime import date
from types import SimpleNamespace

import pytest
from google.api_core.exceptions import BadRequest, Forbidden, NotFound
from towers import described

from beam_pipeline.bigquery.indexes import ensure_index
from beam_pipeline.bigquery.publication import Publication
from beam_pipeline.bigquery.tables import Destination
from beam_pipeline.errors import ConfigError, DimensionChangedError, PublishError
from beam_pipeline.launch import indexes
from beam_pipeline.launch.findings import Findings
from beam_pipeline.training import Run, Training

DESTINATION = Destination("p", "d", "EU", "two_tower")
TABLE = DESTINATION.table("item")
TRAINING = Training(Run("r1", "n", "1", "e", date(2026, 3, 8), "gs://b/a"), "gs://b/a", {"item": described("item")})


class Indexed:
    """A BigQuery with one table.

    Attributes:
        megabytes: of the table; None where there is none.
        lengths: YYYYMMDD → length of the vectors in the partition; logged ones are in the log alone.
        indexes: (name, distance, status, reason) of each.
        refused: what it says of a new index; None takes it.
        asked, created: statements.
    """

    def __init__(self, megabytes=50.0, lengths=None, logged=None):
        self.megabytes, self.lengths, self.logged = megabytes, lengths or {}, logged or {}
        self.indexes, self.refused, self.created, self.listed = [], None, [], []

    def get_table(self, name):
        if self.megabytes is None:
            raise NotFound(name)
        return SimpleNamespace(num_bytes=int(self.megabytes * 1e6))

    def query(self, sql, job_config):
        assert job_config.dry_run
        self._index(sql)

    def query_and_wait(self, sql, job_config=None):
        if "INFORMATION_SCHEMA.VECTOR_INDEXES" in sql:
            rows = [(n, status, 98, reason, _ddl(n, distance)) for n, distance, status, reason in self.indexes]
        elif "INFORMATION_SCHEMA.PARTITIONS" in sql:
            rows = [
                (TABLE.rpartition(".")[2], day, 9)
                for day in {*self.lengths, *(day.replace("-", "") for day in self.logged)}
            ]
        elif "SELECT train_date, dimension FROM" in sql:
            rows = [(date.fromisoformat(day), length) for day, length in self.logged.items()]
        else:
            self._index(sql)
            name, distance = re.search(r"`(\w+)` ON .*distance_type = '(\w+)'", sql).groups()
            self.indexes.append((name, distance, "ACTIVE", None))
            self.created.append(sql)
            rows = []
        return [SimpleNamespace(values=lambda row=row: row) for row in rows]

    def list_rows(self, partition, selected_fields, max_results):
        day = str(partition).rpartition("$")[2]
        self.listed.append(day)
        return [([0.0] * self.lengths[day],)]

    def _index(self, sql):
        assert sql.startswith("CREATE VECTOR INDEX IF NOT EXISTS")
        if self.refused:
            raise BadRequest(self.refused)


def _ddl(name, distance):
    options = f"distance_type = '{distance}', index_type = 'TREE_AH'" if distance else "index_type = 'IVF'"
    return f"CREATE VECTOR INDEX `{name}` ON `{TABLE}`(item_embedding) OPTIONS ({options})"


def report(client, distance="COSINE", **more):
    findings = Findings()
    what = Publication(DESTINATION, (TRAINING,), "gs://b/tmp", "fail", "token", vector_index=distance, **more)
    indexes.examine(findings, client, what)
    return findings


def lines(client, distance="COSINE"):
    return [(line.status, line.text) for line in report(client, distance).lines]


def test_without_the_flag_nothing_is_asked_or_reported():
    assert lines(None, None) == []


def test_emulators_have_none(monkeypatch):
    monkeypatch.setenv("BIGQUERY_EMULATOR_HOST", "x")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "x")
    assert lines(None) == [("note", "none is created: emulators have no vector indexes")]
    ensure_index(None, TABLE, "item", "COSINE")


def test_a_new_index():
    assert lines(Indexed(None))[0] == ("ok", f"COSINE, will be created with {TABLE}")
    assert lines(Indexed(50)) == [("ok", "COSINE, will be created")]


def test_a_small_table():
    for client, size in ((Indexed(None), "0.0"), (Indexed(9.5), "9.5")):
        status, text = lines(client)[-1]
        assert status == "note"
        assert text.startswith(f"{TABLE} will have {size} MB: BigQuery builds no index below 10 MB")
    assert len(lines(Indexed(10))) == 1


def test_an_index_that_is_there():
    client = Indexed()
    client.indexes = [("by_hand", "COSINE", "ACTIVE", None)]
    assert lines(client) == [("ok", "by_hand: COSINE, 98 % of the rows are indexed")]
    client.indexes = [("by_hand", "COSINE", "TEMPORARILY DISABLED", "over the organization's limit")]
    assert lines(client) == [("note", "by_hand: temporarily disabled: over the organization's limit")]


@pytest.mark.parametrize(("distance", "shown"), [("DOT_PRODUCT", "DOT_PRODUCT"), (None, "EUCLIDEAN")])
def test_an_index_of_another_distance(distance, shown):
    client = Indexed()
    client.indexes = [("by_hand", distance, "ACTIVE", None)]
    error = report(client).error
    assert isinstance(error, ConfigError)
    assert str(error) == (
        f"index by_hand of {TABLE} is for {shown}, not COSINE, and a column has one: choose --vector_index={shown}, or "
        f"DROP VECTOR INDEX by_hand ON `{TABLE}`"
    )
    ensure_index(client, TABLE, "item", "COSINE")
    assert client.created == []


def test_vectors_of_several_lengths_name_their_partition():
    """What the log knows is not read; of a partition that it does not know, one row is listed."""
    client = Indexed(lengths={"20260201": 8, "20260208": 16}, logged={"2026-02-15": 8})
    error = report(client).error
    assert isinstance(error, DimensionChangedError)
    assert str(error).startswith(
        f"partition 2026-02-08 of {TABLE} holds vectors of 16 values and others hold vectors of 8"
    )
    assert client.listed == ["20260201", "20260208"]
    # The one that is about to be published counts, in place of what its partition holds.
    assert report(Indexed(logged={"2026-02-01": 8, "2026-03-08": 16})).error is None
    assert "partition 2026-03-08" in str(report(Indexed(logged={"2026-02-01": 16, "2026-02-08": 16})).error)


def test_what_bigquery_refuses_is_reported_before_and_stops_the_job():
    client = Indexed()
    client.refused = "Vector indexes are not supported in the Standard edition"
    assert str(report(client).error) == f"BigQuery refuses the vector index: 400 {client.refused}"
    with pytest.raises(PublishError, match=rf"refused the vector index of {TABLE}: {client.refused}; nothing was pub"):
        ensure_index(client, TABLE, "item", "COSINE")


def test_the_latest_table_has_an_index_of_its_own():
    client = Indexed()
    found = [(line.status, line.text) for line in report(client, latest_tables=True).lines]
    assert found[0] == found[1] == ("ok", "COSINE, will be created")
    # All rows are replaced: 11 small ones remain.
    assert found[2][1].startswith("p.d.two_tower_item_embedding_latest will have 0.0 MB")
    ensure_index(client, DESTINATION.latest("item"), "item", "COSINE", partitioned=False)
    assert client.created == [
        "CREATE VECTOR INDEX IF NOT EXISTS `two_tower_item_embedding_latest_index` ON "
        "`p.d.two_tower_item_embedding_latest`(item_embedding) OPTIONS (index_type = 'TREE_AH', distance_type = 'COSINE')"
    ]


def test_a_launcher_that_may_not_create_it_submits_the_job_all_the_same(monkeypatch):
    client = Indexed()

    def refuse(*_, **__):
        raise Forbidden("Permission bigquery.tables.createIndex denied")

    monkeypatch.setattr(client, "query", refuse)
    assert lines(client) == [("note", "COSINE, will be created: this account may not ask whether BigQuery allows it")]


def test_an_index_is_created_once():
    client = Indexed()
    for _ in range(2):
        ensure_index(client, TABLE, "item", "DOT_PRODUCT")
    assert client.created == [
        "CREATE VECTOR INDEX IF NOT EXISTS `two_tower_item_embedding_index` ON `p.d.two_tower_item_embedding`"
        "(item_embedding) PARTITION BY train_date OPTIONS (index_type = 'TREE_AH', distance_type = 'DOT_PRODUCT')"
    ]
