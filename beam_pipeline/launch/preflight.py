"""What is checked before anything is written, in one report; nothing here changes anything.

Checks do not stop at the first that fails: whoever is paged sees everything that is wrong at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, date, datetime
from typing import Any

from google.api_core.exceptions import GoogleAPICallError, NotFound
from google.cloud import bigquery

from beam_pipeline import emulators
from beam_pipeline.bigquery import history, tables
from beam_pipeline.bigquery.publication import Publication, require_compatible
from beam_pipeline.bigquery.tables import Destination
from beam_pipeline.errors import (
    ConfigError,
    DimensionChangedError,
    IncompatibleTableError,
    PartitionTakenError,
)
from beam_pipeline.formats.model import Tower
from beam_pipeline.launch import bucket, indexes, permissions, vectors
from beam_pipeline.launch.findings import Findings, first_line
from beam_pipeline.launch.options import Config
from beam_pipeline.training import Run, Training

_MOST_PARTITIONS = 4000  # of one load job
_DAY_MS = 24 * 3600 * 1000
_STAGED_BYTES = 8 + 8  # of a row, beside id and vector: DATE and INTEGER


def examine(
    client: bigquery.Client,
    publication: Publication,
    config: Config,
    *,
    region: str | None = None,
    dataflow_kms_key: str | None = None,
) -> Findings:
    """Returns the report about a publication whose dataset exists and whose models were found.

    Args:
        client: for the dataset.
        publication: what is to be published.
        config: what was asked for.
        region: of the Dataflow job, if it is one.
        dataflow_kms_key: Cloud KMS key of the Dataflow job.
    """
    findings = Findings()
    vectors.examine(findings, publication, embedding_rows=config.embedding_rows, discovered=config.discover)
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
            _examine_table(findings, client, publication, tower, of_runs, config.allow_dimension_change)
        except GoogleAPICallError as error:
            reason = f"BigQuery cannot look up {destination.table(tower)}: {first_line(error)}"
            findings.stop(f"table {tower}", ConfigError(reason))
    if publication.latest_tables:
        _examine_latest(findings, client, publication)
    indexes.examine(findings, client, publication)
    bucket.examine(findings, publication.bucket, destination, publication.kms_key)
    _examine_keys(findings, publication, region, dataflow_kms_key)
    permissions.examine(findings, client, publication, distributed=not config.local, dataflow=not config.waits)
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
        listed = ", ".join(f"{length} (run {training.run.run_id})" for length, training in sorted(lengths.items()))
        findings.stop(
            check,
            DimensionChangedError(
                f"tower {tower!r}: vectors of different lengths: {listed}, and VECTOR_SEARCH needs one length; "
                "--allow_dimension_change publishes all the same"
            ),
        )
    days = publication.partition_expiration_days
    try:
        table = client.get_table(name)
    except NotFound:
        kept = f"partitions kept for {days} days" if days else "partitions kept forever"
        findings.ok(check, f"{name} will be created, {kept}")
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
    _examine_settings(findings, check, table, publication)
    _examine_age(findings, check, name, expiration, of_runs)
    _examine_partitions(findings, client, publication, tower, [training for training, _ in of_runs])
    if (
        not allow_dimension_change
    ):  # The last of the trainings stands for all: others of another length are named above.
        _examine_length(findings, client, publication.destination, of_runs[-1][1])


def _examine_settings(findings: Findings, check: str, table: bigquery.Table, publication: Publication) -> None:
    """Adds the flags that a table would have been created with, and that an existing one does not follow."""
    days, key = publication.partition_expiration_days, publication.kms_key
    ignored = []
    if days and table.time_partitioning.expiration_ms != days * _DAY_MS:
        ignored.append(f"--partition_expiration_days={days}")
    if publication.require_partition_filter and not table.require_partition_filter:
        ignored.append("--require_partition_filter")
    if key and (table.encryption_configuration is None or table.encryption_configuration.kms_key_name != key):
        ignored.append("--kms_key")
    if ignored:
        findings.note(
            check, f"{', '.join(ignored)} would apply if the table were created; an existing one is kept as it is"
        )


def _examine_latest(findings: Findings, client: bigquery.Client, publication: Publication) -> None:
    for tower in publication.towers:
        name, check = publication.destination.latest(tower), f"latest {tower}"
        try:
            require_compatible(client.get_table(name), tower, partitioned=False)
            findings.ok(check, f"{name} exists, and will hold this training if no newer one is published")
        except NotFound:
            findings.ok(check, f"{name} will be created")
        except IncompatibleTableError as error:
            findings.stop(check, error)
        except GoogleAPICallError as error:
            findings.stop(check, ConfigError(f"BigQuery cannot look up {name}: {first_line(error)}"))


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
        others = len(old) - 1
        more = f" and {others:,} more date{'s' if others > 1 else ''}" if others else ""
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
    """Returns date → run id → rows, of the partitions from `first` to `last`; empty for a table that does not exist."""
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
    held = partitions(client, name, min(dates), max(dates))
    free = 0
    for run in (training.run for training in trainings):
        others = {run_id: rows for run_id, rows in held.get(run.train_date, {}).items() if run_id != run.run_id}
        ours = held.get(run.train_date, {}).get(run.run_id)
        check = f"partition {run.train_date} {tower}"
        # The run with the most rows stands for all others: with --if_partition_taken=keep there can be many.
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
                verb = "are replaced" if how == "replace" else "stay beside this run's"
                findings.note(check, f"{rows:,} rows of run {other} {verb} (--if_partition_taken={how})")
        if ours:
            findings.note(check, f"holds {ours:,} rows of this run already, which are published again")
        elif not others:
            free += 1
    if free:
        subject = f"partition {dates[0]} is" if len(dates) == 1 else f"{free:,} of {len(dates):,} partitions are"
        findings.ok(f"table {tower}", f"{subject} free")


def _examine_length(findings: Findings, client: bigquery.Client, destination: Destination, tower: Tower) -> None:
    name = destination.table(tower.name)
    ((latest,),) = _query(client, tables.latest_partition_sql(name))
    if latest is None:
        return
    newest = datetime.strptime(latest, "%Y%m%d").date()
    length = history.vector_length(client, name, tower.name, newest)
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


def _estimate(findings: Findings, publication: Publication) -> None:
    rows = vectors = size = read = 0
    for training in publication.trainings:
        constants = tables.run_values(training.run).values()
        # BigQuery bills a string by its bytes in UTF-8 and two more, a date and a number by eight.
        fixed = sum(2 + len(value.encode()) if isinstance(value, str) else 8 for value in constants)
        for tower in training.towers.values():
            span = tower.vocabulary.span
            rows += tower.matrix.rows
            vectors += 0 if tower.is_computed else tower.matrix.size
            varying = tower.matrix.rows * (2 + 8 * tower.matrix.dimension) + span.end - span.start
            size += tower.matrix.rows * fixed + varying
            read += tower.matrix.rows * _STAGED_BYTES + varying
    unknown = any(
        tower.is_computed and not tower.matrix.rows for t in publication.trainings for tower in t.towers.values()
    )
    more = " and those of features," if unknown else ","
    findings.ok("size", f"at most {rows:,} rows{more} {_bytes(vectors)} of vectors to read, {_bytes(size)} in BigQuery")
    if publication.latest_tables:  # Copied from the history, after as much was deleted.
        read += 2 * size
    cost = f"about ${read / (1 << 40) * history.DOLLARS_PER_TIB:.2f} at ${history.DOLLARS_PER_TIB}/TiB"
    findings.ok("cost", f"publishing reads {_bytes(read)}: {cost}; loading is free")


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:,.0f} {unit}" if unit == "bytes" or size >= 10 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"


def _query(client: bigquery.Client, sql: str, *parameters: bigquery.ScalarQueryParameter) -> list[tuple[Any, ...]]:
    config = bigquery.QueryJobConfig(query_parameters=list(parameters))
    return [row.values() for row in client.query_and_wait(sql, job_config=config)]
