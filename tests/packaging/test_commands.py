"""Processes that tests fork from one that has imported are what Python itself would have started."""

import os
import signal
import subprocess
import sys

import pytest

SCRIPT = """
import atexit, json, os, signal, sys, threading, time
atexit.register(print, "at exit")
threading.Thread(target=lambda: (time.sleep(0.3), print("thread"))).start()
print(json.dumps([__name__, sys.argv, os.getcwd(), sys.path[0], dict(os.environ), signal.getsignal(signal.SIGINT) is signal.default_int_handler]))
print("é", file=sys.stderr)
{end}
"""


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("", 0),
        ("sys.exit(7)", 7),
        ("sys.exit('reason')", 1),
        ("os._exit(9)", 9),
        ("os.kill(os.getpid(), signal.SIGKILL)", -9),
        ("os.kill(os.getpid(), signal.SIGTERM)", -15),
    ],
)
def test_arguments_environment_output_and_exit_code(commands, tmp_path, end, code):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(end=end), encoding="utf-8")
    command = [sys.executable, str(script), "--flag=ü", "two words"]
    options = {"cwd": str(tmp_path), "env": {"PATH": os.environ["PATH"], "NAME": "välue", "LC_CTYPE": "C.UTF-8"}}
    forked = commands.run(command, **options)
    cold = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert (forked.returncode, forked.stdout, forked.stderr) == (cold.returncode, cold.stdout, cold.stderr)
    assert forked.returncode == code


def test_signals_and_time_limits(commands, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import time\nprint('here', flush=True)\ntime.sleep(60)\n")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        process = commands.start([sys.executable, str(script)])
        assert process.stdout.readline() == "here\n"
        assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.01)
        process.send_signal(number)
        process.communicate(timeout=20)
        assert process.returncode == -number
    with pytest.raises(subprocess.TimeoutExpired):
        commands.run([sys.executable, str(script)], timeout=0.2)


def test_a_module(commands):
    done = commands.run([sys.executable, "-m", "beam_pipeline", "--no_such_flag"])
    cold = subprocess.run(done.args, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (cold.returncode, cold.stdout, cold.stderr)
    assert done.returncode == 2
