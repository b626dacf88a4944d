"""The parts of the report that emulators cannot show: locations and permissions, against a small Google Cloud."""

import json
import threading
from contextlib import contextmanager
from datetime import date
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlparse

import google.auth
import pytest
from google.auth.credentials import AnonymousCredentials
from google.cloud import bigquery
from google.cloud.storage import Client as StorageClient
from towers import described

from beam_pipeline import preflight
from beam_pipeline.errors import ConfigError
from beam_pipeline.preflight import Findings, location_fits
from beam_pipeline.publication import Publication
from beam_pipeline.runs import Run, Training
from beam_pipeline.tables import Destination

TOWERS = tuple(described(name, rows=1_000_000, dimension=64, ids_bytes=10_000_000) for name in ("user", "item"))
RUN = Run("0123abcd", "spring", "7", "two_tower", date(2026, 3, 1), "gs://b/7/0123abcd/artifacts")
WHAT = Publication(
    Destination("my-project", "raw_prod", "EU", "two_tower"),
    (Training(RUN, "gs://b/model", TOWERS),),
    "gs://temp/tmp",
    "fail",
    "token",
)


@pytest.mark.parametrize(
    ("bucket", "dataset", "fits"),
    [
        ("EU", "EU", True),
        ("europe-west1", "EU", True),
        ("EUR4", "EU", True),
        ("us-central1", "EU", False),
        ("ASIA", "EU", None),
        ("asia-northeast1", "US", True),
        ("europe-west1", "europe-west1", True),
        ("EUROPE-WEST1", "europe-west1", True),
        ("europe-west4", "europe-west1", False),
        ("EU", "europe-west1", None),
        ("US", "europe-west1", False),
        ("ASIA", "asia-northeast1", None),
        ("MYDUAL", "europe-west1", None),
    ],
)
def test_locations(bucket, dataset, fits):
    assert location_fits(bucket, dataset) is fits


class Cloud:
    """A small Google Cloud.

    Attributes:
        granted: permissions of the account, by the kind of thing they are asked of.
        location: of the bucket; None for a bucket that is not there, "" for one that may not be looked at.
        tables: names of tables that exist.
    """

    def __init__(self):
        self.granted = {
            "project": {"bigquery.jobs.create", "dataflow.jobs.create"},
            "bucket": {*preflight._BUCKET_PERMISSIONS},
            "table": {*preflight._TABLE_PERMISSIONS},
        }
        self.location = "EU"
        self.tables = {"two_tower_user_embedding", "two_tower_item_embedding"}
        self.may_query = True

    def answer(self, method, url, body):
        path = url.path
        if path.endswith("projects/my-project:testIamPermissions"):
            return self._granted("project", json.loads(body)["permissions"])
        if path.endswith("/b/temp/iam/testPermissions"):
            return self._granted("bucket", parse_qs(url.query)["permissions"])
        if path.endswith("/b/temp"):
            if self.location is None:
                return 404, {"error": {"code": 404, "message": "The specified bucket does not exist."}}
            if not self.location:
                return 403, {"error": {"code": 403, "message": "storage.buckets.get denied"}}
            return 200, {"name": "temp", "location": self.location}
        if path.endswith(":testIamPermissions"):
            if path.split("/")[-1].split(":")[0] not in self.tables:
                return 404, {"error": {"code": 404, "message": "Not found: Table"}}
            return self._granted("table", json.loads(body)["permissions"])
        if path.endswith("/jobs"):
            if not self.may_query:
                return 403, {"error": {"code": 403, "message": "Access Denied: bigquery.jobs.create"}}
            configuration = json.loads(body)["configuration"]
            assert configuration["dryRun"]
            return 200, {"configuration": configuration, "status": {"state": "DONE"}, "jobReference": {}}
        return 404, {"error": {"code": 404, "message": path}}

    def _granted(self, kind, asked):
        return 200, {"permissions": [permission for permission in asked if permission in self.granted[kind]]}


@contextmanager
def served(cloud):
    class Handler(BaseHTTPRequestHandler):
        def _serve(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, answer = cloud.answer(self.command, urlparse(self.path), body)
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = _serve

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def cloud(monkeypatch):
    """The small cloud, and the clients of preflight.py talking to it."""
    running = Cloud()
    with served(running) as url:
        for name in ("BIGQUERY_EMULATOR_HOST", "STORAGE_EMULATOR_HOST"):
            monkeypatch.delenv(name, raising=False)
        nobody = AnonymousCredentials()
        monkeypatch.setattr(google.auth, "default", lambda *_, **__: (nobody, "my-project"))
        monkeypatch.setattr(preflight, "_RESOURCE_MANAGER", url)
        monkeypatch.setattr(
            preflight.storage,
            "Client",
            lambda project: StorageClient(project, nobody, client_options={"api_endpoint": url}),
        )
        running.client = bigquery.Client("my-project", nobody, client_options={"api_endpoint": url})
        yield running


def permissions(cloud, *, distributed=False):
    findings = Findings()
    preflight._examine_permissions(findings, cloud.client, WHAT, distributed)
    return [(line.status, line.text) for line in findings.lines]


def test_all_permissions(cloud):
    whole = "this account: project my-project, bucket temp, table user, table item, a query (dry run)"
    assert permissions(cloud) == [("ok", whole)]
    elsewhere = whole.replace("this account", "this account, not the workers'")
    assert permissions(cloud, distributed=True) == [("ok", elsewhere)]


def test_tables_that_are_made_later_are_not_asked(cloud):
    cloud.tables = set()
    assert permissions(cloud) == [("ok", "this account: project my-project, bucket temp, a query (dry run)")]


@pytest.mark.parametrize(
    ("kind", "permission", "where"),
    [
        ("project", "bigquery.jobs.create", "project my-project"),
        ("bucket", "storage.objects.delete", "bucket temp"),
        ("table", "bigquery.tables.updateData", "table user"),
    ],
)
def test_a_missing_permission_stops_only_what_runs_here(cloud, kind, permission, where):
    cloud.granted[kind].discard(permission)
    ((status, text),) = permissions(cloud)
    assert status == "stop"
    assert text.startswith(f"this account lacks {permission} on {where}")
    ((status, text),) = permissions(cloud, distributed=True)
    assert status == "note"
    assert "not the workers', lacks" in text


def test_a_query_that_is_refused(cloud):
    cloud.may_query = False
    ((status, text),) = permissions(cloud)
    assert status == "stop"
    assert "to run a query" in text


def bucket(cloud, what=WHAT):
    findings = Findings()
    preflight.examine_bucket(findings, what.bucket, what.destination, what.kms_key)
    return findings


@pytest.mark.parametrize(
    ("location", "status", "text"),
    [
        ("EU", "ok", "gs://temp in EU"),
        ("ASIA", "ok", "gs://temp in ASIA (whether that fits only the load job tells)"),
        ("", "note", "gs://temp could not be asked for its location: "),
        ("us-central1", "stop", "bucket gs://temp is in us-central1, from where a dataset in EU cannot load; name one"),
        (None, "stop", "bucket gs://temp of --temp_location does not exist; make it where the dataset is: gcloud"),
    ],
)
def test_the_bucket(cloud, location, status, text):
    cloud.location = location
    (line,) = bucket(cloud).lines
    assert (line.status, line.text[: len(text)]) == (status, text)
    assert isinstance(line.error, ConfigError) == (status == "stop")


def test_a_bucket_without_a_key_of_its_own_is_told(cloud):
    import dataclasses

    keyed = dataclasses.replace(WHAT, kms_key="projects/p/locations/eu/keyRings/r/cryptoKeys/k")
    lines = bucket(cloud, keyed).lines
    assert [line.status for line in lines] == ["ok", "note"]
    assert "load files are encrypted with Google's" in lines[1].text


def test_the_estimate():
    findings = Findings()
    preflight._estimate(findings, WHAT)
    size, cost = (line.text for line in findings.lines)
    # Of a row: DATE 8, four strings of 1, 9, 8 and 6 letters and 2 bytes each, an id's 2, 64 doubles; ids beside it.
    bytes_ = 2 * (1_000_000 * (8 + 24 + 4 * 2 + 2 + 512) + 10_000_000)
    assert size == f"at most 2,000,000 rows, 512 MB of vectors to read, {bytes_ / 1e9:.1f} GB in BigQuery"
    assert cost.startswith(f"publishing reads {bytes_ / 1e9:.1f} GB: about $0.01 at $6.25/TiB")
