"""The two result tables, the staging tables of a comparison, and the SQL that touches them.

Functions only; nothing here talks to BigQuery.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from google.cloud import bigquery

from beam_pipeline.bigquery.history import Trained, labels_sql
from beam_pipeline.bigquery.tables import PARTITION_COLUMN, Destination, literal, text


@dataclass(frozen=True)
class Pair:
    """Two trainings, the earlier one first."""

    before: Trained
    after: Trained

    def __str__(self) -> str:
        return f"{self.before} → {self.after}"


def comparison_table(destination: Destination) -> str:
    """Returns `project.dataset.table` of the results, one row per pair and tower."""
    return f"{destination.project}.{destination.dataset}.{destination.prefix}_embedding{destination.suffix}_comparison"


def change_table(destination: Destination, tower: str) -> str:
    """Returns `project.dataset.table` of what became of each id of a tower."""
    return f"{destination.table(tower)}_change"


def staged_comparison(destination: Destination, launch: str) -> str:
    """Returns the staging table of the results."""
    return f"{_staging(destination)}_embedding_comparison_staging_{launch}"


def staged_change(destination: Destination, tower: str, launch: str) -> str:
    """Returns the staging table of a tower's ids."""
    return f"{_staging(destination)}_{tower}_embedding_change_staging_{launch}"


def joined_table(destination: Destination, tower: str, launch: str, pair: int) -> str:
    """Returns the staging table that holds both vectors of each id of a tower."""
    return f"{_staging(destination)}_{tower}_embedding_joined_staging_{launch}_{pair}"


def _staging(destination: Destination) -> str:
    dataset = destination.staging_dataset or f"{destination.project}.{destination.dataset}"
    return f"{dataset}.{destination.prefix}"


def _record(name: str, description: str, *fields: tuple[str, str, str]) -> bigquery.SchemaField:
    return bigquery.SchemaField(
        name, "RECORD", mode="REPEATED", description=description, fields=[_field(*one) for one in fields]
    )


def _field(name: str, type_: str, description: str) -> bigquery.SchemaField:
    repeated = type_.endswith("[]")
    mode = "REPEATED" if repeated else "NULLABLE"
    return bigquery.SchemaField(name, type_.removesuffix("[]"), mode=mode, description=description)


def _quantiles(name: str, subject: str) -> list[bigquery.SchemaField]:
    return [
        _field(f"{name}_{key}", "FLOAT", f"{subject}: {words}, over the ids in both trainings")
        for key, words in (
            ("p50", "median"),
            ("p90", "90th percentile"),
            ("p99", "99th percentile"),
            ("mean", "mean"),
        )
    ]


_PAIR_SCHEMA = [
    _field("published_at", "TIMESTAMP", "When the comparison was committed"),
    _field("train_date", "DATE", "Partition of the later training"),
    _field("mlflow_experiment_name", "STRING", "Name of the MLflow experiment of the later training"),
    _field("mlflow_run_id", "STRING", "MLflow run of the later training"),
    _field("mlflow_run_name", "STRING", "Name of that run"),
    _field("previous_train_date", "DATE", "Partition of the earlier training"),
    _field("previous_mlflow_run_id", "STRING", "MLflow run of the earlier training"),
    _field("previous_mlflow_run_name", "STRING", "Name of that run"),
]

_NEAREST = ("id", "STRING", "The id"), ("label", "STRING", "Its label, if labels were given")


def _nearest(name: str, when: str) -> bigquery.SchemaField:
    return _record(
        name,
        f"Five nearest items by cosine {when}, nearest first; for users the five items recommended to them",
        *_NEAREST,
    )


COMPARISON_SCHEMA = [
    *_PAIR_SCHEMA,
    _field("tower", "STRING", "The tower"),
    _field("table_name", "STRING", "Its history, as project.dataset.table"),
    _field("ids_common", "INTEGER", "Ids in both trainings"),
    _field("ids_added", "INTEGER", "Ids that only the later training has"),
    _field("ids_removed", "INTEGER", "Ids that only the earlier training has"),
    _field("dimension", "INTEGER", "Values in a vector of the later training"),
    _field("previous_dimension", "INTEGER", "Values in a vector of the earlier training"),
    _field("score", "STRING", "What the model serves, dot or cosine; scores and recommendations are of this kind"),
    *_quantiles("score_change", "One minus the correlation of an id's scores before and after"),
    *_quantiles("distance", "One minus the cosine of an id's vectors, those after rotated onto those before"),
    _field("distance_unrelated", "FLOAT", "Mean distance if ids had nothing to do with each other, in this pair"),
    _field("note", "STRING", "Why score change or distance is missing"),
    _field("unusual_share", "FLOAT", "Share of ids with a score change above the previous pair's 99th percentile"),
    _field("unusual_above", "FLOAT", "That percentile; a distance, where there is one tower alone"),
    _field("neighbours_kept", "FLOAT", "Share of the k nearest items by cosine that stayed, mean over sampled items"),
    _field("neighbours_kept_error", "FLOAT", "Standard error of that mean"),
    _field("neighbours_k", "INTEGER", "k of the neighbours"),
    _field("neighbours_queries", "INTEGER", "Items sampled for them"),
    _field("recommendations_kept", "FLOAT", "Share of the k items with the highest scores that stayed, over users"),
    _field("recommendations_kept_error", "FLOAT", "Standard error of that mean"),
    _field("recommendations_k", "INTEGER", "k of the recommendations"),
    _field("recommendations_queries", "INTEGER", "Users sampled for them"),
    _field("distinct_items_before", "INTEGER", "Different items recommended to those users before"),
    _field("distinct_items_after", "INTEGER", "Different items recommended to those users after"),
    _field("score_correlation", "FLOAT", "Correlation of all scores before with all scores after, not centred"),
    _field("norm_ratio", "FLOAT", "Mean norm after by mean norm before, of the ids in both trainings"),
    _field("norm_mean_before", "FLOAT", "Mean Euclidean norm before"),
    _field("norm_mean_after", "FLOAT", "Mean Euclidean norm after"),
    _field("effective_rank_before", "FLOAT", "Dimensions in use before: exponential of the spectrum's entropy"),
    _field("effective_rank_after", "FLOAT", "Dimensions in use after"),
    _field("mean_cosine_before", "FLOAT", "Mean cosine of two ids before: 0 a sphere, 1 a cone"),
    _field("mean_cosine_after", "FLOAT", "Mean cosine of two ids after"),
    _field("zero_vectors_before", "INTEGER", "Vectors of zeros alone before"),
    _field("zero_vectors_after", "INTEGER", "Vectors of zeros alone after"),
    _field("score_change_histogram", "INTEGER[]", "Ids by score change, in bins of 0.02 from 0 to 2"),
    _field("distance_histogram", "INTEGER[]", "Ids by distance, in bins of 0.02 from 0 to 2"),
    _field(
        "rotation",
        "FLOAT[]",
        "Matrix R, row by row, that brings vectors of the later training (as a row, times R) to those of the earlier "
        "one; both towers have the same",
    ),
    _field("spectrum_before", "FLOAT[]", "Eigenvalues of the covariance as shares of their sum, before"),
    _field("spectrum_after", "FLOAT[]", "Eigenvalues of the covariance as shares of their sum, after"),
    _record(
        "distance_and_score_change",
        "Ids counted by both, in squares of 0.05",
        ("distance", "FLOAT", "Middle of the square"),
        ("score_change", "FLOAT", "Middle of the square"),
        ("ids", "INTEGER", "Ids in it"),
    ),
    _record(
        "norms",
        "Ids counted by their norms, in bins of an eighth of a doubling",
        ("before", "FLOAT", "Middle of the bin"),
        ("after", "FLOAT", "Middle of the bin"),
        ("ids", "INTEGER", "Ids in it"),
    ),
    _record(
        "by_group",
        "Score change by group, if labels were given",
        ("group_name", "STRING", "The group"),
        ("ids", "INTEGER", "Its ids that have a score change"),
        ("score_change_mean", "FLOAT", "Their mean score change"),
        ("score_change_p50", "FLOAT", "Their median score change"),
        ("score_change_max", "FLOAT", "Their largest score change"),
    ),
    bigquery.SchemaField(
        "most_moved",
        "RECORD",
        mode="REPEATED",
        description="The ids with the largest score change, largest first; by distance, where there is one tower alone",
        fields=[
            _field("id", "STRING", "The id"),
            _field("label", "STRING", "Its label, if labels were given"),
            _field("group_name", "STRING", "Its group, if labels were given"),
            _field("score_change", "FLOAT", "Its score change"),
            _field("distance", "FLOAT", "Its distance"),
            _field("norm_before", "FLOAT", "Its norm before"),
            _field("norm_after", "FLOAT", "Its norm after"),
            _nearest("nearest_before", "before"),
            _nearest("nearest_after", "after"),
        ],
    ),
    _field("added_examples", "STRING[]", "Some of the ids that were added"),
    _field("removed_examples", "STRING[]", "Some of the ids that were removed"),
    _field("job_name", "STRING", "Beam job"),
    _field("launch", "STRING", "Launch of the job; BigQuery's job ids carry it"),
    _field("pipeline_version", "STRING", "Version of beam_pipeline"),
]

PAIR_COLUMN = bigquery.SchemaField("pair", "INTEGER")
"""Of staging tables: the number of the pair in its job."""

STAGED_COMPARISON_SCHEMA = [PAIR_COLUMN, *COMPARISON_SCHEMA]

CHANGE_COLUMNS = ("score_change", "distance", "norm_before", "norm_after")


def change_schema(tower: str) -> list[bigquery.SchemaField]:
    """Returns the columns of a tower's change table."""
    return [*_PAIR_SCHEMA, *_changes(tower)]


def staged_change_schema(tower: str) -> list[bigquery.SchemaField]:
    """Returns the columns of its staging table: what differs from row to row."""
    return [PAIR_COLUMN, *_changes(tower)]


def _changes(tower: str) -> list[bigquery.SchemaField]:
    return [
        _field(f"{tower}_id", "STRING", f"The {tower}"),
        _field("score_change", "FLOAT", "One minus the correlation of its scores before and after; 0 the same"),
        _field("distance", "FLOAT", "One minus the cosine of its vectors, the later one rotated; 0 the same"),
        _field("norm_before", "FLOAT", "Euclidean norm of its vector before; NULL if the id was added"),
        _field("norm_after", "FLOAT", "Euclidean norm of its vector after; NULL if the id was removed"),
    ]


# The join.


def join_sql(destination: Destination, tower: str, pair: Pair, labels: str | None = None) -> str:
    """Returns a query for all ids of a tower with their vectors of both trainings."""
    table = f"`{destination.table(tower)}`"

    def side(trained: Trained) -> str:
        return (
            f"(SELECT {tower}_id AS id, {tower}_embedding AS vector FROM {table} "
            f"WHERE {PARTITION_COLUMN} = {literal(trained.train_date)} AND mlflow_run_id = {text(trained.run_id)})"
        )

    label = (
        "label.label, label.group_name"
        if labels
        else "CAST(NULL AS STRING) AS label, CAST(NULL AS STRING) AS group_name"
    )
    join = f"\nLEFT JOIN {labels_sql(labels)} AS label ON label.id = joined.id" if labels else ""
    return (
        f"SELECT joined.*, {label} FROM (\n"
        "SELECT COALESCE(earlier.id, later.id) AS id, FARM_FINGERPRINT(COALESCE(earlier.id, later.id)) AS sample, "
        "earlier.vector AS before_vector, later.vector AS after_vector, "
        "IFNULL(ARRAY_LENGTH(earlier.vector), 0) AS before_length, "
        "IFNULL(ARRAY_LENGTH(later.vector), 0) AS after_length\n"
        f"FROM {side(pair.before)} AS earlier\n"
        f"FULL OUTER JOIN {side(pair.after)} AS later ON later.id = earlier.id\n"
        f") AS joined{join}"
    )


def create_joined_sql(name: str, select: str, expires: datetime, kms_key: str | None, labels: dict[str, str]) -> str:
    """Returns the statement that creates a joined table, the same one however often it runs.

    It is clustered by the hash of the id, so that a sample is read without the rest.
    """
    options = [f"expiration_timestamp = TIMESTAMP '{expires:%Y-%m-%d %H:%M:%S}+00'"]
    options.append(f"labels = [{', '.join(f'({literal(k)}, {literal(v)})' for k, v in labels.items())}]")
    if kms_key:
        options.append(f"kms_key_name = '{kms_key}'")
    return f"CREATE OR REPLACE TABLE `{name}` CLUSTER BY sample OPTIONS ({', '.join(options)}) AS\n{select}"


def joined_sql(name: str) -> str:
    """Returns a query for what a joined table holds; it reads no vector."""
    return (
        "SELECT COUNT(*), COUNT(DISTINCT id), COUNTIF(before_length > 0 AND after_length > 0), "
        "COUNTIF(before_length > 0), COUNTIF(after_length > 0), "
        "MIN(NULLIF(before_length, 0)), MAX(before_length), MIN(NULLIF(after_length, 0)), MAX(after_length) "
        f"FROM `{name}`"
    )


def joined_labels_sql(name: str) -> str:
    """Returns a query for the labels of some ids; parameter: ids (ARRAY<STRING>)."""
    return (
        f"SELECT id, label, group_name FROM `{name}` "
        "WHERE id IN UNNEST(@ids) AND (label IS NOT NULL OR group_name IS NOT NULL)"
    )


SAMPLE_SPACE = 1 << 64


def sample_restriction(wanted: int, of: int) -> str:
    """Returns a filter that about so many rows pass, and rarely fewer: those with the smallest hashes of their ids."""
    share = min(1.0, (1.05 * wanted + 1000) / max(of, 1))
    return f"sample <= {min((1 << 63) - 1, int(share * SAMPLE_SPACE) - (1 << 63))}"


# Publication.


def audit_sql(name: str, tower: str) -> str:
    """Returns a query for rows and distinct ids of each pair in the staging table of a tower's ids."""
    return f"SELECT pair, COUNT(*), COUNT(DISTINCT {tower}_id) FROM `{name}` GROUP BY pair"


def publish_script(
    destination: Destination,
    number: int,
    pair: Pair,
    launch: str,
    changed: Sequence[str],
    replaced: Sequence[str],
) -> str:
    """Returns the one transaction that makes a pair's results visible, in place of those that it had.

    Args:
        destination: where to.
        number: of the pair in its job.
        pair: the trainings.
        launch: whose staging tables are read.
        changed: towers whose ids are published.
        replaced: towers that have a change table, whose earlier rows of this pair are deleted.
    """
    of_pair = (
        f"{PARTITION_COLUMN} = {literal(pair.after.train_date)} AND mlflow_run_id = {text(pair.after.run_id)} "
        f"AND previous_mlflow_run_id = {text(pair.before.run_id)}"
    )
    columns = [column.name for column in COMPARISON_SCHEMA]
    values = ["CURRENT_TIMESTAMP()" if name == "published_at" else name for name in columns]
    statements = [
        "BEGIN TRANSACTION",
        f"UPDATE `{destination.lock}` SET launch = {literal(launch)}, locked_at = CURRENT_TIMESTAMP() WHERE TRUE",
        f"DELETE FROM `{comparison_table(destination)}` WHERE {of_pair}",
        f"INSERT INTO `{comparison_table(destination)}` ({', '.join(columns)}) "
        f"SELECT {', '.join(values)} FROM `{staged_comparison(destination, launch)}` WHERE pair = {number}",
    ]
    statements += [f"DELETE FROM `{change_table(destination, tower)}` WHERE {of_pair}" for tower in replaced]
    constants = {
        "published_at": "CURRENT_TIMESTAMP()",
        "train_date": literal(pair.after.train_date),
        "mlflow_experiment_name": text(pair.after.experiment_name),
        "mlflow_run_id": text(pair.after.run_id),
        "mlflow_run_name": text(pair.after.run_name),
        "previous_train_date": literal(pair.before.train_date),
        "previous_mlflow_run_id": text(pair.before.run_id),
        "previous_mlflow_run_name": text(pair.before.run_name),
    }
    for tower in changed:
        of_ids = ", ".join((f"{tower}_id", *CHANGE_COLUMNS))
        statements.append(
            f"INSERT INTO `{change_table(destination, tower)}` ({', '.join(constants)}, {of_ids}) "
            f"SELECT {', '.join(constants.values())}, {of_ids} "
            f"FROM `{staged_change(destination, tower, launch)}` WHERE pair = {number}"
        )
    statements.append("COMMIT TRANSACTION")
    return "".join(f"{statement};\n" for statement in statements)


# Questions.


def compared_sql(destination: Destination) -> str:
    """Returns a query for the pairs that have a result."""
    return (
        f"SELECT DISTINCT previous_mlflow_run_id, mlflow_run_id FROM `{comparison_table(destination)}` "
        f"WHERE {PARTITION_COLUMN} IS NOT NULL"
    )


def results_sql(destination: Destination) -> str:
    """Returns a query for the results between two dates, oldest first; parameters: first, last (DATE).

    The rotation is left out: a square of the dimension, and nobody looks at it.
    """
    return (
        f"SELECT * EXCEPT (rotation) FROM `{comparison_table(destination)}` "
        f"WHERE {PARTITION_COLUMN} BETWEEN @first AND @last "
        "ORDER BY train_date, previous_train_date, published_at, tower"
    )


def percentiles_sql(destination: Destination) -> str:
    """Returns a query for the 99th percentiles of all earlier pairs; parameter: last (DATE)."""
    return (
        "SELECT tower, train_date, previous_train_date, mlflow_run_id, previous_mlflow_run_id, "
        f"IFNULL(score_change_p99, distance_p99) FROM `{comparison_table(destination)}` "
        f"WHERE {PARTITION_COLUMN} <= @last ORDER BY train_date, previous_train_date, published_at"
    )


def usual_sql(destination: Destination, tower: str) -> str:
    """Returns a query for how much some ids changed in earlier pairs; parameters: first, last (DATE), ids."""
    return (
        f"SELECT {tower}_id, AVG(score_change), COUNT(score_change) FROM `{change_table(destination, tower)}` "
        f"WHERE {PARTITION_COLUMN} >= @first AND {PARTITION_COLUMN} < @last AND {tower}_id IN UNNEST(@ids) "
        f"GROUP BY {tower}_id"
    )
