"""A command as a process: its start-up and its exit code, and one line on stderr for whatever stops it."""

from __future__ import annotations

import gc
import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from beam_pipeline.errors import PipelineError

INTERRUPTED = 130
"""The exit code that a shell gives to a process that Ctrl-C ended."""

SCRIPT = "beam-pipeline"
"""The console script; `python -m beam_pipeline` is the same."""


def program(name: str = "") -> str:
    """Returns how a subcommand was started, or would be: by the console script, or as a module."""
    if Path(sys.argv[0]).stem == SCRIPT:
        return f"{SCRIPT} {name}".rstrip()
    return f"python -m beam_pipeline.{name}".rstrip(".")


def run_process(main: Callable[[], int]) -> NoReturn:
    """Runs a command as the only one of its process, and ends the process with its exit code.

    What start-up creates (modules, classes, descriptors of protocol buffers) stays until the end, but Python's
    collector of reference cycles goes through it again and again: a third of the time that it takes to import Beam and
    MLflow, and half a second more when the interpreter ends.
    """
    gc.disable()
    code = main()
    gc.freeze()
    sys.exit(code)


def end_start_up() -> None:
    """Collects garbage from now on, but not among what start-up created; does nothing outside of `run_process`."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


def exit_code(command: Callable[[], None], *, interrupted: str = "interrupted") -> int:
    """Runs a command; returns its exit code.

    Args:
        command: everything that it does after its flags were parsed.
        interrupted: what is reported after Ctrl-C or SIGTERM.

    Returns:
        0; the error's own code, usually 1, if one of ours stopped it; 1 for any other; `INTERRUPTED`.
    """
    # Airflow and container engines stop a task with SIGTERM; it deserves the clean-up that Ctrl-C gets.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        command()
    except PipelineError as error:
        return _stopped(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _stopped(interrupted, INTERRUPTED)
    except Exception as error:  # A traceback says nothing to whoever is paged; at the level INFO it is in the log.
        logging.getLogger(__name__).info("stopped by", exc_info=error)
        return _stopped(_reason(error), 1)
    return 0


def _stopped(message: str, code: int) -> int:
    # As an error of ours, so that any message is bounded and holds no control characters.
    print("error:", " ".join(str(PipelineError(message)).split()), file=sys.stderr)
    return code


def _reason(error: Exception) -> str:
    from google.auth.exceptions import GoogleAuthError

    if isinstance(error, GoogleAuthError):
        # Raised by any Google client, when it is created or at its first request. Further arguments can be a server's
        # answer, with a token in it.
        reason = str(error.args[0] if error.args else type(error).__name__).rstrip(".")
        return (
            f"no credentials for Google Cloud: {reason}; run gcloud auth application-default login, or point "
            "GOOGLE_APPLICATION_CREDENTIALS to a service account's key"
        )
    return f"{type(error).__name__}: {error}"
