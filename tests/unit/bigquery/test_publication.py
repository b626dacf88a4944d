"""Publishing against the answers of a real BigQuery; what emulators can run is in tests/end_to_end."""

import dataclasses
import json
import re
from datetime import UTC, date, datetime, timedelta
from http.server import BaseHTTPRequestHandler
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
from google.auth.credentials import AnonymousCredentials
from google.cloud import bigquery
from towers import described
from tracking import serving

from beam_pipeline import metrics
from beam_pipeline.bigquery import publication
from beam_pipeline.bigquery.publication import Publication, partition_life
from beam_pipeline.bigquery.tables import Destination
from beam_pipeline.comparison import publishing
from beam_pipeline.comparison import tables as comparison_tables
from beam_pipeline.comparison.tables import Pair, Trained
from beam_pipeline.comparison.work import Comparison
from beam_pipeline.errors import PartitionTakenError, PublishError
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
