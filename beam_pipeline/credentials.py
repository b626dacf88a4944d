"""As whom this process talks to Google Cloud: for every client what Beam's own clients use."""

from __future__ import annotations

from typing import Any

import google.auth
from apache_beam.internal.gcp import auth
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import PipelineOptions

from beam_pipeline import emulators


def follow(options: PipelineOptions) -> None:
    """Makes Beam's clients of this process follow the options, --impersonate_service_account among them.

    To be called before the first of them is created: Beam keeps the first credentials of a process. If a model was read
    first, the job would be submitted as somebody else.
    """
    FileSystems.set_options(options)


def credentials() -> Any:
    """Returns the credentials of Beam's clients in this process; None with emulators, which have none.

    Dataflow's workers are not told whom the launcher impersonates; there, these are the worker account's.

    Raises:
        DefaultCredentialsError: there are none.
    """
    if emulators.emulated():
        return None
    google.auth.default()  # Raises at once; Beam tries for half a minute, and goes on as nobody.
    # Set by `follow`, by a pipeline and on every worker; Beam has no public way to ask.
    found = auth.get_service_credentials(FileSystems._pipeline_options or PipelineOptions([]))
    return found and found.get_google_auth_credentials()
