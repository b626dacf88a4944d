"""Publication: from loaded staging tables to one transaction, and why every crash point on the way is safe.

Each launch of the job has an id, created inside the job graph and materialised before anything uses it. The names of
staging tables and of publish jobs contain it, so two launches never meet, and a step that is retried finds its own
work and no other launch's. Readers see only the destination tables.

prepare: a retry finds the staging tables created. They are this launch's and empty: creating them again changes
nothing.

write: a load job takes only the files of committed bundles; what a failed bundle wrote stays in the bucket. The job's
id is deterministic, so a retried step finds the job instead of loading twice.

wait: loads and copies of every tower are side inputs of the audit, which cannot start before all are done.

audit: reads only. What does not match the artifact fails the job with nothing published.

shape: after a crash the destination may have new columns and no new rows. That is additive: readers, older writers and
a later launch all work with it.

publish: BigQuery rolls back a transaction that is cut short. If it was committed and the worker died before it could
report that: the job id is launch + attempt and is looked up before anything is submitted, so a committed publication is
found, not repeated. A job that fails for a transient reason is followed by the next attempt, under an id of its own.

clean: a retry deletes again; what is missing is fine, and what cannot be deleted is left: this step never fails, since
everything is published. No other launch's tables are touched. What a dead launch has left expires after 48 hours
(tables) or is swept by a later launch (files).

several trainings: each is a transaction of its own, in order; a retry finds those that are done and resumes with the
next.

a new launch of the same run: the transaction deletes the run's rows before it inserts them: the same rows, once.

Two publications at once, of the same run or of two, both update the lock table in their transactions. BigQuery
cancels one of them; it starts over, and sees what the other has published.
"""

from __future__ import annotations

import itertools
import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

from apache_beam.io.filesystems import FileSystems
from apache_beam.metrics.metric import Lineage
from google.api_core.exceptions import Conflict, GoogleAPICallError, GoogleAPIError, NotFound, RetryError
from google.auth.exceptions import GoogleAuthError
from google.cloud import bigquery

from beam_pipeline import emulators, metrics
from beam_pipeline.bigquery import tables
from beam_pipeline.bigquery.indexes import ensure_index
from beam_pipeline.bigquery.tables import Destination
from beam_pipeline.credentials import credentials
from beam_pipeline.errors import (
    AuditError,
    BadIdError,
    DatasetMissingError,
    IncompatibleTableError,
    PartitionTakenError,
    PublishError,
)
from beam_pipeline.reading.tally import Tally
from beam_pipeline.training import Run, Training

STAGING_LIFE = timedelta(hours=48)
"""How long what a dead launch has left may stay: longer than a job runs, and not so long that it costs much."""

JOB_NAME = "historize"
"""First part of the name of a job that was not given one."""

LABELS = {"managed_by": "beam_pipeline"}
"""Of every table that is created and of every query, so that costs and tables can be found by them."""

ATTEMPTS = 10
_LOG = logging.getLogger(__name__)

# Reasons after which BigQuery asks to submit the job again (https://cloud.google.com/bigquery/docs/error-messages).
_TRANSIENT = (
    *("backendError", "internalError", "rateLimitExceeded"),
    *("jobBackendError", "jobInternalError", "jobRateLimitExceeded"),
)
_PUBLISH = "publish_embeddings"
"""First part of the ids of publishing jobs."""
_CONFLICT = "due to concurrent update"

_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 5.0  # Seconds between two looks at a job.
_UNTIL_VISIBLE = (1, 2, 4, 8, 16)  # Seconds before each look for a job that exists and is not visible yet.


Tallies = Mapping[tuple[str, str], Tally]
"""What was read, by run id and tower."""


@dataclass(frozen=True)
class Publication:
    """What a launch publishes, and where to.

    Attributes:
        destination: the tables.
        trainings: published in this order, each whole; all have the same towers.
        temp_location: `gs://` folder for load files.
        if_partition_taken: "fail", "replace" or "keep".
        launch_prefix: of every launch id of this pipeline; the launcher finds by it what a failed launch has left.
        job_name: of the Beam job, for the log.
        partition_expiration_days: for tables that are created; None keeps partitions forever.
        require_partition_filter: for tables that are created: queries must name a partition.
        kms_key: Cloud KMS key of every table and job; None leaves it to the dataset.
        vector_index: distance of the vector index of each tower's tables; None creates none.
        latest_tables: also keep the newest training of each tower in a table of its own.
    """

    destination: Destination
    trainings: tuple[Training, ...]
    temp_location: str
    if_partition_taken: str
    launch_prefix: str
    job_name: str = JOB_NAME
    partition_expiration_days: int | None = None
    require_partition_filter: bool = False
    kms_key: str | None = None
    vector_index: str | None = None
    latest_tables: bool = False

    @property
    def towers(self) -> tuple[str, ...]:
        """Names of the towers, the same in every training."""
        return tuple(self.trainings[0].towers)

    @property
    def encryption(self) -> bigquery.EncryptionConfiguration | None:
        """For every table that is created and every result that is kept."""
        return bigquery.EncryptionConfiguration(self.kms_key) if self.kms_key else None

    @property
    def bucket(self) -> str:
        """Name of the temp location's bucket."""
        return self.temp_location.removeprefix("gs://").split("/")[0]

    @property
    def all_load_files(self) -> str:
        """Folder for the load files of every pipeline with this temp location."""
        return f"{self.temp_location.rstrip('/')}/embedding_loads"

    @property
    def load_files(self) -> str:
        """Folder for the load files of this pipeline."""
        return f"{self.all_load_files}/{self.launch_prefix}"

    @property
    def all_copies(self) -> str:
        """Folder for the models that workers cannot read where they are, of every pipeline with this temp location."""
        return copies_folder(self.temp_location)

    @property
    def copy(self) -> str:
        """Folder for this pipeline's copy of its model, if it needs one."""
        return copies_folder(self.temp_location, self.launch_prefix)


def copies_folder(temp_location: str, launch_prefix: str = "") -> str:
    """Returns the folder for copies of models, or that of the pipeline with this prefix of launch ids."""
    return f"{temp_location.rstrip('/')}/embedding_artifacts/{launch_prefix}".rstrip("/")


def make_client(destination: Destination) -> bigquery.Client:
    """Returns a client whose jobs run where the dataset is, are billed to the jobs' project and carry our labels."""
    return bigquery.Client(
        project=destination.job_project,
        location=destination.location,
        default_query_job_config=bigquery.QueryJobConfig(labels=LABELS),
        credentials=credentials(),
    )


def partition_life(train_date: date, now: datetime) -> int:
    """Returns the partition expiration of a staging table, in milliseconds.

    BigQuery counts it from the partition's date, not from when the rows came: the 48 hours alone would delete the
    rows of an older training as soon as they are loaded. The dataset's default would do the same.
    """
    start_of_day = datetime(train_date.year, train_date.month, train_date.day, tzinfo=UTC)
    life = max(now - start_of_day, timedelta(0)) + STAGING_LIFE
    return int(life.total_seconds() * 1000)


def prepare(client: bigquery.Client, publication: Publication, launch: str) -> None:
    """Creates the launch's staging tables, which expire by themselves.

    Raises:
        DatasetMissingError: the dataset was deleted meanwhile.
    """
    now = datetime.now(UTC)
    oldest = min(training.run.train_date for training in publication.trainings)
    for tower in publication.towers:
        table = bigquery.Table(publication.destination.staging(tower, launch), schema=tables.staging_fields(tower))
        table.time_partitioning = bigquery.TimePartitioning(
            type_="DAY",
            field=tables.PARTITION_COLUMN,
            expiration_ms=partition_life(oldest, now),
        )
        table.labels = LABELS
        table.encryption_configuration = publication.encryption
        table.expires = now + STAGING_LIFE
        try:
            client.create_table(table, exists_ok=True)
        except NotFound as error:
            raise DatasetMissingError(f"dataset {table.project}.{table.dataset_id} does not exist") from error


def audit(client: bigquery.Client, publication: Publication, launch: str, tallies: Tallies) -> None:
    """Compares the staging tables with what the artifacts hold: as many ids per run and tower, each once.

    Raises:
        BadIdError: an id appears twice; named.
        AuditError: rows are missing or too many.
    """
    if _published(client, launch):
        return  # A retry after a transaction, which follows an audit; the staging tables may be gone already.
    # BigQuery keeps results for a day. Not in the client's defaults: DDL and scripts, which have none, refuse a key.
    keyed = bigquery.QueryJobConfig(destination_encryption_configuration=publication.encryption)
    found = {
        (day, number, tower): (rows, ids)
        for tower in publication.towers
        for day, number, rows, ids in client.query_and_wait(
            tables.audit_sql(publication.destination, tower, launch), job_config=keyed
        )
    }
    runs = [training.run for training in publication.trainings]
    for (number, run), tower in itertools.product(enumerate(runs), publication.towers):
        tally = tallies[run.run_id, tower]
        rows, ids = found.pop((run.train_date, number, tower), (0, 0))
        if rows == ids == tally.ids:
            continue
        if rows == tally.ids:
            query = tables.duplicates_sql(publication.destination, tower, launch, run, number)
            ((name, times),) = client.query_and_wait(query, job_config=keyed)
            source = publication.trainings[number].towers[tower]
            again = "" if source.has_ids_beside_it else " and train again"
            raise BadIdError(
                f"tower {tower!r}: id {name!r} appears {times} times in {source.ids_place}; an id has one embedding: "
                f"remove the duplicates{again}"
            )
        raise AuditError(
            f"tower {tower!r} of run {run.run_id}: {rows:,} rows were loaded where the artifact holds {tally.ids:,} "
            "ids; nothing was published: start the job again, and report it if it happens twice"
        )
    if found:
        others = ", ".join(f"{tower} of {day}, training {number}" for day, number, tower in found)
        raise AuditError(f"rows of another training were loaded: {others}; nothing was published")


def shape(client: bigquery.Client, publication: Publication, _launch: str) -> None:
    """Creates the destination tables and their indexes, or adds the columns that they lack; changes nothing else.

    Raises:
        IncompatibleTableError: a table exists that cannot be used.
        PublishError: BigQuery refuses the vector index.
    """
    destination = publication.destination
    for tower in publication.towers:
        fields = tables.schema_fields(tower)
        wanted = bigquery.Table(destination.table(tower), schema=fields)
        days = publication.partition_expiration_days
        wanted.time_partitioning = bigquery.TimePartitioning(
            type_="DAY",
            field=tables.PARTITION_COLUMN,
            expiration_ms=days * 24 * 3600 * 1000 if days else None,
        )
        wanted.require_partition_filter = publication.require_partition_filter or None
        wanted.clustering_fields = [f"{tower}_id"]
        wanted.description = f"Embedding of each {tower} after each training; one partition is one model."
        table = create_table(client, wanted, publication.encryption)
        require_compatible(table, tower)
        add_columns(client, table, fields)
        if publication.vector_index:
            ensure_index(client, destination.table(tower), tower, publication.vector_index)
    if publication.latest_tables:
        for tower in publication.towers:
            create_latest(client, publication, tower)
    log = bigquery.Table(destination.log, schema=tables.LOG_SCHEMA)
    log.description = "One row for each run, tower and publication, written in the transaction that published them."
    add_columns(client, create_table(client, log, publication.encryption), tables.LOG_SCHEMA)
    ensure_lock(client, destination, publication.encryption)


def create_latest(client: bigquery.Client, publication: Publication, tower: str) -> None:
    """Creates the table of a tower's newest training and its index, or adds the columns that it lacks.

    Raises:
        IncompatibleTableError: a table exists that cannot be used.
        PublishError: BigQuery refuses the vector index.
    """
    name, fields = publication.destination.latest(tower), tables.schema_fields(tower)
    wanted = bigquery.Table(name, schema=fields)
    wanted.clustering_fields = [f"{tower}_id"]
    wanted.description = f"Embedding of each {tower} after the newest training, replaced by the next publication."
    table = create_table(client, wanted, publication.encryption)
    require_compatible(table, tower, partitioned=False)
    add_columns(client, table, fields)
    if publication.vector_index:
        ensure_index(client, name, tower, publication.vector_index, partitioned=False)


def ensure_lock(
    client: bigquery.Client, destination: Destination, encryption: bigquery.EncryptionConfiguration | None
) -> None:
    """Creates the lock table and its row, if they are missing."""
    lock = bigquery.Table(destination.lock, schema=tables.LOCK_SCHEMA)
    lock.description = "Every publication updates this row first, so that two at once conflict instead of mixing."
    create_table(client, lock, encryption)
    # Two launches may both find the table empty: two rows lock as well as one, since every row is updated.
    ((rows,),) = client.query_and_wait(tables.lock_rows_sql(destination))
    if not rows:
        client.query_and_wait(tables.fill_lock_sql(destination))


def require_compatible(table: bigquery.Table, tower: str, *, partitioned: bool = True) -> None:
    """Raises IncompatibleTableError, with the differences spelled out, if a table cannot be a tower's history."""
    if found := tables.differences(table, tower, partitioned=partitioned):
        raise IncompatibleTableError(
            f"table {table.reference} cannot be used: {'; '.join(found)}; "
            "rename it, or choose another name with --table_prefix, --table_suffix or --dataset"
        )


def publish(
    client: bigquery.Client,
    publication: Publication,
    launch: str,
    tallies: Tallies,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Makes each training visible, all its towers in one transaction; what was done before is found, not repeated.

    Trainings are published one after the other: at the same time they would cancel each other.

    Raises:
        PartitionTakenError: another run published into the partition meanwhile, and the job may not replace it.
        PublishError: BigQuery refused for another reason, or conflicts did not end.
    """
    for number, training in enumerate(publication.trainings):
        script = tables.publish_script(
            publication.destination,
            number,
            training,
            launch,
            publication.if_partition_taken,
            {tower: tallies[training.run.run_id, tower] for tower in publication.towers},
            publication.job_name,
            latest_tables=publication.latest_tables,
        )
        _publish(client, training.run, f"{launch}_{number}", script, sleep)
    for tower in publication.towers:
        Lineage.sinks().add("bigquery", *tables.split_name(publication.destination.table(tower)))


def _publish(client: bigquery.Client, run: Run, job_prefix: str, script: str, sleep: Callable[[float], None]) -> None:
    """Runs one transaction to its end, whatever of it was tried before."""
    try:
        run_script(client, f"{_PUBLISH}_{job_prefix}", script, f"partition {run.train_date}", sleep)
    except PublishError as error:
        if tables.TAKEN_MARK in str(error):
            raise PartitionTakenError(
                f"partition {run.train_date} was taken by another run while this job ran; run {run.run_id} was not "
                "published: choose with --if_partition_taken=replace or keep"
            ) from error
        raise


def run_script(
    client: bigquery.Client, job_prefix: str, script: str, subject: str, sleep: Callable[[float], None] = time.sleep
) -> None:
    """Runs a script to its end, once: a job of this prefix that is there already is waited for, not repeated.

    Args:
        client: for the dataset.
        job_prefix: of the job's id; the number of the attempt is appended.
        script: SQL.
        subject: what is not published if it fails, for the message.
        sleep: between attempts.

    Raises:
        PublishError: BigQuery refused for a reason that a retry does not fix, or conflicts did not end.
    """

    def start(job_id: str) -> bigquery.QueryJob:
        # Retries are `run_job`'s, under ids that it finds again.
        return client.query(script, job_id=job_id, job_retry=None)

    run_job(client, job_prefix, start, subject, sleep)


def run_job(
    client: bigquery.Client,
    job_prefix: str,
    start: Callable[[str], Any],
    subject: str,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Runs a job of any kind as `run_script` does; `start` submits it under an id and returns it."""
    for attempt in range(ATTEMPTS):
        job_id = f"{job_prefix}_{attempt}"
        failure = _wait_for_job(client, job_id, start, sleep)
        if not failure:
            return
        message = failure.get("message", "")
        if _CONFLICT not in message and failure.get("reason") not in _TRANSIENT:
            raise PublishError(f"BigQuery refused to publish (job {job_id}): {message}")
        _LOG.info("publication attempt %d was cancelled, trying again: %s", attempt + 1, message)
        # Conflicting launches drift apart: a random part of a growing span.
        sleep(random.uniform(0.5, 1) * min(60, 2 ** (attempt + 1)))
    raise PublishError(
        f"{subject} was not published: {ATTEMPTS} attempts failed, the last with: {message}; start the job again when "
        "fewer publish at once"
    )


def _wait_for_job(
    client: bigquery.Client, job_id: str, start: Callable[[str], Any], sleep: Callable[[float], None]
) -> dict[str, str]:
    """Runs a job to its end, whoever submitted it; returns its error, with reason and message, or nothing.

    It waits with jobs.get, which alone says whether the job has failed. getQueryResults reports a failed job as a
    failed request, which a client cannot distinguish from a request that failed while the job continues.
    """
    try:
        job = _find_job(client, job_id) or _start_job(client, job_id, start, sleep)
        pause = _FIRST_PAUSE
        while not job.done():
            sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
    except RetryError as error:  # After the client's own ten minutes.
        raise PublishError(
            f"BigQuery did not answer about job {job_id}, which may have published: {error.cause}; start the job again"
        ) from error
    except GoogleAPICallError as error:
        raise PublishError(f"BigQuery refused to publish (job {job_id}): {error.message}") from error
    return job.error_result or {}


def clean(client: bigquery.Client, publication: Publication, launch: str, load_files: Iterable[str]) -> None:
    """Drops the staging tables, the load files and the copied model of a launch, and files that dead launches left.

    What cannot be deleted (a bucket has retention or holds, an account may not delete) is logged and counted as
    `not-deleted`. It fails nothing: everything is published, and whoever restarts failed jobs would publish forever.

    Args:
        client: for the dataset.
        publication: what was published.
        launch: the launch id.
        load_files: paths of the files that were loaded; a folder that holds one is deleted whole.
    """
    for tower in publication.towers:
        staging = publication.destination.staging(tower, launch)
        with left_if_denied(f"table {staging}"):
            client.delete_table(staging, not_found_ok=True)
    # <root>/bq_load/<uuid>/<table>/<file>: a failed bundle's files lie beside those that were loaded.
    folders = {path.rsplit("/", 2)[0] for path in load_files}
    for folder in (*sorted(folders), publication.copy):
        with left_if_denied(f"folder {folder}"):
            delete_files(folder)
    for folder in (publication.all_load_files, publication.all_copies):
        with left_if_denied(f"files of earlier jobs in {folder}"):
            delete_files(folder, older_than=STAGING_LIFE)


@contextmanager
def left_if_denied(subject: str) -> Iterator[None]:
    """Logs and counts what cannot be deleted instead of raising."""
    try:
        yield
    except (GoogleAPIError, GoogleAuthError, OSError) as error:  # Beam's own errors of files are OSErrors.
        failures = getattr(error, "exception_details", None) or {subject: error}
        path, reason = next(iter(failures.items()))
        _LOG.warning("%s: not all is deleted: %s: %s", subject, path, reason)
        metrics.count("not-deleted", len(failures))


def discard(client: bigquery.Client, publication: Publication, job_name: str) -> None:
    """Removes what a failed launch has left, for a launcher that is still there; a missing thing is fine.

    Args:
        client: for the dataset.
        publication: what was to be published.
        job_name: Beam's; its temporary tables are named after it.
    """
    _drop_staging(client, publication, publication.launch_prefix, job_name)
    delete_files(publication.load_files)
    delete_files(publication.copy)


def discard_all(client: bigquery.Client, publication: Publication) -> None:
    """Removes what any other launch has left; for the embedded warehouse, where no other runs and nothing expires."""
    _drop_staging(client, publication, "", JOB_NAME)
    delete_files(publication.all_load_files)
    delete_files(publication.all_copies, but=publication.copy)


def discard_copy(folder: str) -> None:
    """Removes a copied model; a missing one is fine, and one that cannot be deleted is left."""
    with left_if_denied(f"copied model {folder}"):
        delete_files(folder)


def add_columns(client: bigquery.Client, table: bigquery.Table, wanted: Sequence[bigquery.SchemaField]) -> None:
    """Adds the columns that a table lacks."""
    # The emulator takes a column at a time, and has no quota that this could exceed.
    for columns in [[column] for column in wanted] if emulators.emulated() else [wanted]:
        for statement in tables.add_columns_sql(str(table.reference), table, columns):
            client.query_and_wait(statement)


def create_table(
    client: bigquery.Client, wanted: bigquery.Table, encryption: bigquery.EncryptionConfiguration | None
) -> bigquery.Table:
    """Returns the table, created if missing, never with an expiration that it was not asked to have."""
    try:
        return client.get_table(wanted.reference)
    except NotFound:
        pass
    wanted.labels = LABELS
    wanted.encryption_configuration = encryption
    try:
        table = client.create_table(wanted)
    except Conflict:  # Another launch was faster.
        return client.get_table(wanted.reference)
    partitioning = table.time_partitioning
    asked = wanted.time_partitioning.expiration_ms if wanted.time_partitioning else None
    # A new table inherits the dataset's defaults, under which history vanishes without a trace. The API has no value
    # for "never" at creation; ALTER TABLE has.
    if table.expires or (partitioning and partitioning.expiration_ms and not asked):
        client.query_and_wait(tables.keep_forever_sql(str(table.reference), bool(partitioning and not asked)))
        table = client.get_table(wanted.reference)
    return table


def _drop_staging(client: bigquery.Client, publication: Publication, launch_prefix: str, job_name: str) -> None:
    names = [tables.split_name(publication.destination.staging(tower, launch_prefix)) for tower in publication.towers]
    project, dataset, _ = names[0]
    prefixes = [
        *(name for _, _, name in names),
        f"beam_bq_job_LOAD_{job_name.replace('-', '')}",  # Beam's temporary tables
    ]
    # By prefix: the rest of a launch id was drawn in the job, and again if a step was retried before it was kept.
    for table in client.list_tables(f"{project}.{dataset}"):
        if table.table_id.startswith(tuple(prefixes)):
            client.delete_table(table, not_found_ok=True)


def _find_job(client: bigquery.Client, job_id: str) -> Any:
    try:
        return client.get_job(job_id)
    except NotFound:
        return None


def _start_job(
    client: bigquery.Client, job_id: str, start: Callable[[str], Any], sleep: Callable[[float], None]
) -> Any:
    try:
        return start(job_id)
    except Conflict:  # Submitted a moment ago, by a request whose answer was lost or by a duplicate of this step.
        pass
    # jobs.get may say 404 for some seconds: https://github.com/googleapis/python-bigquery/issues/2134
    for pause in _UNTIL_VISIBLE:
        sleep(pause)
        if job := _find_job(client, job_id):
            return job
    raise PublishError(f"BigQuery says that job {job_id} exists, but does not show it; start the job again")


def _published(client: bigquery.Client, launch: str) -> bool:
    """Whether the first of the launch's transactions has committed, which none does before the audit of all."""
    for attempt in range(ATTEMPTS):
        job = _find_job(client, f"{_PUBLISH}_{launch}_0_{attempt}")
        if job is None:
            return False
        if job.state == "DONE" and not job.error_result:
            return True
    return False


def delete_files(folder: str, older_than: timedelta | None = None, but: str = "") -> None:
    """Deletes the files below a folder: those last changed longer ago, and not those below `but`."""
    found = FileSystems.match([f"{folder}/**"])[0].metadata_list
    latest = time.time() - older_than.total_seconds() if older_than else None
    paths = [
        file.path
        for file in found
        if (latest is None or (file.last_updated_in_seconds and file.last_updated_in_seconds < latest))
        and not (but and file.path.startswith(f"{but}/"))
    ]
    if paths:
        FileSystems.delete(paths)
