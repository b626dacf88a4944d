"""What the report says of --vector_index: what stands in the way of an index, and how far BigQuery has built it."""

from __future__ import annotations

from collections import Counter
from datetime import date

from google.api_core.exceptions import Forbidden, GoogleAPICallError, NotFound
from google.cloud import bigquery

from beam_pipeline import emulators
from beam_pipeline.bigquery import history, indexes
from beam_pipeline.bigquery.publication import Publication
from beam_pipeline.errors import ConfigError, DimensionChangedError
from beam_pipeline.launch.findings import Findings, first_line


def examine(findings: Findings, client: bigquery.Client, publication: Publication) -> None:
    """Adds what a person should know about the index of each tower's history, if there is to be one.

    Args:
        findings: the report.
        client: for the dataset.
        publication: what is to be published.
    """
    distance = publication.vector_index
    if not distance:
        return
    if emulators.emulated():
        findings.note("index", "none is created: emulators have no vector indexes")
        return
    for tower in publication.towers:
        try:
            _examine(findings, client, publication, tower, distance)
            if publication.latest_tables:
                _examine(findings, client, publication, tower, distance, latest=True)
        except GoogleAPICallError as error:
            findings.stop(f"index {tower}", ConfigError(f"BigQuery refuses the vector index: {first_line(error)}"))


def _examine(
    findings: Findings,
    client: bigquery.Client,
    publication: Publication,
    tower: str,
    distance: str,
    *,
    latest: bool = False,
) -> None:
    destination = publication.destination
    check, name = f"index {tower}", destination.latest(tower) if latest else destination.table(tower)
    published = {training.run.train_date: training.towers[tower].matrix for training in publication.trainings}
    sizes = {day: matrix.rows * matrix.dimension * 8 for day, matrix in published.items()}
    size = sizes[max(sizes)] if latest else sum(sizes.values())
    try:
        table = client.get_table(name)
    except NotFound:
        findings.ok(check, f"{distance}, will be created with {name}")
        _examine_size(findings, check, name, size)
        return
    if not latest:  # A latest table is replaced whole.
        size += table.num_bytes or 0
        lengths = history.vector_lengths(client, destination, tower)
        _examine_lengths(findings, check, name, lengths | {day: matrix.dimension for day, matrix in published.items()})
    found = indexes.find_indexes(client, name)
    for index in found:
        if index.distance != distance:
            findings.stop(
                check,
                ConfigError(
                    f"index {index.name} of {name} is for {index.distance}, not {distance}, and a column has one: "
                    f"choose --vector_index={index.distance}, or DROP VECTOR INDEX {index.name} ON `{name}`"
                ),
            )
        elif index.status == "ACTIVE":
            findings.ok(check, f"{index.name}: {distance}, {index.coverage} % of the rows are indexed")
        else:
            findings.note(check, f"{index.name}: {index.status.lower()}: {index.reason or 'BigQuery gives no reason'}")
    if not found:
        # Says what the edition, a quota or a missing permission would.
        dry = bigquery.QueryJobConfig(dry_run=True)
        try:
            client.query(indexes.create_index_sql(name, tower, distance, partitioned=not latest), job_config=dry)
            findings.ok(check, f"{distance}, will be created")
        except Forbidden:  # The workers' account creates it, where they have one of their own.
            findings.note(check, f"{distance}, will be created: this account may not ask whether BigQuery allows it")
    _examine_size(findings, check, name, size)


def _examine_size(findings: Findings, check: str, name: str, size: int) -> None:
    if size < indexes.LEAST_BYTES:
        findings.note(
            check,
            f"{name} will have {size / 1e6:.1f} MB: BigQuery builds no index below 10 MB, and searches compare with "
            "every row until then",
        )


def _examine_lengths(findings: Findings, check: str, name: str, of_days: dict[date, int]) -> None:
    if len({*of_days.values()}) < 2:
        return
    ((usual, _),) = Counter(of_days.values()).most_common(1)
    day, length = next((day, length) for day, length in sorted(of_days.items()) if length != usual)
    findings.stop(
        check,
        DimensionChangedError(
            f"partition {day} of {name} holds vectors of {length} values and others hold vectors of {usual}: an index "
            f"needs one length in the column; move that partition to another table, or leave out --vector_index"
        ),
    )
