"""The session of a launch: the projects that are used and billed, the dataset, and a token that no other launch has."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from apache_beam.options.pipeline_options import GoogleCloudOptions, PipelineOptions
from google.api_core.exceptions import GoogleAPICallError, NotFound
from google.auth.exceptions import GoogleAuthError
from google.cloud import bigquery

from beam_pipeline import command, emulators
from beam_pipeline.bigquery import publication
from beam_pipeline.bigquery.tables import Destination
from beam_pipeline.credentials import credentials
from beam_pipeline.errors import ConfigError, DatasetMissingError
from beam_pipeline.launch.findings import first_line
from beam_pipeline.launch.options import JobConfig


@dataclass(frozen=True)
class Session:
    """What a launch works with, from its beginning to its end.

    Attributes:
        project: --project, or what stands for it: Beam's option of that name.
        destination: the tables.
        client: for the destination.
        temp_location: `gs://` folder for files on the way.
        token: part of the name of everything that this launch creates.
    """

    project: str | None
    destination: Destination
    client: bigquery.Client
    temp_location: str
    token: str


@contextmanager
def open_session(config: JobConfig, given: PipelineOptions, *, create_dataset: bool) -> Iterator[Session]:
    """Opens the session of a job; gives it, with the embedded warehouse running if it was asked for.

    Args:
        config: what was asked for.
        given: Beam's options, as they were given.
        create_dataset: create the dataset in the embedded warehouse if it is not there; BigQuery's is never created.

    Raises:
        ConfigError: a project or a temp location is missing, or BigQuery did not answer.
        DatasetMissingError: there is no such dataset.
        WarehouseError: the emulators do not start.
    """
    command.end_start_up()  # Beam, Google's clients and MLflow are imported.
    cloud = given.view_as(GoogleCloudOptions)
    with ExitStack() as stack:
        temp_location = cloud.temp_location or ""
        if config.warehouse:
            temp_location = stack.enter_context(emulators.Warehouse(config.warehouse)).temp_location
        emulators.connect_if_emulated()
        job_project, project = find_projects(cloud.project, config.dataset_project)
        if not temp_location.startswith("gs://"):
            raise ConfigError("files on the way need a bucket: --temp_location=gs://BUCKET/FOLDER")
        if config.warehouse and create_dataset:
            _create_datasets(project, config)
        destination = find_destination(
            project,
            config.dataset,
            config.table_prefix,
            billing_project=config.project,
            suffix=config.table_suffix,
            staging_dataset=config.staging_dataset,
        )
        client = publication.make_client(destination)
        yield Session(job_project, destination, client, temp_location, uuid.uuid4().hex[:12])


def find_projects(billing: str | None, of_dataset: str | None) -> tuple[str, str]:
    """Returns the project in which jobs run and are billed, and that of the tables.

    Args:
        billing: from --project.
        of_dataset: from --dataset=PROJECT.DATASET.

    Raises:
        ConfigError: neither is given, and there is no emulator.
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
) -> Destination:
    """Returns the destination in the dataset's own location.

    Args:
        project: of the dataset.
        dataset: the dataset.
        prefix: first part of the tables' names.
        billing_project: where jobs run and are billed; None: in the dataset's project.
        suffix: last part of the tables' names.
        staging_dataset: `[project.]dataset` for staging tables, if it is another.

    Raises:
        DatasetMissingError: there is no such dataset.
        ConfigError: BigQuery cannot be asked, or the two datasets are in different places.
    """
    billed = billing_project or project
    location = _location(billed, f"{project}.{dataset}")
    if staging_dataset:
        if "." not in staging_dataset:
            staging_dataset = f"{project}.{staging_dataset}"
        other = _location(billed, staging_dataset)
        if other != location:
            raise ConfigError(
                f"--staging_dataset {staging_dataset} is in {other} and {project}.{dataset} in {location}; one query "
                "reads both, so they have to be in one location"
            )
    return Destination(project, dataset, location, prefix, staging_dataset, suffix, billing_project)


def _location(project: str, dataset: str) -> str:
    try:
        client = bigquery.Client(project=project, credentials=credentials())
        return client.get_dataset(dataset).location or "US"
    except NotFound as error:
        raise DatasetMissingError(
            f"dataset {dataset} does not exist; create it where the bucket is: "
            f"bq --location=EU mk --dataset {':'.join(dataset.rsplit('.', 1))}"
        ) from error
    except (GoogleAPICallError, GoogleAuthError) as error:
        raise ConfigError(f"BigQuery cannot look up dataset {dataset}: {first_line(error)}") from error


def _create_datasets(project: str, config: JobConfig) -> None:
    client = bigquery.Client(project=project, credentials=credentials())
    for dataset in filter(None, (config.dataset, config.staging_dataset)):
        client.create_dataset(dataset if "." in dataset else f"{project}.{dataset}", exists_ok=True)
