"""Whether this account may do what the job is going to do, asked of IAM before it starts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from urllib.parse import quote

from google.api_core.exceptions import Forbidden, GoogleAPICallError, NotFound
from google.auth.exceptions import GoogleAuthError
from google.cloud import bigquery, storage

from beam_pipeline import emulators
from beam_pipeline.bigquery.publication import Publication
from beam_pipeline.credentials import credentials
from beam_pipeline.errors import ConfigError
from beam_pipeline.launch.findings import Findings, first_line

_RESOURCE_MANAGER = "https://cloudresourcemanager.googleapis.com"

BUCKET_PERMISSIONS = [f"storage.objects.{verb}" for verb in ("create", "delete", "get", "list")]
TABLE_PERMISSIONS = [f"bigquery.tables.{verb}" for verb in ("get", "getData", "updateData")]


@dataclass(frozen=True)
class _Question:
    """Permissions that are needed on one resource.

    Attributes:
        resource: its name, for the report.
        permissions: what is needed.
        ask: returns those of the permissions that are granted.
    """

    resource: str
    permissions: Sequence[str]
    ask: Callable[[], Collection[str]]


def examine(
    findings: Findings, client: bigquery.Client, publication: Publication, *, distributed: bool, dataflow: bool
) -> None:
    """Adds which permissions this account lacks.

    Args:
        findings: the report.
        client: for the dataset.
        publication: what is to be published.
        distributed: the job runs elsewhere, as another account.
        dataflow: it is submitted to Dataflow.
    """
    if emulators.emulated():
        findings.note("permissions", "not checked: emulators have none")
        return
    missing: list[str] = []
    asked: list[str] = []
    for question in _questions(client, publication, dataflow):
        try:
            granted = question.ask()
        except NotFound:  # A table that is created later.
            continue
        except (GoogleAPICallError, GoogleAuthError, OSError, KeyError) as error:
            findings.note("permissions", f"{question.resource} could not be checked: {first_line(error)}")
            continue
        asked.append(question.resource)
        missing += [f"{name} on {question.resource}" for name in question.permissions if name not in granted]
    try:
        client.query("SELECT 1", job_config=bigquery.QueryJobConfig(dry_run=True))
        asked.append("a query (dry run)")
    except (Forbidden, GoogleAuthError) as error:
        missing.append(f"to run a query: {first_line(error)}")
    account = "this account, not the workers'" if distributed else "this account"
    if not missing:
        findings.ok("permissions", f"{account}: {', '.join(asked) or 'nothing could be checked'}")
    elif distributed:  # The launcher may well hold less than the workers, which do the writing.
        findings.note("permissions", f"{account}, lacks {', '.join(missing)}")
    else:
        findings.stop("permissions", ConfigError(f"this account lacks {', '.join(missing)}; see docs/permissions.md"))


def _questions(client: bigquery.Client, publication: Publication, dataflow: bool) -> Iterator[_Question]:
    project, bucket = publication.destination.job_project, publication.bucket
    of_jobs = ["bigquery.jobs.create", *(["dataflow.jobs.create"] if dataflow else [])]
    yield _Question(f"project {project}", of_jobs, lambda: project_permissions(project, of_jobs))
    yield _Question(f"bucket {bucket}", BUCKET_PERMISSIONS, lambda: bucket_permissions(project, bucket))
    needed = [*TABLE_PERMISSIONS, *(["bigquery.tables.createIndex"] if publication.vector_index else [])]
    destination = publication.destination
    named = {f"table {tower}": destination.table(tower) for tower in publication.towers}
    if publication.latest_tables:
        named |= {f"latest {tower}": destination.latest(tower) for tower in publication.towers}
    for name, table in named.items():

        def ask(table: str = table) -> Collection[str]:
            return list(client.test_iam_permissions(table, needed)["permissions"])

        yield _Question(name, needed, ask)


def bucket_permissions(project: str, name: str) -> list[str]:
    """Returns those of the permissions that this account has on the bucket."""
    bucket = storage.Client(project=project, credentials=credentials()).bucket(name)
    return list(bucket.test_iam_permissions(BUCKET_PERMISSIONS, timeout=10))


def project_permissions(project: str, permissions: Sequence[str]) -> list[str]:
    """Returns those of the permissions that this account has on the project."""
    from google.auth.transport.requests import AuthorizedSession

    answer = AuthorizedSession(credentials()).post(
        # Quoted, since an id like example.com:project has a colon as well.
        f"{_RESOURCE_MANAGER}/v1/projects/{quote(project, safe='')}:testIamPermissions",
        json={"permissions": [*permissions]},
        timeout=10,
    )
    answer.raise_for_status()
    return list(answer.json().get("permissions", []))
