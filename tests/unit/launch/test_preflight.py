"""The parts of the report that emulators cannot show: locations and permissions, against a small Google Cloud."""

import dataclasses
import json
import re
import threading
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlparse

import google.auth
import pytest
from google.auth.credentials import AnonymousCredentials
from google.cloud import bigquery
from google.cloud.storage import Client as StorageClient
from towers import computed, described

from beam_pipeline.bigquery import tables
from beam_pipeline.bigquery.publication import Publication
from beam_pipeline.bigquery.tables import Destination
from beam_pipeline.errors import ConfigError, DimensionChangedError, IncompatibleTableError, PartitionTakenError
from beam_pipeline.formats.model import Ending, Tail
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
        held: rows of partitions, as (date, run id, rows), by table.
        resources: name → table, of those that can be looked at.
        forbidden: names of tables that may not be looked at.
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
        self.held = {}
        self.resources = {}
        self.forbidden = set()
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
            sql = self.queries[-1]["query"]
            if "MAX(partition_id)" in sql:
                return 200, self._result([("STRING", max(self.partitions, default=None))])
            if "INFORMATION_SCHEMA" in sql:
                return 200, self._result()
            table = sql.split("`")[1]
            if table not in self.held:
                return 404, {"error": {"code": 404, "message": f"Not found: Table {table}"}}
            rows = self.held[table]
            return 200, self._result(
                *([("DATE", day), ("STRING", run), ("INTEGER", count)] for day, run, count in rows)
            )
        if match := re.search(r"/projects/my-project/datasets/raw_prod/tables/(\w+)$", path):
            if match[1] in self.forbidden:
                return 403, {"error": {"code": 403, "message": f"Access Denied: Table {match[1]}\nAsk for access."}}
            if match[1] in self.resources:
                return 200, self.resources[match[1]]
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

    def _result(self, *rows):
        return {
            "jobReference": {"projectId": "my-project", "jobId": "job", "location": "EU"},
            "jobComplete": True,
            "schema": {
                "fields": [{"name": f"f{at}_", "type": kind} for at, (kind, _) in enumerate(rows[0] if rows else ())]
            },
            "rows": [{"f": [{"v": None if value is None else str(value)} for _, value in row]} for row in rows],
            "totalRows": str(len(rows)),
        }

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
            "gs://temp in EUR5, and the dataset in EU: only the load job will show whether that fits; to be sure,",
        ),
        ("", "note", "the location of gs://temp is unknown: "),
        ("us-central1", "stop", "bucket gs://temp is in us-central1, from where a dataset in EU cannot load; name one"),
        (
            "europe-west2",
            "stop",
            "bucket gs://temp is in europe-west2, from where a dataset in EU cannot load; name one in EU with --temp_loc",
        ),
        (None, "stop", "bucket gs://temp of --temp_location does not exist; create it where the dataset is: gcloud"),
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


KEY = "projects/p/locations/europe/keyRings/r/cryptoKeys/k"


@pytest.mark.parametrize(
    ("asked", "settings", "ignored"),
    [
        ({}, {}, ""),
        ({"partition_expiration_days": 30}, {}, "--partition_expiration_days=30"),
        ({"partition_expiration_days": 30}, {"expiration_ms": 30 * 24 * 3600 * 1000}, ""),
        ({"require_partition_filter": True}, {}, "--require_partition_filter"),
        ({"require_partition_filter": True}, {"require_partition_filter": True}, ""),
        ({"kms_key": KEY}, {}, "--kms_key"),
        ({"kms_key": KEY}, {"kms_key": f"{KEY}2"}, "--kms_key"),
        ({"kms_key": KEY}, {"kms_key": KEY}, ""),
        (
            {"partition_expiration_days": 30, "require_partition_filter": True, "kms_key": KEY},
            {},
            "--partition_expiration_days=30, --require_partition_filter, --kms_key",
        ),
    ],
)
def test_settings_that_an_existing_table_does_not_have_are_noted(asked, settings, ignored):
    table = bigquery.Table("p.d.t")
    table.time_partitioning = bigquery.TimePartitioning(expiration_ms=settings.get("expiration_ms"))
    table.require_partition_filter = settings.get("require_partition_filter")
    if "kms_key" in settings:
        table.encryption_configuration = bigquery.EncryptionConfiguration(settings["kms_key"])
    findings = Findings()
    preflight._examine_settings(findings, "table user", table, dataclasses.replace(WHAT, **asked))
    found = [(line.status, line.text.partition(" would apply")[0]) for line in findings.lines]
    assert found == ([("note", ignored)] if ignored else [])


# The whole report.


class Now(datetime):
    """A clock that stands still, so that ages do not depend on when the test runs."""

    @classmethod
    def now(cls, tz):
        assert tz is UTC
        return cls(2026, 3, 10, 23, 59, tzinfo=UTC)


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(preflight, "datetime", Now)


def report(cloud, what=WHAT, *flags, **places):
    """Returns (check, status, text) of every line."""
    found = preflight.examine(cloud.client, what, parse(["--run_id=r", *flags]), **places)
    return [(line.check, line.status, line.text) for line in found.lines]


def lines_of(found, *checks):
    return [line for line in found if line[0] in checks]


def history(name, tower="user", *, partitioned=True, columns=None, **partitioning):
    """Returns a table as BigQuery describes it."""
    table = bigquery.Table(f"my-project.raw_prod.{name}", schema=columns or tables.schema_fields(tower))
    if partitioned:
        table.time_partitioning = bigquery.TimePartitioning(type_="DAY", field="train_date", **partitioning)
    return table.to_api_repr()


USER, ITEM = (WHAT.destination.table(tower) for tower in ("user", "item"))


PERMITTED = "project my-project, bucket temp, table user, table item, a query (dry run)"
UNKNOWN = "it is unknown whether {}_layer continues after its embedding: no call"


def test_the_report_of_a_first_publication(cloud, clock):
    assert report(cloud) == [
        ("vectors user", "note", UNKNOWN.format("user")),
        ("vectors item", "note", UNKNOWN.format("item")),
        ("towers", "note", "user and item have the same ids: they cannot be searched against each other"),
        ("dataset", "ok", "my-project.raw_prod in EU"),
        ("project", "note", "jobs run and are billed in my-project, the dataset's project; --project names another"),
        ("table user", "ok", f"{USER} will be created, partitions kept forever"),
        ("table item", "ok", f"{ITEM} will be created, partitions kept forever"),
        ("bucket", "ok", "gs://temp in EU"),
        ("permissions", "ok", f"this account: {PERMITTED}"),
        ("size", "ok", "at most 2,000,000 rows, 512 MB of vectors to read, 1.1 GB in BigQuery"),
        ("cost", "ok", "publishing reads 1.1 GB: about $0.01 at $6.25/TiB; loading is free"),
    ]


def test_the_report_asks_every_part_about_this_job(cloud, clock):
    """Staging elsewhere, keys, an index, Dataflow, towers that go on after their embedding."""
    towers = tuple(dataclasses.replace(tower, tail=Tail(Ending.GOES_ON, (("dense", "MatMul"),))) for tower in TOWERS)
    what = dataclasses.replace(
        WHAT,
        destination=dataclasses.replace(WHAT.destination, staging_dataset="my-project.scratch"),
        trainings=(dataclasses.replace(WHAT.trainings[0], towers=by_name(towers)),),
        kms_key=key("europe-west1"),
        vector_index="COSINE",
    )
    cloud.granted["project"].discard("dataflow.jobs.create")
    flags = ["--runner=DataflowRunner", "--embedding_rows"]
    found = report(cloud, what, *flags, region="europe-west1", dataflow_kms_key=key("europe-west4"))
    assert ("dataset", "ok", "my-project.raw_prod in EU, staging in my-project.scratch") in found
    assert [status for _, status, _ in lines_of(found, "vectors user", "vectors item")] == ["note"] * 2
    assert [text[:22] for _, _, text in lines_of(found, "index user", "index item")][:1] == ["COSINE, will be create"]
    assert lines_of(found, "bucket") == [
        ("bucket", "ok", "gs://temp in EU"),
        *(line for line in found if line[0] == "bucket" and line[1] == "note"),
    ]
    assert any("load files are encrypted with Google's" in text for _, _, text in found)
    assert [(status, text[:46]) for _, status, text in lines_of(found, "key")] == [
        ("note", "--kms_key is in europe-west1, and BigQuery wan"),
        ("stop", "--dataflow_kms_key is in europe-west4, and Dat"),
    ]
    ((_, status, text),) = lines_of(found, "permissions")
    assert status == "note"
    assert text.startswith("this account, not the workers', lacks dataflow.jobs.create on project my-project")


def test_a_portable_runner_needs_no_permission_of_dataflow(cloud, clock):
    cloud.granted["project"].discard("dataflow.jobs.create")
    found = report(cloud, WHAT, "--runner=PrismRunner")
    assert lines_of(found, "permissions") == [("permissions", "ok", f"this account, not the workers': {PERMITTED}")]


@pytest.mark.parametrize("discovered", [False, True])
def test_towers_that_were_found_and_not_named(cloud, clock, discovered):
    towers = (TOWERS[0], dataclasses.replace(described("item", rows=5, dimension=32), layer="genre"))
    named = ["--tower=user=user_layer", "--tower=item=genre"]
    what = dataclasses.replace(WHAT, trainings=(dataclasses.replace(WHAT.trainings[0], towers=by_name(towers)),))
    ((_, status, text),) = lines_of(report(cloud, what, *([] if discovered else named)), "towers")
    assert text.startswith("user and item have vectors of 64 and of 32 values")
    assert status == ("stop" if discovered else "note")


@pytest.mark.parametrize(
    ("state", "text"),
    [
        ("RUNNING", "0123abcd is RUNNING: start the job again if it logs its model again before it ends"),
        ("SCHEDULED", "0123abcd is SCHEDULED: start the job again if it logs its model again before it ends"),
        ("FAILED", "0123abcd is FAILED: make sure that its model is the one to publish"),
    ],
)
def test_a_run_that_has_not_finished(cloud, clock, state, text):
    run = dataclasses.replace(RUN, status=state)
    trainings = (dataclasses.replace(WHAT.trainings[0], run=run), WHAT.trainings[0])
    found = report(cloud, dataclasses.replace(WHAT, trainings=trainings))
    assert lines_of(found, "run") == [("run", "note", text)]


def two(**changes):
    """Two trainings, a week apart; the user's vectors of the second are changed."""
    later = dataclasses.replace(RUN, run_id="later", train_date=date(2026, 3, 8))
    user = dataclasses.replace(TOWERS[0], matrix=dataclasses.replace(TOWERS[0].matrix, **changes))
    second = dataclasses.replace(WHAT.trainings[0], run=later, towers=by_name((user, TOWERS[1])))
    return dataclasses.replace(WHAT, trainings=(*WHAT.trainings, second))


def test_trainings_whose_vectors_differ_in_length(cloud, clock):
    found = preflight.examine(cloud.client, two(dimension=32), parse(["--run_id=r"]))
    (stop,) = [line for line in found.lines if line.status == "stop"]
    assert (stop.check, type(stop.error)) == ("table user", DimensionChangedError)
    assert stop.text == (
        "tower 'user': vectors of different lengths: 32 (run later), 64 (run 0123abcd), and VECTOR_SEARCH needs one "
        "length; --allow_dimension_change publishes all the same"
    )
    allowed = report(cloud, two(dimension=32), "--allow_dimension_change")
    assert [status for _, status, _ in lines_of(allowed, "table user")] == ["ok"]


@pytest.mark.parametrize(
    ("days", "stops"), [(None, False), (10, False), (9, True), (1, True)], ids=lambda value: str(value)
)
def test_partitions_that_would_be_deleted_at_once(cloud, clock, days, stops):
    """The run is of March 1, and it is March 10."""
    what = dataclasses.replace(WHAT, partition_expiration_days=days)
    kept = f"partitions kept for {days} days" if days else "partitions kept forever"
    first, *more = lines_of(report(cloud, what), "table user")
    assert first == ("table user", "ok", f"{USER} will be created, {kept}")
    words = (
        f"table two_tower_user_embedding keeps partitions for {days} days, and 2026-03-01 was 9 days ago: BigQuery "
        "would delete its rows at once; lengthen that expiration"
    )
    assert more == [("table user", "stop", words)] * stops


def test_several_partitions_that_would_be_deleted_at_once(cloud, clock):
    what = dataclasses.replace(two(), partition_expiration_days=2)
    *_, (_, status, text) = lines_of(report(cloud, what), "table user")
    assert status == "stop"
    assert text == (
        "table two_tower_user_embedding keeps partitions for 2 days, and 2026-03-01 was 9 days ago and 1 more date: "
        "BigQuery would delete its rows at once; lengthen that expiration, or leave the date out with --since"
    )
    run = dataclasses.replace(RUN, run_id="third", train_date=date(2026, 3, 7))
    three = dataclasses.replace(what, trainings=(*what.trainings, dataclasses.replace(WHAT.trainings[0], run=run)))
    *_, (_, _, text) = lines_of(report(cloud, three), "table user")
    assert "2026-03-01 was 9 days ago and 2 more dates: BigQuery" in text


def test_a_table_that_exists(cloud, clock):
    week = 7 * 24 * 60 * 60 * 1000
    columns = [c for c in tables.schema_fields("user") if c.name not in ("mlflow_experiment_id", "mlflow_run_name")]
    cloud.resources = {
        "two_tower_user_embedding": history("two_tower_user_embedding", columns=columns, expiration_ms=week),
        "two_tower_item_embedding": history("two_tower_item_embedding", "item"),
    }
    cloud.partitions = {"20260301": [1.0] * 64}
    user, old, free = lines_of(report(cloud), "table user")
    assert user == (
        "table user",
        "ok",
        f"{USER} exists, partitions kept for 7 days; columns mlflow_experiment_id, mlflow_run_name will be added",
    )
    assert (old[1], old[2][:60]) == ("stop", "table two_tower_user_embedding keeps partitions for 7 days, ")
    assert free == ("table user", "ok", "partition 2026-03-01 is free")
    item, free, *_ = lines_of(report(cloud), "table item")
    assert item == ("table item", "ok", f"{ITEM} exists, partitions kept forever")
    assert lines_of(report(cloud), "vectors user")[1:] == [
        ("vectors user", "ok", "64 values, as in the latest partition (2026-03-01)")
    ]


def test_a_table_that_cannot_be_used_or_looked_at(cloud, clock):
    cloud.resources["two_tower_user_embedding"] = history("two_tower_user_embedding", partitioned=False)
    cloud.forbidden.add("two_tower_item_embedding")
    found = preflight.examine(cloud.client, WHAT, parse(["--run_id=r"]))
    user, item = [line for line in found.lines if line.check.startswith("table")]
    assert (user.status, type(user.error)) == ("stop", IncompatibleTableError)
    assert "two_tower_user_embedding cannot be used: it is not partitioned" in user.text
    assert (item.status, type(item.error)) == ("stop", ConfigError)
    start = f"BigQuery cannot look up {ITEM}: 403 GET "
    assert item.text.startswith(start)
    assert item.text.endswith("Access Denied: Table two_tower_item_embedding")  # one line


def test_the_length_of_the_last_training_is_compared(cloud, clock):
    cloud.resources["two_tower_user_embedding"] = history("two_tower_user_embedding")
    cloud.partitions = {"20260301": [1.0] * 32}
    found = preflight.examine(cloud.client, two(dimension=32), parse(["--run_id=r"]))
    assert [(line.status, line.text) for line in found.lines if line.check == "vectors user"][1:] == [
        ("ok", "32 values, as in the latest partition (2026-03-01)")
    ]
    found = preflight.examine(cloud.client, WHAT, parse(["--run_id=r"]))
    (stop,) = [line for line in found.lines if line.check == "vectors user" and line.status == "stop"]
    assert isinstance(stop.error, DimensionChangedError)
    assert stop.text == (
        f"tower 'user': vectors of 64 values, but the latest partition of {USER} (2026-03-01) holds vectors of 32, and "
        "VECTOR_SEARCH needs one length; --allow_dimension_change publishes all the same"
    )
    assert len(lines_of(report(cloud, WHAT, "--allow_dimension_change"), "vectors user")) == 1


FEW = [(date(2026, 3, 1), "other", 1000), (date(2026, 3, 1), "more", 2000), (date(2026, 3, 8), "other", 3)]
PARTITIONS = ("table user", "partition 2026-03-01 user", "partition 2026-03-08 user")


def partitions_of(cloud, what, held):
    cloud.held = {USER: held}
    cloud.resources["two_tower_user_embedding"] = history("two_tower_user_embedding")
    found = preflight.examine(cloud.client, what, parse(["--run_id=r"]))
    return [line for line in found.lines if line.check in PARTITIONS][1:]


def test_partitions_are_asked_for_by_their_dates(cloud, clock):
    partitions_of(cloud, two(), [])
    (asked,) = [query for query in cloud.queries if "BETWEEN" in query["query"]]
    assert asked["query"] == tables.partitions_sql(USER)
    assert [
        (p["name"], p["parameterType"]["type"], p["parameterValue"]["value"]) for p in asked["queryParameters"]
    ] == [
        ("first", "DATE", "2026-03-01"),
        ("last", "DATE", "2026-03-08"),
    ]


def test_partitions_of_a_table_that_is_not_there(cloud):
    assert preflight.partitions(cloud.client, USER, date(2026, 3, 1), date(2026, 3, 8)) == {}
    cloud.held = {USER: FEW}
    assert preflight.partitions(cloud.client, USER, date(2026, 3, 1), date(2026, 3, 8)) == {
        date(2026, 3, 1): {"other": 1000, "more": 2000},
        date(2026, 3, 8): {"other": 3},
    }


def test_a_partition_of_another_run_stops_the_job(cloud, clock):
    (stop,) = partitions_of(cloud, WHAT, FEW)
    assert (stop.check, stop.status, type(stop.error)) == ("partition 2026-03-01 user", "stop", PartitionTakenError)
    assert stop.text == (
        f"partition 2026-03-01 of {USER} holds 2,000 rows of run more; --if_partition_taken=replace puts this run in its "
        "place, keep leaves both"
    )


@pytest.mark.parametrize(("how", "words"), [("replace", "are replaced"), ("keep", "stay beside this run's")])
def test_a_partition_of_another_run_that_does_not_stop_the_job(cloud, clock, how, words):
    found = partitions_of(cloud, dataclasses.replace(two(), if_partition_taken=how), FEW[1:])
    assert [(line.check, line.status, line.text) for line in found] == [
        ("partition 2026-03-01 user", "note", f"2,000 rows of run more {words} (--if_partition_taken={how})"),
        ("partition 2026-03-08 user", "note", f"3 rows of run other {words} (--if_partition_taken={how})"),
    ]


def test_a_partition_of_this_run(cloud, clock):
    found = partitions_of(cloud, two(), [(date(2026, 3, 1), "0123abcd", 1000)])
    assert [(line.check, line.status, line.text) for line in found] == [
        ("partition 2026-03-01 user", "note", "holds 1,000 rows of this run already, which are published again"),
        ("table user", "ok", "1 of 2 partitions are free"),
    ]
    both = partitions_of(cloud, two(), [(date(2026, 3, 1), "0123abcd", 1000), (date(2026, 3, 1), "other", 5)])
    assert [(line.check, line.status) for line in both] == [
        ("partition 2026-03-01 user", "stop"),
        ("partition 2026-03-01 user", "note"),
        ("table user", "ok"),
    ]


def test_partitions_that_are_free(cloud, clock):
    assert [line.text for line in partitions_of(cloud, WHAT, [])] == ["partition 2026-03-01 is free"]
    assert [line.text for line in partitions_of(cloud, two(), [])] == ["2 of 2 partitions are free"]


LATEST = {tower: WHAT.destination.latest(tower) for tower in ("user", "item")}


def latest_of(cloud, what):
    return lines_of(report(cloud, what), "latest user", "latest item")


def test_the_latest_tables(cloud, clock):
    what = dataclasses.replace(WHAT, latest_tables=True)
    assert latest_of(cloud, WHAT) == []
    assert latest_of(cloud, what) == [
        (f"latest {tower}", "ok", f"{LATEST[tower]} will be created") for tower in ("user", "item")
    ]
    cloud.resources["two_tower_user_embedding_latest"] = history("two_tower_user_embedding_latest", partitioned=False)
    cloud.forbidden.add("two_tower_item_embedding_latest")
    user, item = latest_of(cloud, what)
    assert user == (
        "latest user",
        "ok",
        f"{LATEST['user']} exists, and will hold this training if no newer one is published",
    )
    assert item[:2] == ("latest item", "stop")
    assert item[2].startswith(f"BigQuery cannot look up {LATEST['item']}: 403 GET ")
    cloud.resources["two_tower_user_embedding_latest"] = history("two_tower_user_embedding_latest")
    found = preflight.examine(cloud.client, what, parse(["--run_id=r"]))
    user, item = [line for line in found.lines if line.check.startswith("latest")]
    assert (user.status, type(user.error), type(item.error)) == ("stop", IncompatibleTableError, ConfigError)
    assert "cannot be used: it is partitioned, and holds one training alone" in user.text


# What it costs.


def estimate(what):
    findings = Findings()
    preflight._estimate(findings, what)
    return [(line.check, line.status, line.text) for line in findings.lines]


def test_the_estimate_of_several_trainings():
    """A row of the history: DATE 8, four strings of 2 bytes each and 1, 9, 8 and 6, an id of 2 and 10, 64 doubles."""
    small = described("user", rows=1000, dimension=64, ids_bytes=10_000)
    one = dataclasses.replace(WHAT.trainings[0], towers=by_name((small,)))
    accented = dataclasses.replace(one, run=dataclasses.replace(RUN, run_name="été"))  # 5 bytes instead of 6
    row = 8 + 24 + 8 + 12 + 512
    assert estimate(dataclasses.replace(WHAT, trainings=(one, accented))) == [
        (
            "size",
            "ok",
            f"at most 2,000 rows, 512 kB of vectors to read, {(1000 * row + 1000 * (row - 1)) / 1e6:.1f} MB in BigQuery",
        ),
        ("cost", "ok", "publishing reads 1.1 MB: about $0.00 at $6.25/TiB; loading is free"),
    ]


def test_the_estimate_of_latest_tables():
    """They are copied from the history: what is written there is read, and what it replaces is read to be deleted."""
    large = described("user", rows=1_000_000_000, dimension=64, ids_bytes=10_000_000_000)
    what = dataclasses.replace(WHAT, trainings=(dataclasses.replace(WHAT.trainings[0], towers=by_name((large,))),))
    staged, size = 540e9, 564e9
    for latest, read in ((False, staged), (True, staged + 2 * size)):
        ((_, _, text),) = estimate(dataclasses.replace(what, latest_tables=latest))[1:]
        amount = f"{read / 1e12:.1f} TB" if read > 1e12 else f"{read / 1e9:.0f} GB"
        assert text == f"publishing reads {amount}: about ${read / 2**40 * 6.25:.2f} at $6.25/TiB; loading is free"


@pytest.mark.parametrize(("rows", "more"), [(0, " and those of features,"), (5, ",")])
def test_the_estimate_of_computed_towers(rows, more):
    towers = (computed("user", rows=rows), described("item", rows=10))
    what = dataclasses.replace(WHAT, trainings=(dataclasses.replace(WHAT.trainings[0], towers=by_name(towers)),))
    (_, _, text), _ = estimate(what)
    assert text.startswith(f"at most {rows + 10} rows{more} 320 bytes of vectors to read, ")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (9_949, "9.9 kB"),
        (10_000, "10 kB"),
        (999_000, "999 kB"),
        (1_000_000, "1.0 MB"),
        (2_500_000_000, "2.5 GB"),
        (1_000_000_000_000, "1.0 TB"),
        (1_234_500_000_000_000, "1,234.5 TB"),
    ],
)
def test_bytes_in_words(count, text):
    assert preflight._bytes(count) == text
