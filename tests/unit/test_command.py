"""What a person or a supervising process sees of a command that was stopped."""

import gc
import json
import os
import signal
import subprocess
import sys

import pytest
from google.auth.exceptions import DefaultCredentialsError, RefreshError

from beam_pipeline.command import end_start_up, exit_code
from beam_pipeline.errors import ConfigError


@pytest.fixture(autouse=True)
def _handler():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ConfigError("say where"), "say where"),
        (ValueError("of two\nlines"), "ValueError: of two lines"),
        (OSError("\x1b[2Jcleared"), "OSError: [2Jcleared"),
        (
            DefaultCredentialsError("None were found."),
            "no credentials for Google Cloud: None were found; run gcloud auth application-default login, or point "
            "GOOGLE_APPLICATION_CREDENTIALS to a service account's key",
        ),
        (
            RefreshError("invalid_grant", {"id_token": "secret"}),
            "no credentials for Google Cloud: invalid_grant; run gcloud auth application-default login, or point "
            "GOOGLE_APPLICATION_CREDENTIALS to a service account's key",
        ),
    ],
)
def test_an_error_is_one_line(error, line, capsys):
    def command():
        raise error

    assert exit_code(command) == 1
    assert capsys.readouterr() == ("", f"error: {line}\n")


def test_a_command_that_ends_well(capsys):
    assert exit_code(lambda: print("done")) == 0
    assert capsys.readouterr() == ("done\n", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command(number, capsys):
    assert exit_code(lambda: os.kill(os.getpid(), number), interrupted="start again") == 130
    assert capsys.readouterr().err == "error: start again\n"


@pytest.mark.parametrize(
    ("flags", "credentials", "reason"),
    [
        ([], False, "no credentials for Google Cloud: Your default credentials were not found"),
        (["--project=my-project"], False, "Your default credentials were not found"),
        ([], True, "which project? --project=PROJECT, or --dataset=PROJECT.DATASET"),
    ],
)
def test_tagging_without_credentials_or_project(flags, credentials, reason, tmp_path):
    """A process of its own, where Google's library finds nothing."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("GOOGLE_", "BIGQUERY_", "STORAGE_"))}
    environment |= {"CLOUDSDK_CONFIG": str(tmp_path), "NO_GCE_CHECK": "true"}
    if credentials:
        person = {"type": "authorized_user", "client_id": "i", "client_secret": "s", "refresh_token": "r"}
        (tmp_path / "person.json").write_text(json.dumps(person))
        environment["GOOGLE_APPLICATION_CREDENTIALS"] = str(tmp_path / "person.json")
    command = [sys.executable, "-m", "beam_pipeline.tag", "--run_id=r", *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert reason in done.stderr


def test_start_up_is_not_searched_for_garbage():
    script = (
        "import gc\n"
        "from beam_pipeline.command import end_start_up, run_process\n"
        "def main():\n"
        "    print(gc.isenabled(), gc.get_freeze_count() > 0)\n"
        "    end_start_up()\n"
        "    print(gc.isenabled(), gc.get_freeze_count() > 0)\n"
        "    return 3\n"
        "run_process(main)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("False False\nTrue True\n", 3), done.stderr


def test_a_session_in_somebody_elses_process_leaves_the_collector_alone():
    frozen = gc.get_freeze_count()
    end_start_up()
    assert (gc.isenabled(), gc.get_freeze_count()) == (True, frozen)
