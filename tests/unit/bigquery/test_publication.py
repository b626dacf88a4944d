"""Publishing against the answers of a real BigQuery; what emulators can run is in tests/end_to_end."""

import dataclasses
import json
import os
import re
import time
from datetime import UTC, date, datetime, timedelta
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlparse

import google.auth
import pytest
from apache_beam.internal.gcp import auth as beam_auth
from fake_bigquery import (
    ABORTED,
    AMBIGUOUS_BACKEND,
    AMBIGUOUS_INTERNAL,
    AMBIGUOUS_RATE,
    BACKEND,
    DENIED,
    DONE,
    INTERNAL,
    LOST_ANSWER,
    NOT_SERIALIZABLE,
    RATE,
    TAKEN,
    serve,
)
from google.api_core.exceptions import NotFound
from google.auth.credentials import AnonymousCredentials
from google.cloud import bigquery
from towers import described
from tracking import serving

from beam_pipeline import metrics
from beam_pipeline.bigquery import indexes, publication, tables
from beam_pipeline.bigquery.publication import Publication, partition_life
from beam_pipeline.bigquery.tables import Destination
from beam_pipeline.comparison import publishing
from beam_pipeline.comparison import tables as comparison_tables
from beam_pipeline.comparison.tables import Pair, Trained
from beam_pipeline.comparison.work import Comparison
from beam_pipeline.errors import (
    AuditError,
    BadIdError,
    DatasetMissingError,
    IncompatibleTableError,
    PartitionTakenError,
    PublishError,
)
from beam_pipeline.reading.tally import Tally
from beam_pipeline.training import Run, Training, by_name

RUN = Run("0123abcd", "spring", "7", "two_tower", date(2026, 3, 1), "gs://bucket/7/0123abcd/artifacts")
TOWERS = tuple(described(name) for name in ("user", "item"))
WHAT = Publication(
    Destination("my-project", "raw_prod", "EU", "two_tower"),
    (Training(RUN, "gs://bucket/7/0123abcd/artifacts/model", by_name(TOWERS)),),
    "gs://bucket/tmp",
    "fail",
    "token",
)
LATER = dataclasses.replace(RUN, run_id="89abcdef", train_date=date(2026, 3, 8))
TWO = dataclasses.replace(WHAT, trainings=(*WHAT.trainings, Training(LATER, "gs://bucket/later", by_name(TOWERS))))
TALLIES = {
    (run, tower): Tally(1, 32, 1.0, 1.0, 1.0, 0) for run in ("0123abcd", "89abcdef") for tower in ("user", "item")
}


def publish(client, what=WHAT):
    """Publishes; returns how long it waited before each further attempt, of a second and more."""
    waits = []
    publication.publish(client, what, "launch1", TALLIES, sleep=waits.append)
    return [seconds for seconds in waits if seconds >= 1]


def test_one_job_publishes():
    with serve(DONE) as (service, client):
        assert publish(client) == []
        assert service.submitted == ["publish_embeddings_launch1_0_0"]


@pytest.mark.timeout(20)  # The client itself would ask for ten minutes whether an ambiguous failure is one.
@pytest.mark.parametrize(
    "conflict",
    [
        *(ABORTED, NOT_SERIALIZABLE, BACKEND, INTERNAL, RATE),
        *(AMBIGUOUS_BACKEND, AMBIGUOUS_INTERNAL, AMBIGUOUS_RATE),
    ],
    ids=lambda failure: failure["reason"],
)
def test_a_cancelled_publication_starts_over_under_another_id(conflict):
    with serve(conflict, conflict, DONE) as (service, client):
        waits = publish(client)
        assert service.submitted == [f"publish_embeddings_launch1_0_{n}" for n in range(3)]
    assert 1 <= waits[0] <= 2 <= waits[1] <= 4


def test_conflicts_that_do_not_end():
    words = "10 attempts failed, the last with: Query error: Transaction is aborted due to concurrent update"
    with serve(*[ABORTED] * publication.ATTEMPTS) as (_, client), pytest.raises(PublishError, match=words):
        publish(client)


def test_a_retry_after_the_commit_finds_it():
    with serve(DONE) as (service, client):
        publish(client)
        publish(client)
        assert service.submitted == ["publish_embeddings_launch1_0_0"]


def test_a_retry_after_a_conflict_goes_on_where_it_was():
    with serve(ABORTED, DONE) as (service, client):
        service.insert("publish_embeddings_launch1_0_0")
        publish(client)
        assert service.submitted == ["publish_embeddings_launch1_0_0", "publish_embeddings_launch1_0_1"]


def test_a_job_that_a_twin_submitted_a_moment_ago(monkeypatch):
    with serve(DONE) as (service, client):
        service.insert("publish_embeddings_launch1_0_0")
        answers = iter([None])
        find = publication._find_job
        # The twin's job is not there yet when it is looked up, and is when it is submitted: 409.
        monkeypatch.setattr(publication, "_find_job", lambda *args: next(answers, find(*args)))
        publish(client)
        assert service.submitted == ["publish_embeddings_launch1_0_0"] * 2


def test_a_job_that_exists_and_is_not_shown_yet():
    """409, then 404 for some seconds."""
    with serve(DONE) as (service, client):
        service.insert("publish_embeddings_launch1_0_0")
        service.hidden = 4  # the look-up before the job is submitted, and three after it was refused
        assert publish(client) == [1, 2, 4, 8]
        assert service.submitted == ["publish_embeddings_launch1_0_0"] * 2


def test_a_job_that_exists_and_is_never_shown():
    with serve(DONE) as (service, client):
        service.insert("publish_embeddings_launch1_0_0")
        service.hidden = 1000
        with pytest.raises(PublishError, match=r"job publish_embeddings_launch1_0_0 exists, but does not show it"):
            publish(client)
        assert service.submitted == ["publish_embeddings_launch1_0_0"] * 2


def test_a_bigquery_that_does_not_answer(monkeypatch):
    """The client asks again for ten minutes, here for none, and raises what is no GoogleAPICallError."""
    monkeypatch.setattr(bigquery.DEFAULT_RETRY, "_timeout", 0.1)
    with serve(DONE) as (service, client):
        service.down = True
        with pytest.raises(PublishError, match=r"did not answer about job publish_embeddings_launch1_0_0, .*start the"):
            publish(client)
        service.down = False
        publish(client)  # A retry of the step.
        assert service.submitted == ["publish_embeddings_launch1_0_0"]


def test_an_answer_that_is_lost():
    with serve(LOST_ANSWER) as (service, client):
        publish(client)
        assert set(service.submitted) == {"publish_embeddings_launch1_0_0"}


def test_the_partition_was_taken_meanwhile():
    with serve(TAKEN) as (service, client):
        with pytest.raises(
            PartitionTakenError, match=r"partition 2026-03-01 was taken by another run .*replace or keep"
        ):
            publish(client)
        with pytest.raises(PartitionTakenError):  # A retry of the step does not submit it again.
            publish(client)
        assert len(service.submitted) == 1


def test_a_refusal_is_not_tried_again():
    with serve(DENIED) as (service, client):
        with pytest.raises(
            PublishError, match=r"refused to publish \(job publish_embeddings_launch1_0_0\).*Access Denied"
        ):
            publish(client)
        assert len(service.submitted) == 1


def test_trainings_are_published_one_after_the_other_and_a_retry_goes_on_after_the_last():
    with serve(DONE, ABORTED, DONE) as (service, client):
        publish(client)  # A worker that died after the first training.
        publish(client, TWO)
        assert service.submitted == [f"publish_embeddings_launch1_{n}" for n in ("0_0", "1_0", "1_1")]


def test_a_published_launch_is_not_audited_again():
    with serve(DONE) as (_, client):
        publish(client)
        # Its staging tables may be gone: any query would be an error here.
        publication.audit(client, WHAT, "launch1", TALLIES)


def test_a_launch_whose_publication_was_cancelled_is_not_published():
    with serve(ABORTED) as (service, client):
        service.insert("publish_embeddings_launch1_0_0")
        assert not publication._published(client, "launch1")


# Cleaning up.

HELD = "Object 'bucket/tmp/embedding_loads/token/bq_load/1/t/a' is subject to bucket's retention policy"


class Storage(BaseHTTPRequestHandler):
    """A bucket that deletes nothing: `server.objects` are the names in it, `server.listed` says whether it lists them."""

    def do_GET(self):
        url = urlparse(self.path)
        _, objects, name = url.path.partition("/o")
        if not objects or not self.server.listed:  # The client also asks for the bucket, for traces that nobody reads.
            self.answer(403, "application/json", b'{"error": {"code": 403, "message": "storage.objects.list denied"}}')
            return
        prefix = unquote(name[1:]) or parse_qs(url.query)["prefix"][0]
        items = [
            {"name": each, "size": "1", "updated": "2020-01-01T00:00:00.000Z"}
            for each in self.server.objects
            if each.startswith(prefix)
        ]
        self.answer(200, "application/json", json.dumps(items[0] if name else {"items": items}).encode())

    def do_POST(self):  # a batch of one deletion, as Beam sends it
        sent = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.server.asked += re.findall("^DELETE .*/o/(\\S+?)[? ]", sent, re.MULTILINE)
        error = json.dumps({"error": {"code": 403, "message": HELD}})
        part = f"HTTP/1.1 403 Forbidden\r\nContent-Type: application/json\r\n\r\n{error}"
        whole = f"--part\r\nContent-Type: application/http\r\n\r\n{part}\r\n--part--"
        self.answer(200, "multipart/mixed; boundary=part", whole.encode())

    def answer(self, status, kind, body):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def bucket(monkeypatch):
    loads = [f"tmp/embedding_loads/token/bq_load/1/t/{name}" for name in "ab"]
    with serving(Storage, objects=[*loads, "tmp/embedding_artifacts/token/m"], listed=True, asked=[]) as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        monkeypatch.setattr(google.auth, "default", lambda *_, **__: (AnonymousCredentials(), "my-project"))
        monkeypatch.setattr(beam_auth._Credentials, "_credentials_init", False)
        yield server


def cleaned(client, caplog):
    """Cleans up after a launch; returns what it has counted and logged."""
    before = metrics.in_this_process("not-deleted")
    files = ["gs://bucket/tmp/embedding_loads/token/bq_load/1/t/a"]
    with caplog.at_level("WARNING", "beam_pipeline.bigquery.publication"):
        publication.clean(client, WHAT, "launch1", files)
    return metrics.in_this_process("not-deleted") - before, caplog.text


def test_what_cannot_be_deleted_is_left_logged_and_counted(bucket, caplog):
    with serve() as (service, client):
        service.tables = {f"two_tower_{tower}_embedding_staging_launch1" for tower in ("user", "item")}
        service.may_delete = False
        count, log = cleaned(client, caplog)
        assert {*bucket.asked} == {quote(name, safe="") for name in bucket.objects}  # one failure stops nothing else
        # Two tables, two load files, a copied model; the sweep finds them again, since they are old here.
        assert count == 2 + 2 + 1 + 2 + 1
        assert "table my-project.raw_prod.two_tower_user_embedding_staging_launch1: not all is deleted" in log
        assert "folder gs://bucket/tmp/embedding_loads/token/bq_load/1: not all is deleted: gs://bucket/tmp/" in log
        assert (
            "files of earlier jobs in gs://bucket/tmp/embedding_artifacts: not all is deleted: gs://bucket/tmp/" in log
        )


def test_a_comparison_leaves_what_it_cannot_delete_too(bucket, caplog):
    trained = Trained(date(2026, 3, 1), "r1", "n", "e", {"item": 1})
    comparison = Comparison(WHAT.destination, (Pair(trained, trained),), None, "item", "gs://bucket/tmp", "token")
    bucket.objects[:] = ["tmp/embedding_comparisons/token/launch1/a"]
    with serve() as (service, client):
        staged = comparison_tables.staged_change(WHAT.destination, "item", "launch1").rsplit(".", 1)[1]
        service.tables, service.may_delete = {staged}, False
        with caplog.at_level("WARNING", "beam_pipeline.bigquery.publication"):
            assert [*publishing.clean(client, comparison, "launch1")] == ["launch1"]
    assert f"{staged}: not all is deleted" in caplog.text
    assert "folder gs://bucket/tmp/embedding_comparisons/token: not all is deleted" in caplog.text


def test_a_bucket_that_may_not_be_listed_fails_nothing(bucket, caplog):
    bucket.listed = False
    with serve() as (service, client):
        service.tables = {f"two_tower_{tower}_embedding_staging_launch1" for tower in ("user", "item")}
        count, log = cleaned(client, caplog)
        assert service.tables == set()
        assert count == 4
        assert "storage.objects.list denied" in log


def test_staging_outlives_the_job_whatever_the_date():
    now = datetime(2026, 3, 10, 12, tzinfo=UTC)
    for day in (date(2026, 3, 10), date(2026, 3, 1), date(2019, 1, 1)):
        start = datetime(day.year, day.month, day.day, tzinfo=UTC)
        ends = start + timedelta(milliseconds=partition_life(day, now))
        assert timedelta(hours=48) <= ends - now <= timedelta(hours=72)
    # A clock that is behind the tracking server's.
    assert partition_life(date(2026, 3, 11), now) == 48 * 3600 * 1000


def test_staging_tables_expire():
    """What a launch that died has left is deleted by BigQuery itself, whatever the dataset's defaults are."""
    with serve() as (service, client):
        publication.prepare(client, TWO, "launch1")
        now = datetime.now(UTC)
    assert [table["tableReference"]["tableId"] for table in service.created] == [
        "two_tower_user_embedding_staging_launch1",
        "two_tower_item_embedding_staging_launch1",
    ]
    for table in service.created:
        left = datetime.fromtimestamp(int(table["expirationTime"]) / 1000, UTC) - now
        assert timedelta(hours=47, minutes=59) < left <= timedelta(hours=48)
        partitioning = table["timePartitioning"]
        assert (partitioning["type"], partitioning["field"]) == ("DAY", "train_date")
        # The oldest partition must outlive the job too.
        ends = datetime(2026, 3, 1, tzinfo=UTC) + timedelta(milliseconds=int(partitioning["expirationMs"]))
        assert ends - now > timedelta(hours=47, minutes=59)
        assert table["labels"]


# Tables that are created, and what a dataset makes of them.

KEY = "projects/p/locations/europe/keyRings/r/cryptoKeys/k"
EVERYTHING = dataclasses.replace(
    WHAT,
    partition_expiration_days=30,
    require_partition_filter=True,
    kms_key=KEY,
    vector_index="COSINE",
    latest_tables=True,
)


def name_of(table):
    return table["tableReference"]["tableId"]


def shaped(service, client, what=WHAT):
    """Creates the destination's tables; returns the bodies of the requests by the tables' names."""
    publication.shape(client, what, "launch1")
    return {name_of(table): table for table in service.created}


def columns_of(table):
    return [(c["name"], c["type"], c.get("mode", "NULLABLE"), c.get("description")) for c in table["schema"]["fields"]]


def test_the_tables_that_are_created():
    with serve() as (service, client):
        service.rows[tables.lock_rows_sql(WHAT.destination)] = [(0,)]
        created = shaped(service, client)
    assert [*created] == [
        "two_tower_user_embedding",
        "two_tower_item_embedding",
        "two_tower_embedding_log",
        "two_tower_embedding_lock",
    ]
    user, _, log, lock = created.values()
    assert columns_of(user) == [(c["name"], c["type"], c["mode"], c["description"]) for c in tables.schema("user")]
    assert user["timePartitioning"] == {"type": "DAY", "field": "train_date"}  # kept forever
    assert user["clustering"] == {"fields": ["user_id"]}
    assert user["description"] == "Embedding of each user after each training; one partition is one model."
    assert columns_of(log) == [(c.name, c.field_type, "NULLABLE", c.description) for c in tables.LOG_SCHEMA]
    assert log["description"] == (
        "One row for each run, tower and publication, written in the transaction that published them."
    )
    assert columns_of(lock) == [(c.name, c.field_type, "NULLABLE", c.description) for c in tables.LOCK_SCHEMA]
    assert lock["description"] == (
        "Every publication updates this row first, so that two at once conflict instead of mixing."
    )
    for table in created.values():
        assert table["labels"] == {"managed_by": "beam_pipeline"}
        assert not table.get("requirePartitionFilter")
        assert not table.get("encryptionConfiguration")
    assert service.queries == [
        tables.lock_rows_sql(WHAT.destination),
        tables.fill_lock_sql(WHAT.destination),
    ]


def test_the_tables_that_are_created_with_every_option():
    destination = WHAT.destination
    with serve() as (service, client):
        service.rows[tables.lock_rows_sql(destination)] = [(1,)]
        created = shaped(service, client, EVERYTHING)
    assert [*created][2:4] == ["two_tower_user_embedding_latest", "two_tower_item_embedding_latest"]
    user, latest = created["two_tower_user_embedding"], created["two_tower_user_embedding_latest"]
    thirty_days = str(30 * 24 * 60 * 60 * 1000)
    assert user["timePartitioning"] == {"type": "DAY", "field": "train_date", "expirationMs": thirty_days}
    assert user["requirePartitionFilter"] is True
    assert columns_of(latest) == columns_of(user)
    assert latest["clustering"] == {"fields": ["user_id"]}
    assert latest["description"] == (
        "Embedding of each user after the newest training, replaced by the next publication."
    )
    assert not {"timePartitioning", "requirePartitionFilter"} & latest.keys()
    assert {table["encryptionConfiguration"]["kmsKeyName"] for table in created.values()} == {KEY}
    expected = []
    for table_of, partitioned in ((destination.table, True), (destination.latest, False)):
        for tower in ("user", "item"):
            name = table_of(tower)
            sql = indexes.create_index_sql(name, tower, "COSINE", partitioned=partitioned)
            expected += [indexes.indexes_sql(name), sql]
    assert service.queries == [*expected, tables.lock_rows_sql(destination)]


def test_tables_that_exist_get_their_missing_columns_and_nothing_else():
    with serve() as (service, client):
        service.rows[tables.lock_rows_sql(WHAT.destination)] = [(1,)]
        shaped(service, client, dataclasses.replace(WHAT, latest_tables=True))
        service.created.clear()
        service.queries.clear()
        for table in service.resources.values():
            table["schema"]["fields"] = table["schema"]["fields"][:1]
        assert shaped(service, client, dataclasses.replace(WHAT, latest_tables=True)) == {}
        names = [
            name
            for table_of in (WHAT.destination.table, WHAT.destination.latest)
            for name in map(table_of, ("user", "item"))
        ]
        *altered, log, lock = service.queries
        assert [sql.split("`")[1] for sql in altered] == names
        assert all("ADD COLUMN IF NOT EXISTS mlflow_run_id STRING, ADD" in sql for sql in altered)
        assert log.startswith(f"ALTER TABLE `{WHAT.destination.log}` ADD COLUMN IF NOT EXISTS train_date DATE, ADD")
        assert lock == tables.lock_rows_sql(WHAT.destination)


def test_an_emulator_gets_one_column_at_a_time(monkeypatch):
    monkeypatch.setattr(publication.emulators, "emulated", lambda: True)
    table = bigquery.Table("p.d.t", schema=tables.LOCK_SCHEMA[:0])
    with serve() as (service, client):
        publication.add_columns(client, table, tables.LOCK_SCHEMA)
    assert [sql.count("ADD COLUMN") for sql in service.queries] == [1, 1]


@pytest.mark.parametrize(
    ("days", "latest", "life", "partition_life", "altered"),
    [
        (None, False, None, None, {}),
        (None, False, "1900000000000", None, {"user": True, "log": False, "lock": False}),
        (None, False, None, "86400000", {"user": True}),
        (30, False, None, "86400000", {}),
        (30, False, "1900000000000", "86400000", {"user": False, "log": False, "lock": False}),
        (None, True, None, "86400000", {"user": True}),
    ],
)
def test_no_table_inherits_an_expiration(days, latest, life, partition_life, altered):
    """Altered tables, and whether their partitions are."""
    what = dataclasses.replace(
        WHAT,
        partition_expiration_days=days,
        latest_tables=latest,
        trainings=(dataclasses.replace(WHAT.trainings[0], towers=by_name(TOWERS[:1])),),
    )
    names = {"user": WHAT.destination.table("user"), "log": WHAT.destination.log, "lock": WHAT.destination.lock}
    with serve() as (service, client):
        service.rows[tables.lock_rows_sql(WHAT.destination)] = [(1,)]
        service.life, service.partition_life = life, partition_life
        shaped(service, client, what)
    found = [sql for sql in service.queries if "SET OPTIONS" in sql]
    assert found == [tables.keep_forever_sql(names[name], partitioned) for name, partitioned in altered.items()]


def test_a_table_whose_expiration_was_taken_away_is_looked_at_again():
    wanted = bigquery.Table("my-project.raw_prod.t", schema=tables.LOG_SCHEMA)
    with serve() as (service, client):
        service.life = "1900000000000"
        query = service.query
        service.query = lambda sql: service.resources["t"].pop("expirationTime") and query(sql)
        assert publication.create_table(client, wanted, None).expires is None


def test_a_table_that_another_launch_creates_at_the_same_time():
    """Its own columns and options stay: what the other launch created is looked at like any table."""
    wanted = bigquery.Table("my-project.raw_prod.t", schema=tables.LOG_SCHEMA)
    with serve() as (service, client):
        service.is_taken, service.life = True, "1900000000000"
        assert publication.create_table(client, wanted, None).expires
        assert [name_of(table) for table in service.created] == ["t"]
        assert publication.create_table(client, wanted, None).expires
        assert len(service.created) == 1
        assert service.queries == []


@pytest.mark.parametrize("latest", [False, True])
def test_a_table_that_cannot_be_used_stops_the_job(latest):
    name = "two_tower_user_embedding" + "_latest" * latest
    words = {
        False: "it is partitioned by MONTH(train_date), not by DAY(train_date)",
        True: "it is partitioned, and holds one training alone",
    }
    with serve() as (service, client):
        shaped_before = bigquery.Table(f"my-project.raw_prod.{name}", schema=tables.schema_fields("user"))
        shaped_before.time_partitioning = bigquery.TimePartitioning(type_="MONTH", field="train_date")
        service.resources[name] = shaped_before.to_api_repr()
        with pytest.raises(IncompatibleTableError) as caught:
            shaped(service, client, dataclasses.replace(WHAT, latest_tables=latest))
    assert str(caught.value) == (
        f"table my-project.raw_prod.{name} cannot be used: {words[latest]}; "
        "rename it, or choose another name with --table_prefix, --table_suffix or --dataset"
    )


def test_every_difference_of_a_table_is_in_the_message():
    table = bigquery.Table("p.d.t", schema=[bigquery.SchemaField("user_id", "INT64")])
    with pytest.raises(
        IncompatibleTableError, match=r"not by DAY\(train_date\); column user_id is INT64, not STRING; re"
    ):
        publication.require_compatible(table, "user")


def test_the_columns_of_staging_tables():
    with serve() as (service, client):
        publication.prepare(client, dataclasses.replace(WHAT, kms_key=KEY), "launch1")
        publication.prepare(client, WHAT, "launch1")  # A retry finds them.
    keyed, _, plain, _ = service.created
    assert columns_of(keyed) == [
        (c["name"], c["type"], c["mode"], c["description"]) for c in tables.staging_schema("user")
    ]
    assert keyed["encryptionConfiguration"] == {"kmsKeyName": KEY}
    assert not plain.get("encryptionConfiguration")
    assert keyed["labels"] == {"managed_by": "beam_pipeline"}


def test_staging_tables_that_are_there_already():
    with serve() as (service, client):
        service.is_taken = True
        publication.prepare(client, WHAT, "launch1")
        assert len(service.created) == 2


def test_staging_tables_of_a_dataset_that_was_deleted():
    with serve() as (service, client):
        service.has_dataset = False
        with pytest.raises(DatasetMissingError) as caught:
            publication.prepare(client, WHAT, "launch1")
    assert str(caught.value) == "dataset my-project.raw_prod does not exist"
    assert isinstance(caught.value.__cause__, NotFound)


# The audit.


def audited(service, client, found, what=TWO, tallies=TALLIES):
    """Audits staging tables that hold (date, number, rows, ids) of each tower."""
    for tower, rows in found.items():
        service.rows[tables.audit_sql(what.destination, tower, "launch1")] = rows
    publication.audit(client, what, "launch1", tallies)


MARCH_1, MARCH_8 = date(2026, 3, 1), date(2026, 3, 8)
AS_READ = {tower: [(MARCH_1, 0, 1, 1), (MARCH_8, 1, 1, 1)] for tower in ("user", "item")}


def test_staging_tables_that_hold_what_was_read():
    with serve() as (service, client):
        audited(service, client, AS_READ)
    found = [each["query"]["query"] for each in service.configurations]
    assert found == [tables.audit_sql(TWO.destination, tower, "launch1") for tower in ("user", "item")]


def test_queries_for_results_carry_the_key():
    """BigQuery keeps results for a day, in a table that is encrypted with Google's key unless another is named."""
    with serve() as (service, client):
        audited(service, client, AS_READ, dataclasses.replace(TWO, kms_key=KEY))
    found = [each["query"]["destinationEncryptionConfiguration"] for each in service.configurations]
    assert found == [{"kmsKeyName": KEY}] * 2


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([(MARCH_1, 0, 1, 1)], "run 89abcdef: 0 rows"),
        ([(MARCH_1, 0, 1, 1), (MARCH_8, 1, 2000, 2000)], "run 89abcdef: 2,000 rows"),
        ([(MARCH_1, 0, 2, 1), (MARCH_8, 1, 1, 1)], "run 0123abcd: 2 rows"),  # loaded twice
        ([(MARCH_1, 1, 1, 1), (MARCH_8, 0, 1, 1)], "run 0123abcd: 0 rows"),
    ],
)
def test_rows_that_were_not_loaded_once(rows, words):
    with serve() as (service, client), pytest.raises(AuditError) as caught:
        audited(service, client, AS_READ | {"item": rows})
    assert str(caught.value) == (
        f"tower 'item' of {words} were loaded where the artifact holds 1 ids; nothing was published: start the job "
        "again, and report it if it happens twice"
    )


def test_an_id_that_appears_twice_is_named():
    query = tables.duplicates_sql(TWO.destination, "item", "launch1", LATER, 1)
    tallies = TALLIES | {("89abcdef", "item"): Tally(5, 32, 1.0, 1.0, 1.0, 0)}
    for what in (TWO, dataclasses.replace(TWO, kms_key=KEY)):
        with serve() as (service, client):
            service.rows[query] = [("it's", 3)]
            with pytest.raises(BadIdError) as caught:
                audited(service, client, AS_READ | {"item": [(MARCH_1, 0, 1, 1), (MARCH_8, 1, 5, 3)]}, what, tallies)
        assert str(caught.value) == (
            "tower 'item': id \"it's\" appears 3 times in the vocabulary; an id has one embedding: remove the duplicates "
            "and train again"
        )
        found = [each["query"].get("destinationEncryptionConfiguration") for each in service.configurations]
        assert found == [{"kmsKeyName": what.kms_key} if what.kms_key else None] * 3


def test_rows_of_another_training():
    others = [(date(2026, 3, 2), 0, 1, 1), (MARCH_8, 2, 1, 1)]
    with serve() as (service, client), pytest.raises(AuditError) as caught:
        audited(service, client, AS_READ | {"item": AS_READ["item"] + others})
    assert str(caught.value) == (
        "rows of another training were loaded: item of 2026-03-02, training 0, item of 2026-03-08, training 2; nothing "
        "was published"
    )


# The transaction, and waiting for it.


def test_what_is_submitted():
    what = dataclasses.replace(TWO, if_partition_taken="keep", job_name="nightly", latest_tables=True)
    tallies = {key: Tally(number, 32, 1.0, 1.0, 1.0, 0) for number, key in enumerate(TALLIES, 1)}
    with serve(DONE, DONE) as (service, client):
        publication.publish(client, what, "launch1", tallies, sleep=lambda _: None)
    assert [each["query"]["query"] for each in service.configurations] == [
        tables.publish_script(
            what.destination,
            number,
            training,
            "launch1",
            "keep",
            {tower: tallies[training.run.run_id, tower] for tower in ("user", "item")},
            "nightly",
            latest_tables=True,
        )
        for number, training in enumerate(what.trainings)
    ]


def test_the_lineage_is_of_the_tables(monkeypatch):
    class Sinks(list):
        def add(self, *segments):
            self.append(segments)

    sinks = Sinks()
    monkeypatch.setattr(publication.Lineage, "sinks", lambda: sinks)
    with serve(DONE) as (_, client):
        publish(client)
    assert sinks == [
        ("bigquery", "my-project", "raw_prod", "two_tower_user_embedding"),
        ("bigquery", "my-project", "raw_prod", "two_tower_item_embedding"),
    ]


def test_pauses_grow_to_five_seconds():
    with serve(DONE) as (service, client):
        service.looks = 6  # of them find the job running
        waits = []
        publication.publish(client, WHAT, "launch1", TALLIES, sleep=waits.append)
    assert waits == [0.5, 1.0, 2.0, 4.0, 5.0, 5.0]


def test_attempts_drift_apart_up_to_a_minute(monkeypatch):
    """The pause is a random part of a span that doubles."""
    monkeypatch.setattr(publication.random, "uniform", lambda least, most: (least, most) == (0.5, 1))
    waits = []
    with serve(*[ABORTED] * 10) as (service, client), pytest.raises(PublishError) as caught:
        publication.run_script(client, "prefix", "SELECT 1", "a comparison", waits.append)
    assert [seconds for seconds in waits if seconds >= 1] == [2, 4, 8, 16, 32, 60, 60, 60, 60, 60]
    assert service.submitted == [f"prefix_{attempt}" for attempt in range(10)]
    assert str(caught.value) == (
        f"a comparison was not published: 10 attempts failed, the last with: {ABORTED['message']}; start the job again "
        "when fewer publish at once"
    )


def test_what_is_said_of_failures(caplog):
    subject = "partition 2026-03-01"
    job = "publish_embeddings_launch1_0_0"
    with serve(DENIED) as (_, client), pytest.raises(PublishError) as caught:
        publish(client)
    assert str(caught.value) == f"BigQuery refused to publish (job {job}): {DENIED['message']}"
    with serve(*[BACKEND] * 10) as (_, client), pytest.raises(PublishError) as caught:
        publish(client)
    assert str(caught.value).startswith(f"{subject} was not published: 10 attempts failed, the last with: The job enc")
    with serve(TAKEN) as (_, client), pytest.raises(PartitionTakenError) as caught:
        publish(client)
    assert str(caught.value) == (
        f"{subject} was taken by another run while this job ran; run 0123abcd was not published: choose with "
        "--if_partition_taken=replace or keep"
    )
    with serve(ABORTED, DONE) as (_, client), caplog.at_level("INFO", "beam_pipeline.bigquery.publication"):
        publish(client)
    assert caplog.messages == [f"publication attempt 1 was cancelled, trying again: {ABORTED['message']}"]


def test_a_failure_without_words():
    with serve({"reason": "stopped"}) as (_, client), pytest.raises(PublishError, match=r"\(job .*_0\): $"):
        publish(client)


def test_a_request_that_is_refused():
    """Not the job: BigQuery takes none from this account."""
    denied = "Access Denied: Project my-project: User does not have bigquery.jobs.create permission"
    words = rf"^BigQuery refused to publish \(job publish_embeddings_launch1_0_0\): POST .*: {denied}"
    with serve() as (service, client):
        service.insert = lambda *_: (403, {"error": {"code": 403, "message": denied}})
        with pytest.raises(PublishError, match=words):
            publish(client)


def test_a_job_that_is_never_shown_is_asked_for_six_times():
    with serve(DONE) as (service, client):
        service.insert("publish_embeddings_launch1_0_0")
        service.hidden = 1000
        with pytest.raises(PublishError) as caught:
            publish(client)
    assert service.hidden == 1000 - 6
    assert str(caught.value) == (
        "BigQuery says that job publish_embeddings_launch1_0_0 exists, but does not show it; start the job again"
    )


@pytest.mark.parametrize(("attempts", "published"), [([ABORTED, DONE], True), ([ABORTED] * 10, False), ([], False)])
def test_whether_a_launch_has_published(attempts, published):
    with serve(*attempts) as (service, client):
        for attempt in range(len(attempts)):
            service.insert(f"publish_embeddings_launch1_0_{attempt}")
            service.job_ended(f"publish_embeddings_launch1_0_{attempt}")
        assert publication._published(client, "launch1") is published


def test_a_publication_that_still_runs_is_not_published():
    with serve(DONE) as (service, client):
        service.insert("publish_embeddings_launch1_0_0")
        assert not publication._published(client, "launch1")


# What a launch leaves, and who removes it.


@pytest.fixture
def left(tmp_path):
    """A publication into a local folder with files of this pipeline, of another one and an old one."""
    for name in ("embedding_loads/token/a", "embedding_loads/other/b", "embedding_artifacts/token/m/c"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    for name in ("embedding_artifacts/tokens/d", "embedding_artifacts/old/e", "kept/f"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    for name, hours in (("embedding_artifacts/old/e", 48.1), ("embedding_loads/other/b", 47.9)):
        then = time.time() - hours * 3600
        os.utime(tmp_path / name, (then, then))
    return dataclasses.replace(WHAT, temp_location=f"{tmp_path}/")


def files_of(what):
    root = Path(what.temp_location)
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


ALL = {
    "embedding_loads/token/a",
    "embedding_loads/other/b",
    "embedding_artifacts/token/m/c",
    "embedding_artifacts/tokens/d",
    "embedding_artifacts/old/e",
    "kept/f",
}


def test_folders():
    slashed = dataclasses.replace(WHAT, temp_location="gs://bucket/tmp/")
    for what in (WHAT, slashed):
        assert what.all_load_files == "gs://bucket/tmp/embedding_loads"
        assert what.load_files == "gs://bucket/tmp/embedding_loads/token"
        assert what.all_copies == "gs://bucket/tmp/embedding_artifacts"
        assert what.copy == "gs://bucket/tmp/embedding_artifacts/token"
        assert what.bucket == "bucket"
    assert publication.copies_folder("gs://bucket/XX//", "X") == "gs://bucket/XX/embedding_artifacts/X"


def test_cleaning_up_after_a_launch(left):
    """Its tables and files, those of failed bundles beside them, and files that are older than 48 hours."""
    with serve() as (service, client):
        service.tables = {f"two_tower_{tower}_embedding_staging_{n}" for tower in ("user", "item") for n in ("a", "b")}
        root = left.temp_location.rstrip("/")
        publication.clean(client, left, "a", [f"{root}/embedding_loads/token/t/x"])
    assert service.tables == {f"two_tower_{tower}_embedding_staging_b" for tower in ("user", "item")}
    assert files_of(left) == ALL - {
        "embedding_loads/token/a",
        "embedding_artifacts/token/m/c",
        "embedding_artifacts/old/e",
    }


def test_cleaning_up_where_nothing_is_left(left, caplog):
    before = metrics.in_this_process("not-deleted")
    with serve() as (_, client), caplog.at_level("WARNING"):
        publication.clean(client, left, "a", [])
    assert metrics.in_this_process("not-deleted") == before
    assert caplog.messages == []


STAGED = {
    "two_tower_user_embedding_staging_token_1",
    "two_tower_item_embedding_staging_token_1",
    "two_tower_item_embedding_staging_other_1",
    "beam_bq_job_LOAD_nightlyjob_1",
    "beam_bq_job_LOAD_historize_1",
    "two_tower_user_embedding",
}


def test_what_a_failed_launch_has_left_is_removed(left):
    with serve() as (service, client):
        service.tables = {*STAGED}
        publication.discard(client, left, "nightly-job")
        assert service.tables == STAGED - {
            "two_tower_user_embedding_staging_token_1",
            "two_tower_item_embedding_staging_token_1",
            "beam_bq_job_LOAD_nightlyjob_1",
        }
    assert files_of(left) == ALL - {"embedding_loads/token/a", "embedding_artifacts/token/m/c"}


def test_staging_tables_are_removed_where_they_are(left):
    destination = dataclasses.replace(left.destination, staging_dataset="scratch-project.scratch")
    with serve() as (service, client):
        service.dataset, service.tables = "scratch-project.scratch", {*STAGED}
        publication.discard(client, dataclasses.replace(left, destination=destination), "nightly-job")
        assert len(service.tables) == 3


def test_a_table_that_disappears_while_it_is_discarded(left):
    with serve() as (service, client):
        service.tables = {"two_tower_user_embedding_staging_token_1"}
        delete = service.delete
        service.delete = lambda path: service.tables.clear() or delete(path)
        publication.discard(client, left, "job")


def test_what_other_launches_have_left_is_removed(left):
    with serve() as (service, client):
        service.tables = {*STAGED}
        publication.discard_all(client, left)
        assert service.tables == {"beam_bq_job_LOAD_nightlyjob_1", "two_tower_user_embedding"}
    assert files_of(left) == {"embedding_artifacts/token/m/c", "kept/f"}


def test_a_copied_model_is_removed(left, bucket, caplog):
    publication.discard_copy(left.copy)
    assert files_of(left) == ALL - {"embedding_artifacts/token/m/c"}
    with caplog.at_level("WARNING", "beam_pipeline.bigquery.publication"):
        publication.discard_copy(WHAT.copy)
    assert caplog.text.count("copied model gs://bucket/tmp/embedding_artifacts/token: not all is deleted: gs://b") == 1


def test_the_client_works_where_the_dataset_is(monkeypatch):
    monkeypatch.setattr(publication, "credentials", AnonymousCredentials)
    client = publication.make_client(dataclasses.replace(WHAT.destination, billing_project="billing"))
    assert (client.project, client.location) == ("billing", "EU")
    assert client.default_query_job_config.labels == {"managed_by": "beam_pipeline"}
    assert isinstance(client._credentials, AnonymousCredentials)
