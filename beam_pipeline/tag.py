"""Tags an MLflow run with what was published of it: table, partition and rows.

The launcher does so with --tag_run where it waits for the job. On Dataflow it does not wait, and workers have no access
to MLflow; there, this command reads the log afterwards:

    python -m beam_pipeline.tag --run_id=4e6f… --env=prod --project=my-project
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from google.api_core.exceptions import GoogleAPICallError, NotFound
from google.cloud import bigquery

from beam_pipeline import command, emulators
from beam_pipeline.bigquery import publication, tables
from beam_pipeline.bigquery.tables import Destination
from beam_pipeline.errors import ConfigError, PublishError
from beam_pipeline.launch import options, session
from beam_pipeline.tracking import auth, runs


def tag(client: bigquery.Client, destination: Destination, run_id: str, tracking_uri: str | None) -> dict[str, str]:
    """Tags the run with its latest publication; returns the tags.

    Raises:
        PublishError: the run was not published.
        TrackingError: MLflow refuses.
    """
    query = bigquery.QueryJobConfig(query_parameters=[bigquery.ScalarQueryParameter("run_id", "STRING", run_id)])
    try:
        rows = [*client.query_and_wait(tables.latest_publication_sql(destination), job_config=query)]
    except NotFound:
        rows = []
    except GoogleAPICallError as error:
        raise PublishError(f"{destination.log} cannot be read: {error.message}") from error
    if not rows:
        raise PublishError(f"run {run_id} is not in {destination.log}: it was not published, or published elsewhere")
    tags = {
        f"embedding.{row.tower}.{name}": str(value)
        for row in rows
        for name, value in (("table", row.table_name), ("partition", row.train_date), ("rows", row.row_count))
    }
    runs.tag_run(run_id, tags, tracking_uri)
    return tags


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = options.base_parser("tag", "Tags an MLflow run with what was published of it.")
    parser.add_argument("--run_id", required=True, help="MLflow run")
    options.add_tracking(parser)
    options.add_destination(parser)
    parser.add_argument("--project", help="Google Cloud project")
    found = parser.parse_args(argv)
    dataset_project, dataset = options.dataset(parser, found)
    return command.exit_code(lambda: _run(found, dataset_project, dataset))


def _run(found: argparse.Namespace, dataset_project: str | None, dataset: str) -> None:
    auth.authorize(found.tracking_uri, found.tracking_audience)
    if emulators.emulated():
        emulators.connect()
    destination = session.find_destination(
        dataset_project or found.project or _default_project(),
        dataset,
        found.table_prefix,
        billing_project=found.project,
        suffix=found.table_suffix,
    )
    tags = tag(publication.make_client(destination), destination, found.run_id, found.tracking_uri)
    for name, value in tags.items():
        print(f"{name:<24} {value}")


def _default_project() -> str:
    try:
        return str(bigquery.Client().project)
    except OSError as error:  # There are credentials, and they name no project.
        raise ConfigError("which project? --project=PROJECT, or --dataset=PROJECT.DATASET") from error


if __name__ == "__main__":
    command.run_process(main)
