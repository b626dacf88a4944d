"""The account with which this process calls Google Cloud: every client gets the credentials of Beam's own clients."""

from __future__ import annotations

from typing import Any

import google.auth
from apache_beam.internal.gcp import auth
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import GoogleCloudOptions, PipelineOptions
from google.auth.exceptions import GoogleAuthError
from google.auth.transport.requests import Request

from beam_pipeline import emulators
from beam_pipeline.errors import ConfigError


def follow(options: PipelineOptions) -> None:
    """Makes Beam's clients in this process follow the options, --impersonate_service_account among them.

    To be called before the first of them is created: Beam keeps the first credentials of a process. If a model was read
    first, the job would be submitted as somebody else.

    Raises:
        ConfigError: this process is given no token for the account that is to be impersonated.
    """
    cloud = options.view_as(GoogleCloudOptions)
    if emulators.emulated():  # They have no accounts, and Beam would ask Google for a token all the same.
        cloud.impersonate_service_account = None
    FileSystems.set_options(options)
    try:
        if found := impersonated():
            found.refresh(Request())
    except GoogleAuthError as error:
        # Further arguments can be an answer with a token in it.
        reason = str(error.args[0] if error.args else type(error).__name__).rstrip(".")
        raise ConfigError(
            f"--impersonate_service_account={cloud.impersonate_service_account}: {reason}; the account that starts the "
            "job needs roles/iam.serviceAccountTokenCreator on it (in a chain on the first, and each on the next), and "
            "its project the IAM Service Account Credentials API"
        ) from error


def credentials() -> Any:
    """Returns the credentials of Beam's clients in this process; None with emulators, which have none.

    Dataflow's workers do not know whom the launcher impersonates; there, these are the worker account's.

    Raises:
        DefaultCredentialsError: there are none.
        ConfigError: they are not those of the account that is to be impersonated.
    """
    if emulators.emulated():
        return None
    google.auth.default()  # Raises at once; Beam tries for half a minute, and continues anonymously.
    adapter = auth.get_service_credentials(_options())
    found = adapter and adapter.get_google_auth_credentials()
    # Beam continues anonymously where it fails, and as before in a process that began as another account.
    if (account := _account()) and getattr(found, "signer_email", None) != account:
        raise ConfigError(f"this process already acts as an account other than {account}; start a new one")
    return found


def impersonated() -> Any:
    """Returns the credentials of the account that is impersonated; None if none is."""
    return credentials() if _account() else None


def _account() -> str | None:
    chain = _options().view_as(GoogleCloudOptions).impersonate_service_account
    return chain and str(chain).split(",")[-1]


def _options() -> PipelineOptions:
    # Set by `follow`, by a pipeline and on every worker; Beam has no public way to ask.
    return FileSystems._pipeline_options or PipelineOptions([])
