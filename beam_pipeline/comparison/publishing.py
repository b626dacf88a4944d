"""The steps that write: prepare, load, shape, publish, clean, gate; and what a launcher removes if they fail.

Each can be done again, anywhere, at any time. A launch has an id that was materialised before anything uses it: names
of staging tables, of files and of BigQuery's jobs carry it, and a job that is there already is waited for, not
repeated. Readers see the result tables alone, and those change in one transaction per pair.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime

from apache_beam.io.filesystem import CompressionTypes
from apache_beam.io.filesystems import FileSystems
from apache_beam.metrics.metric import Lineage
from google.api_core.exceptions import NotFound
from google.cloud import bigquery

from beam_pipeline.bigquery import publication
from beam_pipeline.bigquery.publication import LABELS, STAGING_LIFE
from beam_pipeline.bigquery.tables import PARTITION_COLUMN, split_name
from beam_pipeline.comparison import tables
from beam_pipeline.comparison.results import Percentile, percentiles, previous, require_usual
from beam_pipeline.comparison.work import Comparison, Finished, query
from beam_pipeline.errors import AuditError, IncompatibleTableError

_MOST_FILES = 10_000  # of one load job


def prepare(client: bigquery.Client, comparison: Comparison, launch: str) -> Iterator[str]:
    """Creates the launch's staging tables, which expire by themselves; yields the launch."""
    destination = comparison.destination
    wanted = {tables.staged_comparison(destination, launch): tables.STAGED_COMPARISON_SCHEMA}
    for tower in comparison.ids:
        wanted[tables.staged_change(destination, tower, launch)] = tables.staged_change_schema(tower)
    for name, schema in wanted.items():
        table = bigquery.Table(name, schema=schema)
        table.labels = LABELS
        table.encryption_configuration = comparison.encryption
        # Never the dataset's default, which may be shorter than a job or longer than anybody wants to pay for.
        table.expires = datetime.now(UTC) + STAGING_LIFE
        client.create_table(table, exists_ok=True)
    yield launch


def load(
    client: bigquery.Client,
    comparison: Comparison,
    work: tuple[None, Iterable[Finished]],
    files: Iterable[tuple[str, str]],
) -> Iterator[str]:
    """Loads results and ids into the staging tables and counts them; all pairs in, the launch out.

    Raises:
        AuditError: rows are missing or too many.
    """
    finished = sorted(work[1], key=lambda one: one.pair)
    launch = finished[0].launch
    destination = comparison.destination
    _compare_with_previous(client, comparison, finished)
    lines = [json.dumps({"pair": one.pair, **row}) for one in finished for row in one.rows.values()]
    path = comparison.new_file(launch, "results.json")
    with FileSystems.create(path, "application/json", compression_type=CompressionTypes.UNCOMPRESSED) as file:
        file.write("".join(f"{line}\n" for line in lines).encode())
    schema = tables.STAGED_COMPARISON_SCHEMA
    _load_files(client, comparison, launch, tables.staged_comparison(destination, launch), [path], "JSON", schema)
    by_tower: dict[str, list[str]] = {tower: [] for tower in comparison.ids}
    for tower, file_path in files:
        by_tower[tower].append(file_path)
    for tower, paths in by_tower.items():
        name = tables.staged_change(destination, tower, launch)
        if len(paths) > _MOST_FILES:
            raise AuditError(f"tower {tower!r}: {len(paths):,} files, and a load job takes {_MOST_FILES:,}")
        if paths:
            _load_files(client, comparison, launch, name, sorted(paths), "PARQUET", tables.staged_change_schema(tower))
        found = {pair: (rows, ids) for pair, rows, ids in query(client, comparison, tables.audit_sql(name, tower))}
        for one in finished:
            row = one.rows[tower]
            wanted = row["ids_common"] + row["ids_added"] + row["ids_removed"]
            if found.get(one.pair, (0, 0)) != (wanted, wanted):
                raise AuditError(
                    f"tower {tower!r}: {found.get(one.pair, (0, 0))[0]:,} rows were loaded of {wanted:,} ids; nothing "
                    "was published: start the job again, and report it if it happens twice"
                )
    yield launch


def _compare_with_previous(client: bigquery.Client, comparison: Comparison, finished: Sequence[Finished]) -> None:
    """Adds the share of ids above the previous pair's 99th percentile, of this job or published before."""
    last = max(pair.after.train_date for pair in comparison.pairs)
    known: list[Percentile] = percentiles(client, comparison.destination, last)
    # A pair that is compared again is not measured against its own earlier result.
    compared = {(pair.before.run_id, pair.after.run_id) for pair in comparison.pairs}
    known = [each for each in known if (each.before_run, each.after_run) not in compared]
    for one in finished:
        pair = comparison.pairs[one.pair]
        for tower, row in one.rows.items():
            earlier = previous(known, tower, pair)
            row["unusual_above"] = earlier and earlier.value
            row["unusual_share"] = one.spread[tower].share_above(earlier.value) if earlier else None
            p99 = one.spread[tower].quantile(0.99)
            if p99 is not None:
                known.append(
                    Percentile(
                        tower, pair.after.train_date, pair.before.train_date, pair.after.run_id, pair.before.run_id, p99
                    )
                )


def _load_files(
    client: bigquery.Client,
    comparison: Comparison,
    launch: str,
    table: str,
    paths: Sequence[str],
    kind: str,
    schema: Sequence[bigquery.SchemaField],
) -> None:
    formats = {
        "JSON": bigquery.SourceFormat.NEWLINE_DELIMITED_JSON,
        "PARQUET": bigquery.SourceFormat.PARQUET,
    }

    def start(job_id: str) -> bigquery.LoadJob:
        config = bigquery.LoadJobConfig(
            source_format=formats[kind],
            schema=schema,
            # However often it runs, the same rows, once.
            write_disposition=bigquery.WriteDisposition.WRITE_TRUNCATE,
            create_disposition=bigquery.CreateDisposition.CREATE_NEVER,
            destination_encryption_configuration=comparison.encryption,
            labels=LABELS,
        )
        return client.load_table_from_uri(list(paths), table, job_id=job_id, job_config=config)

    name = table.rsplit(".", 1)[1].split("_staging_")[0]
    publication.run_job(client, f"compare_embeddings_{launch}_load_{name}", start, "the comparison")


def shape(client: bigquery.Client, comparison: Comparison, launch: str) -> Iterator[str]:
    """Creates the result tables, or adds the columns that they lack; yields the launch.

    Raises:
        IncompatibleTableError: a table exists that cannot be used.
    """
    destination = comparison.destination
    results = bigquery.Table(tables.comparison_table(destination), schema=tables.COMPARISON_SCHEMA)
    results.description = "How a tower's embeddings changed between two trainings; one row per pair and tower."
    wanted = [results]
    for tower in comparison.ids:
        table = bigquery.Table(tables.change_table(destination, tower), schema=tables.change_schema(tower))
        table.description = f"How the embedding of each {tower} changed between two trainings."
        table.clustering_fields = [f"{tower}_id"]
        wanted.append(table)
    for table in wanted:
        table.time_partitioning = bigquery.TimePartitioning(type_="DAY", field=PARTITION_COLUMN)
        table.require_partition_filter = comparison.require_partition_filter or None
        existing = publication.create_table(client, table, comparison.encryption)
        if found := differences(existing, table.schema):
            raise IncompatibleTableError(
                f"table {table.reference} cannot be used: {'; '.join(found)}; rename it, or choose another name with "
                "--table_prefix or --dataset"
            )
        publication.add_columns(client, existing, table.schema)
    publication.ensure_lock(client, destination, comparison.encryption)
    yield launch


def differences(table: bigquery.Table, wanted: Sequence[bigquery.SchemaField]) -> list[str]:
    """Returns what keeps a table from being a result table, in words; missing columns are none."""
    found = []
    partitioning = table.time_partitioning
    if partitioning is None or (partitioning.type_, partitioning.field) != ("DAY", PARTITION_COLUMN):
        found.append(f"it is not partitioned by DAY({PARTITION_COLUMN})")
    existing = {column.name.lower(): column for column in table.schema}
    for column in wanted:
        other = existing.get(column.name.lower())
        if other is None:
            continue
        names = {"FLOAT64": "FLOAT", "INT64": "INTEGER", "STRUCT": "RECORD"}
        kinds = [(names.get(c.field_type, c.field_type), c.mode == "REPEATED") for c in (other, column)]
        if kinds[0] != kinds[1]:
            found.append(
                f"column {column.name} is {other.mode} {other.field_type}, not {column.mode} {column.field_type}"
            )
    return found


def publish(client: bigquery.Client, comparison: Comparison, launch: str) -> Iterator[str]:
    """Makes the results of each pair visible in one transaction; what was done before is found, not repeated."""
    destination = comparison.destination
    changed = [tower for tower in comparison.towers if _exists(client, tables.change_table(destination, tower))]
    for number, pair in enumerate(comparison.pairs):
        script = tables.publish_script(destination, number, pair, launch, comparison.ids, changed)
        publication.run_script(
            client, f"compare_embeddings_{launch}_publish_{number}", script, f"the comparison of {pair}"
        )
    for tower in comparison.towers:
        Lineage.sources().add("bigquery", *split_name(destination.table(tower)))
    written = [tables.comparison_table(destination), *(tables.change_table(destination, one) for one in comparison.ids)]
    for name in written:
        Lineage.sinks().add("bigquery", *split_name(name))
    yield launch


def clean(client: bigquery.Client, comparison: Comparison, launch: str) -> Iterator[str]:
    """Drops the launch's staging tables and files, and files that dead launches left; yields the launch.

    What cannot be deleted is logged and counted: it fails no job that has published.
    """
    destination = comparison.destination
    names = [tables.staged_comparison(destination, launch)]
    for tower in comparison.towers:
        names.append(tables.staged_change(destination, tower, launch))
        names += [tables.joined_table(destination, tower, launch, number) for number in range(len(comparison.pairs))]
    for name in names:
        with publication.left_if_denied(f"table {name}"):
            client.delete_table(name, not_found_ok=True)
    with publication.left_if_denied(f"folder {comparison.files}"):
        publication.delete_files(comparison.files)
    with publication.left_if_denied(f"files of earlier jobs in {comparison.all_files}"):
        publication.delete_files(comparison.all_files, older_than=STAGING_LIFE)
    yield launch


def gate(client: bigquery.Client, comparison: Comparison, launch: str) -> Iterator[str]:
    """Fails the job if a pair is unusual, which is published by then.

    Raises:
        UnusualError: one is.
    """
    if comparison.fail_if_unusual:
        known = percentiles(client, comparison.destination, max(pair.after.train_date for pair in comparison.pairs))
        require_usual(known, comparison.pairs)
    yield launch


def discard(client: bigquery.Client, comparison: Comparison, launch_prefix: str | None = None) -> None:
    """Removes what a failed launch has left, for a launcher that is still there; a missing thing is fine.

    Args:
        client: for the dataset.
        comparison: what was to be compared.
        launch_prefix: of the launches; by default this comparison's, and with "" all launches.
    """
    destination = comparison.destination
    prefix = comparison.launch_prefix if launch_prefix is None else launch_prefix
    staging = tables.staged_comparison(destination, prefix)
    dataset, first = staging.rsplit(".", 1)
    kinds = [
        first,
        *(
            name.rsplit(".", 1)[1].removesuffix("_0")
            for tower in comparison.towers
            for name in (
                tables.staged_change(destination, tower, prefix),
                tables.joined_table(destination, tower, prefix, 0),
            )
        ),
    ]
    for table in client.list_tables(dataset):
        if table.table_id.startswith(tuple(kinds)):
            client.delete_table(table, not_found_ok=True)
    publication.delete_files(comparison.files if prefix else comparison.all_files)


def _exists(client: bigquery.Client, name: str) -> bool:
    try:
        client.get_table(name)
    except NotFound:
        return False
    return True
