"""What is compared, and what travels between the steps: descriptions and partial results, never a vector per id."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from google.cloud import bigquery

from beam_pipeline.bigquery.tables import Destination
from beam_pipeline.comparison.measures import Distribution, Nearest, Totals
from beam_pipeline.comparison.tables import Pair

JOB_NAME = "compare"
"""First part of the name of a job that was not given one."""

READ_ROWS = "compare-rows"
"""Counter of ids that were measured."""

MOVER_NEIGHBOURS = 5
"""Nearest items before and after that are kept of an id that moved far."""

FILES, FACTS = "files", "facts"
"""Tags of outputs beside the main one."""


@dataclass(frozen=True)
class Comparison:
    """What is compared, and where the results go.

    Attributes:
        destination: the tables.
        pairs: oldest first.
        users: the tower whose ids are recommended to; None if there is none.
        items: the tower whose ids are recommended; None if there is none.
        temp_location: `gs://` folder for files.
        launch_prefix: of every launch id of this pipeline; the launcher finds by it what a failed launch has left.
        job_name: of the Beam job, for the results.
        ids: towers of which a row per id is published.
        k: neighbours and recommendations that are compared.
        queries: ids that are sampled for them.
        top: ids that moved farthest and are kept.
        cosine: scores are cosines, not dot products.
        labels: queries for (id, label, group_name), by tower.
        require_partition_filter: for tables that are created: queries must name a partition.
        kms_key: Cloud KMS key of every table and job; None leaves it to the dataset.
        fail_if_unusual: the job fails after it has published, if a pair is unusual.
    """

    destination: Destination
    pairs: tuple[Pair, ...]
    users: str | None
    items: str | None
    temp_location: str
    launch_prefix: str
    job_name: str = JOB_NAME
    ids: tuple[str, ...] = ()
    k: int = 10
    queries: int = 2000
    top: int = 25
    cosine: bool = False
    labels: Mapping[str, str] = field(default_factory=dict)
    require_partition_filter: bool = False
    kms_key: str | None = None
    fail_if_unusual: bool = False

    @property
    def towers(self) -> tuple[str, ...]:
        """Names of the towers."""
        return tuple(tower for tower in (self.users, self.items) if tower)

    def other(self, tower: str) -> str | None:
        """Returns the other tower, if there is one."""
        return next((name for name in self.towers if name != tower), None)

    @property
    def encryption(self) -> bigquery.EncryptionConfiguration | None:
        """For every table that is created and every job that keeps a result."""
        return bigquery.EncryptionConfiguration(self.kms_key) if self.kms_key else None

    @property
    def bucket(self) -> str:
        """Name of the temp location's bucket."""
        return self.temp_location.removeprefix("gs://").split("/")[0]

    @property
    def all_files(self) -> str:
        """Folder for the files of every comparison with this temp location."""
        return f"{self.temp_location.rstrip('/')}/embedding_comparisons"

    @property
    def files(self) -> str:
        """Folder for the files of this pipeline."""
        return f"{self.all_files}/{self.launch_prefix}"

    def new_file(self, launch: str, name: str) -> str:
        """Returns a path that nothing else writes to, not even a retry."""
        return f"{self.files}/{launch}/{uuid.uuid4().hex}_{name}"


@dataclass(frozen=True)
class Joined:
    """A tower's ids of both trainings, in a staging table.

    Attributes:
        launch: whose table it is.
        pair: number of the pair.
        tower: the tower.
        table: `project.dataset.table`.
        rows: ids.
        common, before, after: ids in both trainings, and in each.
        dimension_before, dimension_after: values in a vector.
    """

    launch: str
    pair: int
    tower: str
    table: str
    rows: int
    common: int
    before: int
    after: int
    dimension_before: int
    dimension_after: int


@dataclass(frozen=True)
class Facts:
    """What is known of a pair before its ids are measured.

    Attributes:
        joined: by tower.
        fit_path: file of the `Fit`.
        queries_path: file of the sampled ids and their vectors.
        score_correlation: of all scores; None without two towers.
        unrelated: by tower, the distance of ids that have nothing to do with each other.
        turn: the rotation.
        notes: by tower, why a value is missing.
    """

    joined: dict[str, Joined]
    fit_path: str
    queries_path: str
    score_correlation: float | None
    unrelated: dict[str, float]
    turn: np.ndarray | None
    notes: dict[str, str]


@dataclass(frozen=True)
class Stream:
    """A part of a joined table that is read by one worker.

    Attributes:
        joined: the table.
        name: of the stream in the Storage Read API.
        path: file with what its rows are compared by.
    """

    joined: Joined
    name: str
    path: str


@dataclass(frozen=True)
class Measured:
    """What is known of a pair before neighbours are looked for.

    Attributes:
        facts: from before.
        totals: by tower.
        asked: by tower, how many sampled ids are asked; those that moved far come after them.
    """

    facts: Facts
    totals: dict[str, Totals]
    asked: dict[str, int]


Found = dict[tuple[str, str], Nearest]
"""The nearest items by (tower of the queries, "before" or "after")."""


@dataclass(frozen=True)
class Finished:
    """The results of a pair.

    Attributes:
        pair: its number.
        launch: of the job.
        rows: by tower, columns of the comparison table.
        spread: by tower, what is measured against the previous pair's 99th percentile.
    """

    pair: int
    launch: str
    rows: dict[str, dict[str, Any]]
    spread: dict[str, Distribution]


def query(client: bigquery.Client, comparison: Comparison, sql: str, *parameters: Any) -> list[tuple[Any, ...]]:
    """Returns the rows of a query."""
    # BigQuery keeps results for a day, under the key as well.
    config = bigquery.QueryJobConfig(
        query_parameters=list(parameters), destination_encryption_configuration=comparison.encryption
    )
    return [row.values() for row in client.query_and_wait(sql, job_config=config)]
