"""What is checked before anything is written, in one report; nothing here changes anything.

Checks do not stop at the first that fails: who is paged reads everything that is wrong at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from typing import Any
from urllib.parse import quote

from google.api_core.exceptions import Forbidden, GoogleAPICallError, NotFound
from google.auth.exceptions import GoogleAuthError
from google.cloud import bigquery, storage

from beam_pipeline import emulators
from beam_pipeline.bigquery import tables
from beam_pipeline.bigquery.publication import Publication, require_compatible
from beam_pipeline.bigquery.tables import Destination
from beam_pipeline.credentials import credentials
from beam_pipeline.errors import (
    ConfigError,
    DatasetMissingError,
    DimensionChangedError,
    IncompatibleTableError,
    PartitionTakenError,
    PipelineError,
)
from beam_pipeline.formats.model import Tower
from beam_pipeline.launch import vectors
from beam_pipeline.training import Run, Training

_DOLLARS_PER_TIB = 6.25
"""BigQuery on demand, US and EU (https://cloud.google.com/bigquery/pricing); loads, copies and DELETEs are free."""

_RESOURCE_MANAGER = "https://cloudresourcemanager.googleapis.com"

_MOST_PARTITIONS = 4000  # of one load job
_DAY_SECONDS = 24 * 3600
_DAY_MS = _DAY_SECONDS * 1000


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        check: what was looked at.
        status: "ok"; "note" for what a person should know; "stop" for what keeps the job from going.
        text: what was found.
        error: for "stop": what the launcher raises.
    """

    check: str
    status: str
    text: str
    error: PipelineError | None = None


@dataclass
class Findings:
    """The report as it grows."""

    lines: list[Finding] = field(default_factory=list)

    def ok(self, check: str, text: str) -> None:
        """Adds what is as it should be."""
        self.lines.append(Finding(check, "ok", text))

    def note(self, check: str, text: str) -> None:
        """Adds what a person should know."""
        self.lines.append(Finding(check, "note", text))

    def stop(self, check: str, error: PipelineError) -> None:
        """Adds what keeps the job from going."""
        self.lines.append(Finding(check, "stop", str(error), error))

    @property
    def error(self) -> PipelineError | None:
        """The first of what keeps the job from going."""
        return next((line.error for line in self.lines if line.error), None)


def find_projects(billing: str | None, of_dataset: str | None) -> tuple[str, str]:
    """Returns the project in which jobs run and are billed, and that of the tables.

    Args:
        billing: from --project.
        of_dataset: from --dataset=PROJECT.DATASET.

    Raises:
        ConfigError: neither is there, and no emulator.
    """
    jobs = billing or of_dataset or (emulators.PROJECT if emulators.emulated() else None)
    if not jobs:
        raise ConfigError(
            "which project? --warehouse=DIR for a warehouse on this machine, or --project=PROJECT with "
            "--temp_location=gs://BUCKET/FOLDER for BigQuery"
        )
    return jobs, of_dataset or jobs


def find_destination(
    project: str,
    dataset: str,
    prefix: str,
    *,
    billing_project: str | None = None,
    suffix: str = "",
    staging_dataset: str | None = None,
    make_dataset: bool = False,
) -> Destination:
    """Returns the destination in the dataset's own location.

    Args:
        project: of the dataset.
        dataset: the dataset.
        prefix: first part of the tables' names.
        billing_project: where jobs run and are billed; None: in the dataset's project.
        suffix: last part of the tables' names.
        staging_dataset: `[project.]dataset` for staging tables, if it is another.
        make_dataset: make them if missing; for the embedded warehouse alone.

    Raises:
        DatasetMissingError: there is no such dataset.
        ConfigError: BigQuery cannot be asked, or the two datasets are in different places.
    """
    billed = billing_project or project
    location = _location(billed, f"{project}.{dataset}", make_dataset)
    if staging_dataset:
        if "." not in staging_dataset:
            staging_dataset = f"{project}.{staging_dataset}"
        other = _location(billed, staging_dataset, make_dataset)
        if other != location:
            raise ConfigError(
                f"--staging_dataset {staging_dataset} is in {other} and {project}.{dataset} in {location}; one query "
                "reads both, so they have to be in one location"
            )
    return Destination(project, dataset, location, prefix, staging_dataset, suffix, billing_project)


def _location(project: str, dataset: str, make: bool) -> str:
    try:
        client = bigquery.Client(project=project, credentials=credentials())
        if make:
            client.create_dataset(dataset, exists_ok=True)
        return client.get_dataset(dataset).location or "US"
    except NotFound as error:
        raise DatasetMissingError(
            f"dataset {dataset} does not exist; make it where the bucket is: "
            f"bq --location=EU mk --dataset {':'.join(dataset.rsplit('.', 1))}"
        ) from error
    except (GoogleAPICallError, GoogleAuthError) as error:
        raise ConfigError(f"BigQuery does not answer for dataset {dataset}: {_first_line(error)}") from error


def examine(
    client: bigquery.Client,
    publication: Publication,
    *,
    allow_dimension_change: bool,
    distributed: bool,
    dataflow: bool,
    region: str | None = None,
    dataflow_kms_key: str | None = None,
    embedding_rows: bool = False,
    discovered: bool = False,
) -> Findings:
    """Returns the report about a publication whose dataset exists and whose models were found.

    Args:
        client: for the dataset.
        publication: what is to be published.
        allow_dimension_change: publish vectors of another length than before.
        distributed: the job runs elsewhere, as another account.
        region: of the Dataflow job, if it is one.
        dataflow_kms_key: Cloud KMS key of the Dataflow job.
        embedding_rows: publish the rows of an embedding although its tower goes on after it.
        discovered: nobody named the towers' layers.
        dataflow: it is submitted to Dataflow.
    """
    findings = Findings()
    vectors.examine(findings, publication, embedding_rows=embedding_rows, discovered=discovered)
    destination = publication.destination
    staging = f", staging in {destination.staging_dataset}" if destination.staging_dataset else ""
    findings.ok("dataset", f"{destination.project}.{destination.dataset} in {destination.location}{staging}")
    examine_projects(findings, destination)
    for run in (training.run for training in publication.trainings if training.run.status != "FINISHED"):
        findings.note("run", _unfinished(run))
    if (days := len({training.run.train_date for training in publication.trainings})) > _MOST_PARTITIONS:
        error = ConfigError(f"{days:,} dates, and one load job writes {_MOST_PARTITIONS:,}; narrow --since and --until")
        findings.stop("dates", error)
    for tower in publication.towers:
        of_runs = [(training, training.towers[tower]) for training in publication.trainings]
        try:
            _examine_table(findings, client, publication, tower, of_runs, allow_dimension_change)
        except GoogleAPICallError as error:
            reason = f"BigQuery does not answer for {destination.table(tower)}: {_first_line(error)}"
            findings.stop(f"table {tower}", ConfigError(reason))
    examine_bucket(findings, publication.bucket, destination, publication.kms_key)
    _examine_keys(findings, publication, region, dataflow_kms_key)
    _examine_permissions(findings, client, publication, distributed, dataflow)
    _estimate(findings, publication)
    return findings


def examine_projects(findings: Findings, destination: Destination) -> None:
    """Adds where jobs run and are billed, if --project does not say so or the tables are elsewhere."""
    if destination.job_project != destination.project:
        findings.ok(
            "project", f"jobs run and are billed in {destination.job_project}, the tables are in {destination.project}"
        )
    elif not destination.billing_project and not emulators.emulated():
        findings.note(
            "project",
            f"jobs run and are billed in {destination.project}, the dataset's project; --project names another",
        )


def _unfinished(run: Run) -> str:
    if run.status in ("RUNNING", "SCHEDULED"):
        return f"{run.run_id} is {run.status}: start the job again if it logs its model again before it ends"
    return f"{run.run_id} is {run.status}: make sure that its model is the one to publish"


def _examine_table(
    findings: Findings,
    client: bigquery.Client,
    publication: Publication,
    tower: str,
    of_runs: Sequence[tuple[Training, Tower]],
    allow_dimension_change: bool,
) -> None:
    name = publication.destination.table(tower)
    check = f"table {tower}"
    lengths = {of_run.matrix.dimension: training for training, of_run in of_runs}
    if len(lengths) > 1 and not allow_dimension_change:
        told = ", ".join(f"{length} (run {training.run.run_id})" for length, training in sorted(lengths.items()))
        findings.stop(
            check,
            DimensionChangedError(
                f"tower {tower!r}: vectors of different lengths: {told}, and VECTOR_SEARCH needs one length; "
                "--allow_dimension_change publishes all the same"
            ),
        )
    days = publication.partition_expiration_days
    try:
        table = client.get_table(name)
    except NotFound:
        kept = f"partitions kept for {days} days" if days else "partitions kept forever"
        findings.ok(check, f"{name} will be made, {kept}")
        _examine_age(findings, check, name, days * _DAY_MS if days else None, of_runs)
        return
    try:
        require_compatible(table, tower)
    except IncompatibleTableError as error:
        findings.stop(check, error)
        return
    added = [column.name for column in tables.missing_columns(table, tables.schema_fields(tower))]
    expiration = table.time_partitioning.expiration_ms
    kept = f"partitions kept for {expiration // _DAY_MS} days" if expiration else "partitions kept forever"
    findings.ok(check, f"{name} exists, {kept}" + (f"; columns {', '.join(added)} will be added" if added else ""))
    _examine_age(findings, check, name, expiration, of_runs)
    _examine_partitions(findings, client, publication, tower, [training for training, _ in of_runs])
    if not allow_dimension_change:
        _examine_length(findings, client, publication.destination, of_runs[-1][1])


def _examine_age(
    findings: Findings,
    check: str,
    name: str,
    expiration: int | None,
    of_runs: Sequence[tuple[Training, Tower]],
) -> None:
    today = datetime.now(UTC).date()
    old = sorted(
        training.run.train_date
        for training, _ in of_runs
        if expiration and (today - training.run.train_date).days * _DAY_MS >= expiration
    )
    if old and expiration:
        more = f" and {len(old) - 1:,} more dates" if len(old) > 1 else ""
        without = ", or leave the date out with --since" if len(of_runs) > 1 else ""  # --since chooses among many
        findings.stop(
            check,
            IncompatibleTableError(
                f"table {name.rsplit('.', 1)[1]} keeps partitions for {expiration // _DAY_MS} days, and {old[0]} was "
                f"{(today - old[0]).days} days ago{more}: BigQuery would delete its rows at once; lengthen that "
                f"expiration{without}"
            ),
        )


def partitions(client: bigquery.Client, table: str, first: date, last: date) -> dict[date, dict[str | None, int]]:
    """Returns date → run id → rows, of the partitions from `first` to `last`; empty for a table that is not there."""
    days = [bigquery.ScalarQueryParameter(name, "DATE", day) for name, day in (("first", first), ("last", last))]
    found: dict[date, dict[str | None, int]] = {}
    try:
        for day, run_id, rows in _query(client, tables.partitions_sql(table), *days):
            found.setdefault(day, {})[run_id] = rows
    except NotFound:
        return {}
    return found


def _examine_partitions(
    findings: Findings, client: bigquery.Client, publication: Publication, tower: str, trainings: Sequence[Training]
) -> None:
    name, how = publication.destination.table(tower), publication.if_partition_taken
    dates = [training.run.train_date for training in trainings]
    there = partitions(client, name, min(dates), max(dates))
    free = 0
    for run in (training.run for training in trainings):
        others = {run_id: rows for run_id, rows in there.get(run.train_date, {}).items() if run_id != run.run_id}
        ours = there.get(run.train_date, {}).get(run.run_id)
        check = f"partition {run.train_date} {tower}"
        for other, rows in sorted(others.items(), key=lambda item: -item[1])[:1]:
            if how == "fail":
                findings.stop(
                    check,
                    PartitionTakenError(
                        f"partition {run.train_date} of {name} holds {rows:,} rows of run {other}; "
                        "--if_partition_taken=replace puts this run in its place, keep leaves both"
                    ),
                )
            else:
                what = "are replaced" if how == "replace" else "stay beside this run's"
                findings.note(check, f"{rows:,} rows of run {other} {what} (--if_partition_taken={how})")
        if ours:
            findings.note(check, f"holds {ours:,} rows of this run already, which are published again")
        elif not others:
            free += 1
    if free:
        what = f"partition {dates[0]} is" if len(dates) == 1 else f"{free:,} of {len(dates):,} partitions are"
        findings.ok(f"table {tower}", f"{what} free")


def _examine_length(findings: Findings, client: bigquery.Client, destination: Destination, tower: Tower) -> None:
    name = destination.table(tower.name)
    ((latest,),) = _query(client, tables.latest_partition_sql(name))
    if latest is None:
        return
    newest = datetime.strptime(latest, "%Y%m%d").date()
    length = _length(client, name, tower.name, newest)
    if length == tower.matrix.dimension:
        findings.ok(f"vectors {tower.name}", f"{length} values, as in the latest partition ({newest})")
    elif length is not None:
        findings.stop(
            f"vectors {tower.name}",
            DimensionChangedError(
                f"tower {tower.name!r}: vectors of {tower.matrix.dimension} values, but the latest partition of "
                f"{name} ({newest}) holds vectors of {length}, and VECTOR_SEARCH needs one length; "
                "--allow_dimension_change publishes all the same"
            ),
        )


def _length(client: bigquery.Client, table: str, tower: str, day: date) -> int | None:
    """Returns the length of a vector in a partition; None if its rows are gone meanwhile.

    One row is listed, which is free: a query, LIMIT 1 or not, is billed for the vectors of the whole partition. The log
    would cost its 10 MB, and does not know what was deleted or written by others since.
    """
    if emulators.emulated():  # They do not know `table$day`, and bill nobody.
        parameter = bigquery.ScalarQueryParameter("day", "DATE", day)
        for (length,) in _query(client, tables.dimension_sql(table, tower), parameter):
            return int(length)
        return None
    partition = bigquery.TableReference.from_string(f"{table}${day:%Y%m%d}")
    vectors = [column for column in tables.schema_fields(tower) if column.name == f"{tower}_embedding"]
    for (vector,) in client.list_rows(partition, selected_fields=vectors, max_results=1):
        return len(vector)
    return None


def examine_bucket(findings: Findings, name: str, destination: Destination, kms_key: str | None) -> None:
    """Adds whether load jobs of the destination's dataset can read a bucket."""
    location = destination.location
    try:
        client = storage.Client(project=destination.job_project, credentials=credentials())
        bucket = client.get_bucket(name, timeout=10)
    except NotFound:
        findings.stop(
            "bucket",
            ConfigError(
                f"bucket gs://{name} of --temp_location does not exist; make it where the dataset is: "
                f"gcloud storage buckets create gs://{name} --location={location} --soft-delete-duration=0"
            ),
        )
        return
    except (GoogleAPICallError, GoogleAuthError, OSError) as error:
        findings.note("bucket", f"gs://{name} could not be asked for its location: {_first_line(error)}")
        return
    regions = bucket.data_locations or ()
    place = f"{bucket.location} ({', '.join(regions)})" if regions else bucket.location
    fits = location_fits(bucket.location or "", location, regions)
    remedy = f"name one in {location}" + ("" if location.upper() == "EU" else ", or in a dual-region that includes it,")
    if fits:
        findings.ok("bucket", f"gs://{name} in {place}")
    elif fits is None:
        findings.note(
            "bucket",
            f"gs://{name} in {place}, and the dataset in {location}: only the load job tells whether that fits; to be "
            f"sure, {remedy} with --temp_location",
        )
    else:
        findings.stop(
            "bucket",
            ConfigError(
                f"bucket gs://{name} is in {place}, from where a dataset in {location} cannot load; {remedy} with "
                "--temp_location"
            ),
        )
    if kept := bucket.soft_delete_policy.retention_duration_seconds:
        findings.note(
            "soft delete",
            f"gs://{name} keeps deleted files for {kept / _DAY_SECONDS:g} days, load files too, and they are billed; "
            f"gcloud storage buckets update gs://{name} --clear-soft-delete ends that",
        )
    if kms_key and not bucket.default_kms_key_name:
        findings.note(
            "bucket", f"gs://{name} has no default key: load files are encrypted with Google's, not --kms_key"
        )


def location_fits(bucket: str, dataset: str, regions: Sequence[str] = ()) -> bool | None:
    """Returns whether a dataset can load from a bucket, by their locations; None where that cannot be told.

    A dataset in the US loads from anywhere; one in the EU from the EU and the regions that belong to it; one in a
    region from there and from dual-regions that include it
    (https://cloud.google.com/bigquery/docs/locations#load-data-location-considerations). That page says of the rest
    that the transfer is billed. In reports, the load job fails with "Cannot read and write in different locations",
    with a bucket in the US and a dataset in us-east4 or us-west2 too (airbytehq/airbyte#17013,
    googlegenomics/gcp-variant-transforms#718).

    Args:
        bucket: location of the bucket.
        dataset: location of the dataset.
        regions: of a bucket in a dual-region of one's own, whose location is the continent's.
    """
    bucket, dataset = bucket.upper(), dataset.upper()
    if dataset == "US":
        return True
    if regions := [region.upper() for region in regions] or _DUAL_REGIONS.get(bucket, []):
        inside = [_includes(dataset, region) for region in regions]
        if dataset == "EU" and any(inside) and not all(inside):
            return None  # Which of its two regions a load reads is not documented.
        return any(inside)
    if "-" not in bucket and bucket not in _MULTI_REGIONS:
        return None
    return _includes(dataset, bucket)


def _includes(dataset: str, place: str) -> bool:
    """Whether a place is a dataset's location, or a region within it."""
    return place == dataset or (dataset == "EU" and place.startswith("EUROPE-") and place not in _OUTSIDE_EU)


_MULTI_REGIONS = ("US", "EU", "ASIA")
_OUTSIDE_EU = ("EUROPE-WEST2", "EUROPE-WEST6")  # London, Zurich (https://cloud.google.com/storage/docs/locations)
_DUAL_REGIONS = {
    "ASIA1": ["ASIA-NORTHEAST1", "ASIA-NORTHEAST2"],
    "EUR4": ["EUROPE-NORTH1", "EUROPE-WEST4"],
    "EUR5": ["EUROPE-WEST1", "EUROPE-WEST2"],
    "EUR7": ["EUROPE-WEST2", "EUROPE-WEST3"],
    "EUR8": ["EUROPE-WEST3", "EUROPE-WEST6"],
    "NAM4": ["US-CENTRAL1", "US-EAST1"],
}


def _examine_keys(
    findings: Findings, publication: Publication, region: str | None, dataflow_kms_key: str | None
) -> None:
    """Reports keys that are in another place than what they are to encrypt.

    BigQuery takes keys of the dataset's location (https://cloud.google.com/bigquery/docs/customer-managed-encryption),
    Dataflow those of the job's region (https://cloud.google.com/dataflow/docs/guides/customer-managed-encryption-keys).
    """
    location = publication.destination.location
    key = publication.kms_key
    wanted = _MULTI_REGION_KEYS.get(location.upper(), location.lower())
    if key and (place := _key_location(key)) != wanted:
        findings.note("key", f"--kms_key is in {place}, and BigQuery wants one in {wanted} for a dataset in {location}")
    place = _key_location(dataflow_kms_key or "")
    if not region or place in ("", region):
        return
    flag = "--kms_key" if dataflow_kms_key == key else "--dataflow_kms_key"
    findings.stop(
        "key",
        ConfigError(
            f"{flag} is in {place}, and Dataflow in {region} takes keys of that region alone: name one with "
            "--dataflow_kms_key" + (", and leave --kms_key to BigQuery" if flag == "--kms_key" else "")
        ),
    )


_MULTI_REGION_KEYS = {"US": "us", "EU": "europe"}
"""Cloud KMS's names of BigQuery's multi-regions."""


def _key_location(key: str) -> str:
    _, _, rest = key.partition("/locations/")
    return rest.split("/")[0]


def _examine_permissions(
    findings: Findings, client: bigquery.Client, publication: Publication, distributed: bool, dataflow: bool
) -> None:
    if emulators.emulated():
        findings.note("permissions", "not asked: emulators have none")
        return
    wanted = ["bigquery.jobs.create", *(["dataflow.jobs.create"] if dataflow else [])]
    project = publication.destination.job_project
    name = publication.bucket
    missing: list[str] = []
    asked: list[str] = []
    for place, permissions, ask in (
        (f"project {project}", wanted, lambda: _project_permissions(project, wanted)),
        (
            f"bucket {name}",
            _BUCKET_PERMISSIONS,
            lambda: _bucket_permissions(project, name),
        ),
        *(
            (
                f"table {tower}",
                _TABLE_PERMISSIONS,
                lambda tower=tower: client.test_iam_permissions(
                    publication.destination.table(tower), _TABLE_PERMISSIONS
                )["permissions"],
            )
            for tower in publication.towers
        ),
    ):
        try:
            granted = ask()
        except NotFound:  # A table that is made later.
            continue
        except (GoogleAPICallError, GoogleAuthError, OSError, KeyError) as error:
            findings.note("permissions", f"{place} could not be asked: {_first_line(error)}")
            continue
        asked.append(place)
        missing += [f"{permission} on {place}" for permission in permissions if permission not in granted]
    try:
        client.query("SELECT 1", job_config=bigquery.QueryJobConfig(dry_run=True))
        asked.append("a query (dry run)")
    except (Forbidden, GoogleAuthError) as error:
        missing.append(f"to run a query: {_first_line(error)}")
    whom = "this account, not the workers'" if distributed else "this account"
    if not missing:
        findings.ok("permissions", f"{whom}: {', '.join(asked) or 'nothing could be asked'}")
    elif distributed:  # The launcher may lawfully hold less than the workers, which do the writing.
        findings.note("permissions", f"{whom}, lacks {', '.join(missing)}")
    else:
        findings.stop("permissions", ConfigError(f"this account lacks {', '.join(missing)}; see docs/permissions.md"))


_BUCKET_PERMISSIONS = [f"storage.objects.{what}" for what in ("create", "delete", "get", "list")]
_TABLE_PERMISSIONS = [f"bigquery.tables.{what}" for what in ("get", "getData", "updateData")]


def _bucket_permissions(project: str, name: str) -> list[str]:
    """Returns those of the permissions that this account has on the bucket."""
    bucket = storage.Client(project=project, credentials=credentials()).bucket(name)
    return list(bucket.test_iam_permissions(_BUCKET_PERMISSIONS, timeout=10))


def _project_permissions(project: str, permissions: list[str]) -> list[str]:
    """Returns those of the permissions that this account has on the project."""
    from google.auth.transport.requests import AuthorizedSession

    answer = AuthorizedSession(credentials()).post(
        # Quoted, since an id like example.com:project has a colon as well.
        f"{_RESOURCE_MANAGER}/v1/projects/{quote(project, safe='')}:testIamPermissions",
        json={"permissions": permissions},
        timeout=10,
    )
    answer.raise_for_status()
    return list(answer.json().get("permissions", []))


def _estimate(findings: Findings, publication: Publication) -> None:
    rows = vectors = size = 0
    for training in publication.trainings:
        constants = tables.run_values(training.run).values()
        fixed = sum(2 + len(value.encode()) if isinstance(value, str) else 8 for value in constants)
        for tower in training.towers.values():
            span = tower.vocabulary.span
            rows += tower.matrix.rows
            vectors += tower.matrix.size
            size += tower.matrix.rows * (fixed + 2 + 8 * tower.matrix.dimension) + span.end - span.start
    findings.ok("size", f"at most {rows:,} rows, {_bytes(vectors)} of vectors to read, {_bytes(size)} in BigQuery")
    cost = size / (1 << 40) * _DOLLARS_PER_TIB
    findings.ok(
        "cost", f"publishing reads {_bytes(size)}: about ${cost:.2f} at ${_DOLLARS_PER_TIB}/TiB; loading is free"
    )


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:,.0f} {unit}" if unit == "bytes" or size >= 10 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _query(client: bigquery.Client, sql: str, *parameters: bigquery.ScalarQueryParameter) -> list[tuple[Any, ...]]:
    config = bigquery.QueryJobConfig(query_parameters=list(parameters))
    return [row.values() for row in client.query_and_wait(sql, job_config=config)]
