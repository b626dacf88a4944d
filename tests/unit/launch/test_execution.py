"""Options on their way to Beam, and what a person reads of a job that failed, from the texts that Beam hands over."""

import socket
import threading

import grpc
import pytest
from apache_beam.options.pipeline_options import PipelineOptions, SetupOptions

from beam_pipeline.errors import BadIdError, ConfigError, PipelineError
from beam_pipeline.launch import execution, launcher
from beam_pipeline.launch.options import parse

FRAMES = """\
Traceback (most recent call last):
  File "apache_beam/runners/common.py", line 1498, in apache_beam.runners.common.DoFnRunner.process
    return self.do_fn_invoker.invoke_process(windowed_value)
           ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
"""


def reason(text):
    return execution.reason(RuntimeError(text), launcher.WHOLE)


@pytest.mark.parametrize(
    "steps", ["", " [while running 'Check']", " [while running 'Read user/Read'] [while running 'Check']"]
)
def test_an_error_of_ours_ends_where_its_message_ends(steps):
    found = reason(f"{FRAMES}beam_pipeline.errors.BadIdError: id 'a [b]' appears twice; train again{steps}\n")
    assert (type(found), str(found)) == (BadIdError, "id 'a [b]' appears twice; train again")


def test_an_error_of_ours_is_found_in_a_chain():
    text = (
        f"{FRAMES}beam_pipeline.errors.BadIdError: id 'a' appears twice [while running 'Audit']\n\n"
        f"During handling of the above exception, another exception occurred:\n\n"
        f"{FRAMES}RuntimeError: cannot stop [while running 'Audit']\n"
    )
    assert str(reason(text)) == "id 'a' appears twice"


@pytest.mark.parametrize(
    ("message", "read"),
    [
        ("ValueError: no [while running 'Check']", "ValueError: no"),
        (
            'HttpError: response: <{"status": "403"}>, content <{\n  "error": {\n    "code": 403\n  }\n}\n> '
            "[while running 'Write user/Load'] [while running 'Check']",
            'HttpError: response: <{"status": "403"}>, content <{ "error": { "code": 403 } } >',
        ),
        ("RuntimeError: first\nsecond [while running 'Check']", "RuntimeError: first second"),
        (f"RuntimeError: {FRAMES}ValueError: within [while running 'A'] [while running 'B']", "ValueError: within"),
    ],
)
def test_another_error_is_reported_whole_without_beams_steps(message, read):
    found = reason(f"{FRAMES}{message}\n")
    assert type(found) is PipelineError
    assert str(found) == f"the job failed: {read}; {launcher.WHOLE}"


def test_a_text_that_is_no_traceback_is_reported_whole():
    assert str(reason("Pipeline failed:\n  quota")).startswith("the job failed: Pipeline failed: quota;")
    assert str(reason("")).startswith("the job failed: RuntimeError;")


def test_an_interrupted_worker_is_an_interrupt():
    with pytest.raises(KeyboardInterrupt):
        reason(f"{FRAMES}KeyboardInterrupt [while running 'Check']\n")


@pytest.mark.parametrize("given", ["setup.py", "./setup.py", "../package/setup.py"])
def test_a_setup_file_is_found_from_anywhere(tmp_path, monkeypatch, given):
    """Beam changes to the folder of the file as it was given: to an empty one it cannot."""
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "setup.py").touch()
    monkeypatch.chdir(folder)
    options = execution.given_options(parse(["--run_id=1", "--runner=DataflowRunner", f"--setup_file={given}"]))
    assert options.view_as(SetupOptions).setup_file == str(folder / "setup.py")


def test_a_setup_file_that_is_not_there(tmp_path):
    missing = tmp_path / "setup.py"
    with pytest.raises(ConfigError, match=f"--setup_file={missing}: there is no such file; leave it out with an image"):
        execution.given_options(parse(["--run_id=1", "--runner=DataflowRunner", "--setup_file", str(missing)]))


@pytest.mark.parametrize("endpoint", ["localhost:1", "localhost", "nowhere.invalid:8099"])
def test_a_job_service_that_does_not_answer(endpoint):
    options = PipelineOptions([f"--job_endpoint={endpoint}"])
    with pytest.raises(ConfigError, match=f"--job_endpoint={endpoint}: no job service answers there .*start one"):
        execution.require_job_service(options)


def test_a_job_service_that_answers():
    with socket.create_server(("127.0.0.1", 0)) as service:
        execution.require_job_service(PipelineOptions([f"--job_endpoint=127.0.0.1:{service.getsockname()[1]}"]))
    execution.require_job_service(PipelineOptions([]))
    execution.require_job_service(PipelineOptions(["--job_endpoint=embed"]))


@pytest.fixture
def broken():
    """The error of a call to a service that ends meanwhile."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        channel = grpc.insecure_channel(f"127.0.0.1:{server.getsockname()[1]}")
        call = channel.unary_stream("/service/method")(b"")
    with pytest.raises(grpc.RpcError) as raised:
        next(call)
    channel.close()
    return raised.value


def test_a_job_service_that_ended_is_one_line(broken):
    line = str(execution.reason(broken, launcher.WHOLE))
    assert line.startswith("the job service ended, or cannot be reached any more (failed to connect to all addresses")
    assert line.endswith(f"; {launcher.WHOLE}")
    assert "debug_error_string" not in line
    assert "\n" not in line


def test_its_other_connections_end_without_a_traceback(broken, monkeypatch):
    reported = []
    monkeypatch.setattr(threading, "excepthook", lambda args: reported.append(args.exc_value))

    def fail(error):
        raise error

    other = ValueError("another")
    with execution._noticing_dead_workers([]):
        for error in (broken, other):
            thread = threading.Thread(target=fail, args=(error,))
            thread.start()
            thread.join()
    assert reported == [other]
