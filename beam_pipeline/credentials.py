"""The account as which the launcher acts on Google Cloud, the same for every client of this process.

Without --impersonate_service_account that is the one of the application default credentials, which every client finds
by itself. With it Beam makes credentials for its own clients, and all others take those. Workers of another machine
act as their own account.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from beam_pipeline.errors import ConfigError

if TYPE_CHECKING:
    from apache_beam.options.pipeline_options import PipelineOptions
    from google.auth.impersonated_credentials import Credentials

_impersonated: Credentials | None = None


def impersonate(options: PipelineOptions) -> None:
    """Makes all clients of this process act as the account that --impersonate_service_account names.

    It comes before anything is read from Google Cloud: Beam keeps the first credentials that it makes for as long as
    the process lives, and goes on without any where it can make none.

    Raises:
        ConfigError: this process gets no token for the account, or acts as another one already.
    """
    global _impersonated
    import google.auth
    from apache_beam.internal.gcp import auth
    from apache_beam.options.pipeline_options import GoogleCloudOptions
    from google.auth.exceptions import GoogleAuthError
    from google.auth.impersonated_credentials import Credentials
    from google.auth.transport.requests import Request

    chain = options.view_as(GoogleCloudOptions).impersonate_service_account
    if not chain and not _impersonated:
        return
    try:
        google.auth.default()  # Beam would look for half a minute.
        adapter = auth.get_service_credentials(options)
        found: Any = adapter.get_google_auth_credentials() if adapter else None
        if not isinstance(found, Credentials) or found.signer_email != (chain or "").split(",")[-1]:
            raise ConfigError(
                "this process acts as another account already than --impersonate_service_account says; start a new one"
            )
        found.refresh(Request())
    except GoogleAuthError as error:
        # Further arguments can be an answer with a token in it.
        reason = str(error.args[0] if error.args else type(error).__name__).rstrip(".")
        raise ConfigError(
            f"--impersonate_service_account={chain}: {reason}; the account that starts the job needs "
            "roles/iam.serviceAccountTokenCreator on it (in a chain on the first, and each on the next), and its "
            "project the IAM Service Account Credentials API"
        ) from error
    _impersonated = found


def impersonated() -> Credentials | None:
    """Returns the credentials for every client; None lets a client find the default ones."""
    return _impersonated
