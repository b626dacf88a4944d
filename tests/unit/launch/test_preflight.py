"""The parts of the report that emulators cannot show: locations and permissions, against a small Google Cloud."""

import dataclasses
import json
import re
import threading
from contextlib import contextmanager
from datetime import date, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlparse

import google.auth
import pytest
from google.auth.credentials import AnonymousCredentials
from google.cloud import bigquery
from google.cloud.storage import Client as StorageClient
from towers import described

from beam_pipeline.bigquery import tables
from beam_pipeline.bigquery.publication import Publication
from beam_pipeline.bigquery.tables import Destination
from beam_pipeline.errors import ConfigError
from beam_pipeline.launch import bucket, permissions, preflight
from beam_pipeline.launch.bucket import location_fits
from beam_pipeline.launch.findings import Findings
from beam_pipeline.launch.options import parse
from beam_pipeline.training import Run, Training, by_name

TOWERS = tuple(described(name, rows=1_000_000, dimension=64, ids_bytes=10_000_000) for name in ("user", "item"))
RUN = Run("0123abcd", "spring", "7", "two_tower", date(2026, 3, 1), "gs://b/7/0123abcd/artifacts")
WHAT = Publication(
    Destination("my-project", "raw_prod", "EU", "two_tower"),
    (Training(RUN, "gs://b/model", by_name(TOWERS)),),
    "gs://temp/tmp",
    "fail",
    "token",
)


@pytest.mark.parametrize(
    ("bucket", "dataset", "fits"),
    [
        ("EU", "EU", True),
        ("europe-west1", "EU", True),
        ("EUROPE-WEST2", "EU", False),  # London and Zurich are not in the multi-region
        ("europe-west6", "EU", False),
        ("europe-west2", "europe-west2", True),
        ("EU", "europe-west6", False),
        ("us-central1", "EU", False),
        ("ASIA", "EU", False),
        ("US", "EU", False),
        ("EU", "US", True),
        ("asia-northeast1", "US", True),
        ("europe-west1", "europe-west1", True),
        ("EUROPE-WEST1", "europe-west1", True),
        ("europe-west4", "europe-west1", False),
        ("EU", "europe-west1", False),
        ("US", "europe-west1", False),
        ("US", "us-central1", False),
        ("US", "us-east4", False),
        ("ASIA", "asia-northeast1", False),
        ("EUR4", "EU", True),
        ("EUR5", "EU", None),  # Belgium and London
        ("EUR7", "EU", None),
        ("EUR8", "europe-west6", True),
        ("EUR4", "europe-west1", False),
        ("NAM4", "us-central1", True),
        ("NAM4", "us-west1", False),
        ("NAM4", "EU", False),
        ("ASIA1", "asia-northeast2", True),
        ("NEWDUAL1", "europe-west1", None),
    ],
)
def test_locations(bucket, dataset, fits):
    assert location_fits(bucket, dataset) is fits


@pytest.mark.parametrize(
    ("bucket", "regions", "dataset", "fits"),
    [
        ("US", ["US-CENTRAL1", "US-WEST1"], "us-central1", True),
        ("US", ["US-CENTRAL1", "US-WEST1"], "us-east4", False),
        ("US", ["US-CENTRAL1", "US-WEST1"], "US", True),
        ("EU", ["EUROPE-WEST1", "EUROPE-WEST4"], "europe-west4", True),
        ("EU", ["EUROPE-WEST1", "EUROPE-WEST4"], "EU", True),
        ("EU", ["EUROPE-WEST1", "EUROPE-WEST2"], "EU", None),
        ("EU", ["EUROPE-WEST1", "EUROPE-WEST4"], "US-EAST1", False),
    ],
)
def test_locations_of_a_dual_region_of_ones_own(bucket, regions, dataset, fits):
    """Its location is the continent's, and its regions are named beside that."""
    assert location_fits(bucket, dataset, regions) is fits


class Cloud:
    """A small Google Cloud.

    Attributes:
        granted: permissions of the account, by the kind of thing they are asked of.
        location: of the bucket; None for a bucket that is not there, "" for one that may not be looked at.
        bucket: what else the bucket says of itself.
        tables: names of tables that exist.
        partitions: of the user's table, as YYYYMMDD -> a vector in it.
        queries: every query that was run.
        billing: the project that grants to run jobs.
    """

    def __init__(self):
        self.granted = {
            "project": {"bigquery.jobs.create", "dataflow.jobs.create"},
            "bucket": {*permissions.BUCKET_PERMISSIONS},
            "table": {*permissions.TABLE_PERMISSIONS},
        }
        self.location = "EU"
        self.bucket = {}
        self.tables = {"two_tower_user_embedding", "two_tower_item_embedding"}
        self.may_query = True
        self.partitions = {}
        self.queries = []
        self.billing = "my-project"

    def answer(self, method, url, body):
        path = url.path
        if path.endswith(f"projects/{self.billing}:testIamPermissions"):
            return self._granted("project", json.loads(body)["permissions"])
        if path.endswith("/b/temp/iam/testPermissions"):
            return self._granted("bucket", parse_qs(url.query)["permissions"])
        if path.endswith("/b/temp"):
            if self.location is None:
                return 404, {"error": {"code": 404, "message": "The specified bucket does not exist."}}
            if not self.location:
                return 403, {"error": {"code": 403, "message": "storage.buckets.get denied"}}
            return 200, {"name": "temp", "location": self.location, **self.bucket}
        if path.endswith(":testIamPermissions"):
            if path.split("/")[-1].split(":")[0] not in self.tables:
                return 404, {"error": {"code": 404, "message": "Not found: Table"}}
            return self._granted("table", json.loads(body)["permissions"])
        if path.endswith("/queries"):
            self.queries.append(json.loads(body))
            latest = max(self.partitions, default=None)
            return 200, {
                "jobReference": {"projectId": "my-project", "jobId": "job", "location": "EU"},
                "jobComplete": True,
                "schema": {"fields": [{"name": "latest", "type": "STRING"}]},
                "rows": [{"f": [{"v": latest}]}],
                "totalRows": "1",
            }
        if match := re.search(
            r"/projects/my-project/datasets/raw_prod/tables/two_tower_user_embedding\$(\d+)/data$", path
        ):
            assert parse_qs(url.query)["selectedFields"] == ["user_embedding"]
            vector = self.partitions[match[1]]
            return 200, {"rows": [{"f": [{"v": [{"v": str(value)} for value in vector]}]}] if vector else []}
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
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()  # seconds until it ends
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def cloud(monkeypatch):
    """The small cloud, and the clients of the launch talking to it."""
    running = Cloud()
    with served(running) as url:
        for name in ("BIGQUERY_EMULATOR_HOST", "STORAGE_EMULATOR_HOST"):
            monkeypatch.delenv(name, raising=False)
        nobody = AnonymousCredentials()
        monkeypatch.setattr(google.auth, "default", lambda *_, **__: (nobody, "my-project"))
        monkeypatch.setattr(permissions, "_RESOURCE_MANAGER", url)
        monkeypatch.setattr(
            bucket.storage,
            "Client",
            lambda project, credentials: StorageClient(project, nobody, client_options={"api_endpoint": url}),
        )
        running.client = bigquery.Client("my-project", nobody, client_options={"api_endpoint": url})
        yield running


def asked_permissions(cloud, what=WHAT, *, distributed=False, dataflow=False):
    findings = Findings()
    permissions.examine(findings, cloud.client, what, distributed=distributed, dataflow=dataflow)
    return [(line.status, line.text) for line in findings.lines]


def test_all_permissions(cloud):
    whole = "this account: project my-project, bucket temp, table user, table item, a query (dry run)"
    assert asked_permissions(cloud) == [("ok", whole)]
    elsewhere = whole.replace("this account", "this account, not the workers'")
    assert asked_permissions(cloud, distributed=True) == [("ok", elsewhere)]


def test_each_project_is_asked_for_its_own(cloud):
    """Jobs are created in the one that is billed, and tables are in the dataset's."""
    cloud.billing = "example.com%3Abilling"  # The verb comes after the last colon.
    destination = dataclasses.replace(WHAT.destination, billing_project="example.com:billing")
    what = dataclasses.replace(WHAT, destination=destination)
    ((status, text),) = asked_permissions(cloud, what, dataflow=True)
    assert (status, text) == (
        "ok",
        "this account: project example.com:billing, bucket temp, table user, table item, a query (dry run)",
    )
    cloud.granted["project"].clear()
    cloud.granted["table"].discard("bigquery.tables.getData")
    ((status, text),) = asked_permissions(cloud, what, dataflow=True)
    assert text.startswith(
        "this account lacks bigquery.jobs.create on project example.com:billing, "
        "dataflow.jobs.create on project example.com:billing, "
        "bigquery.tables.getData on table user, "
    )


@pytest.mark.parametrize(
    ("billing", "lines"),
    [
        ("my-project", []),
        ("billing", [("ok", "jobs run and are billed in billing, the tables are in my-project")]),
        (
            None,
            [("note", "jobs run and are billed in my-project, the dataset's project; --project names another")],
        ),
    ],
)
def test_where_jobs_are_billed_is_reported(cloud, billing, lines):
    findings = Findings()
    preflight.examine_projects(findings, dataclasses.replace(WHAT.destination, billing_project=billing))
    assert [(line.status, line.text) for line in findings.lines] == lines


def test_tables_that_are_made_later_are_not_asked(cloud):
    cloud.tables = set()
    assert asked_permissions(cloud) == [("ok", "this account: project my-project, bucket temp, a query (dry run)")]


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
    ((status, text),) = asked_permissions(cloud)
    assert status == "stop"
    assert text.startswith(f"this account lacks {permission} on {where}")
    ((status, text),) = asked_permissions(cloud, distributed=True)
    assert status == "note"
    assert "not the workers', lacks" in text


def test_a_query_that_is_refused(cloud):
    cloud.may_query = False
    ((status, text),) = asked_permissions(cloud)
    assert status == "stop"
    assert "to run a query" in text


def lengths(cloud):
    findings = Findings()
    preflight._examine_length(findings, cloud.client, WHAT.destination, TOWERS[0])
    return [(line.status, line.text) for line in findings.lines]


def test_the_length_of_vectors_is_read_for_nothing(cloud):
    """Of the latest partition a row is listed; any query for it would be billed for the whole column."""
    cloud.partitions = {"20260222": [1.0] * 32, "20260301": [1.0] * 64}
    assert lengths(cloud) == [("ok", "64 values, as in the latest partition (2026-03-01)")]
    (query,) = cloud.queries
    assert query["query"] == tables.latest_partition_sql(WHAT.destination.table("user"))
    assert not query.get("queryParameters")  # INFORMATION_SCHEMA.PARTITIONS wants a literal
    cloud.partitions["20260308"] = [1.0] * 3
    ((status, text),) = lengths(cloud)
    assert status == "stop"
    assert "vectors of 64 values, but the latest partition of" in text
    assert "(2026-03-08) holds vectors of 3, and VECTOR_SEARCH needs one length" in text


def test_no_vectors_have_no_length(cloud):
    assert lengths(cloud) == []
    cloud.partitions = {"20260301": None}  # Its rows were deleted between the two looks.
    assert lengths(cloud) == []


def examined_bucket(cloud, what=WHAT):
    findings = Findings()
    bucket.examine(findings, what.bucket, what.destination, what.kms_key)
    return findings


@pytest.mark.parametrize(
    ("location", "status", "text"),
    [
        ("EU", "ok", "gs://temp in EU"),
        (
            "EUR5",
            "note",
            "gs://temp in EUR5, and the dataset in EU: only the load job tells whether that fits; to be sure,",
        ),
        ("", "note", "gs://temp could not be asked for its location: "),
        ("us-central1", "stop", "bucket gs://temp is in us-central1, from where a dataset in EU cannot load; name one"),
        (
            "europe-west2",
            "stop",
            "bucket gs://temp is in europe-west2, from where a dataset in EU cannot load; name one in EU with --temp_loc",
        ),
        (None, "stop", "bucket gs://temp of --temp_location does not exist; make it where the dataset is: gcloud"),
    ],
)
def test_the_bucket(cloud, location, status, text):
    cloud.location = location
    (line,) = examined_bucket(cloud).lines
    assert (line.status, line.text[: len(text)]) == (status, text)
    assert isinstance(line.error, ConfigError) == (status == "stop")


def test_a_bucket_in_a_multi_region_and_a_dataset_in_one_of_its_regions(cloud):
    what = dataclasses.replace(WHAT, destination=dataclasses.replace(WHAT.destination, location="us-central1"))
    cloud.location = "US"
    (line,) = examined_bucket(cloud, what).lines
    assert (line.status, line.text) == (
        "stop",
        "bucket gs://temp is in US, from where a dataset in us-central1 cannot load; name one in us-central1, or in a "
        "dual-region that includes it, with --temp_location",
    )
    cloud.bucket = {
        "locationType": "dual-region",
        "customPlacementConfig": {"dataLocations": ["US-CENTRAL1", "US-WEST1"]},
    }
    (line,) = examined_bucket(cloud, what).lines
    assert (line.status, line.text) == ("ok", "gs://temp in US (US-CENTRAL1, US-WEST1)")


@pytest.mark.parametrize(("seconds", "noted"), [("604800", "7 days"), ("0", None), ("129600", "1.5 days")])
def test_a_bucket_that_bills_deleted_files(cloud, seconds, noted):
    cloud.bucket = {"softDeletePolicy": {"retentionDurationSeconds": seconds, "effectiveTime": "2026-01-01T00:00:00Z"}}
    fine, *more = examined_bucket(cloud).lines
    assert fine.status == "ok"
    assert [(line.check, line.status, line.text) for line in more] == [
        (
            "soft delete",
            "note",
            f"gs://temp keeps deleted files for {noted}, load files too, and they are billed; gcloud storage buckets "
            "update gs://temp --clear-soft-delete ends that",
        )
    ] * bool(noted)


def test_a_bucket_without_a_key_of_its_own_is_told(cloud):
    keyed = dataclasses.replace(WHAT, kms_key="projects/p/locations/eu/keyRings/r/cryptoKeys/k")
    lines = examined_bucket(cloud, keyed).lines
    assert [line.status for line in lines] == ["ok", "note"]
    assert "load files are encrypted with Google's" in lines[1].text


def key(place):
    return f"projects/p/locations/{place}/keyRings/r/cryptoKeys/k"


def keys(location, kms_key, region=None, dataflow_kms_key=None):
    destination = dataclasses.replace(WHAT.destination, location=location)
    what = dataclasses.replace(WHAT, destination=destination, kms_key=kms_key and key(kms_key))
    findings = Findings()
    preflight._examine_keys(findings, what, region, (dataflow_kms_key or kms_key) and key(dataflow_kms_key or kms_key))
    return [(line.status, line.text) for line in findings.lines]


@pytest.mark.parametrize(
    ("location", "kms_key", "region", "dataflow_kms_key"),
    [
        ("EU", None, "europe-west1", None),
        ("EU", "europe", None, None),
        ("US", "us", None, None),
        ("europe-west1", "europe-west1", "europe-west1", None),
        ("EU", "europe", "europe-west1", "europe-west1"),
        ("EU", None, "europe-west1", "europe-west1"),
    ],
)
def test_keys_that_are_where_they_are_needed(location, kms_key, region, dataflow_kms_key):
    assert keys(location, kms_key, region, dataflow_kms_key) == []


def test_one_key_cannot_serve_a_multi_region_and_a_region():
    ((status, text),) = keys("EU", "europe", "europe-west1")
    assert status == "stop"
    assert text == (
        "--kms_key is in europe, and Dataflow in europe-west1 takes keys of that region alone: name one with "
        "--dataflow_kms_key, and leave --kms_key to BigQuery"
    )
    ((status, text),) = keys("EU", "europe", "europe-west1", "europe-west4")
    assert status == "stop"
    assert text.startswith(
        "--dataflow_kms_key is in europe-west4, and Dataflow in europe-west1 takes keys of that region"
    )


def test_a_key_that_is_not_where_the_dataset_is():
    assert keys("EU", "europe-west1", "europe-west1") == [
        ("note", "--kms_key is in europe-west1, and BigQuery wants one in europe for a dataset in EU")
    ]


def test_the_estimate():
    findings = Findings()
    preflight._estimate(findings, WHAT)
    size, cost = (line.text for line in findings.lines)
    # Of a row: DATE 8, four strings of 1, 9, 8 and 6 letters and 2 bytes each, an id's 2, 64 doubles; ids beside it.
    bytes_ = 2 * (1_000_000 * (8 + 24 + 4 * 2 + 2 + 512) + 10_000_000)
    assert size == f"at most 2,000,000 rows, 512 MB of vectors to read, {bytes_ / 1e9:.1f} GB in BigQuery"
    # Instead of the strings, the number of the training is staged.
    staged = 2 * (1_000_000 * (8 + 8 + 2 + 512) + 10_000_000)
    assert cost.startswith(f"publishing reads {staged / 1e9:.1f} GB: about $0.01 at $6.25/TiB")


@pytest.mark.parametrize(("count", "stopped"), [(4000, False), (4001, True)])
def test_more_dates_than_a_load_job_writes(cloud, count, stopped):
    """BigQuery's limit: https://cloud.google.com/bigquery/quotas#partitioned_tables."""
    days = [date(2015, 1, 1) + timedelta(days=number) for number in range(count)]
    trainings = tuple(
        Training(dataclasses.replace(RUN, run_id=f"r{day}", train_date=day), "gs://b/model", by_name(TOWERS))
        for day in days
    )
    found = preflight.examine(cloud.client, dataclasses.replace(WHAT, trainings=trainings), parse(["--run_id=r"]))
    stops = [line.text for line in found.lines if line.check == "dates"]
    assert stops == ["4,001 dates, and one load job writes 4,000; narrow --since and --until"] * stopped
