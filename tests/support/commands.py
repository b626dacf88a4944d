"""Commands as processes of their own that start with their imports done.

`python -m beam_pipeline` imports for three to four seconds of a processor before it does anything. The server here has
done so, runs no thread, and forks a child for each command: a process with its own arguments, environment, folder,
output and exit code, which runs `__main__` to Python's own end and is killed or interrupted like any other. Tests in
which the start itself matters (what is imported, sitecustomize, PYTHONPATH) use `subprocess` instead.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

import beam_caches

PRELOADED = (
    "beam_pipeline.launch.launcher",
    "beam_pipeline.comparison.command",
    "apache_beam.runners.dataflow.dataflow_runner",
    "apache_beam.runners.direct.direct_runner",
    "apache_beam.runners.portability.fn_api_runner.fn_runner",
    "apache_beam.io.gcp.bigquery_file_loads",
    "mlflow.tracking",
    "mlflow.store.tracking.sqlalchemy_store",
    "rich.progress",
)


class Process:
    """A command that was started; what tests use of `subprocess.Popen`, under the same names."""

    def __init__(self, command, status, stdout, stderr):
        self.args = command
        self.stdout, self.stderr = stdout, stderr
        self.returncode = None
        self._status = status
        self.pid = int(status.readline())

    def poll(self):
        return self._ended(0)

    def wait(self, timeout=None):
        if self._ended(timeout) is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def communicate(self, timeout=None):
        """Returns stdout and stderr, None for one that is not piped."""
        deadline = None if timeout is None else time.monotonic() + timeout
        found = {}
        pipes = [pipe for pipe in (self.stdout, self.stderr) if pipe]
        readers = [threading.Thread(target=lambda p=p: found.update({p: p.read()}), daemon=True) for p in pipes]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(deadline and max(0, deadline - time.monotonic()))
        if any(reader.is_alive() for reader in readers):
            raise subprocess.TimeoutExpired(self.args, timeout)
        for pipe in pipes:
            pipe.close()
        self.wait(deadline and max(0, deadline - time.monotonic()))
        return found.get(self.stdout), found.get(self.stderr)

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def _ended(self, timeout):
        if self.returncode is None and select.select([self._status], [], [], timeout)[0]:
            self.returncode = int(self._status.readline())
            self._status.close()
        return self.returncode


class Commands:
    """The server and its client; a context, as it is a process."""

    def __enter__(self):
        self._connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._server = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                # Read when Python starts; `run` does what it says for each command.
                env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
            )
        return self

    def __exit__(self, *exc_info):
        self._connection.close()
        self._server.wait()

    def start(self, command, *, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=None, env=None):
        """Starts a command: `sys.executable`, then `-m` and a module or the file of a script, then its arguments.

        Args:
            command: as for `subprocess.Popen`.
            stdout: PIPE or DEVNULL.
            stderr: PIPE, DEVNULL or STDOUT.
            cwd: its folder, instead of this process's.
            env: its whole environment, instead of this process's.

        Returns:
            The process; its pipes are text.
        """
        executable, *arguments = map(str, command)
        assert executable == sys.executable
        out, out_here = _output(stdout)
        err, err_here = (os.dup(out), None) if stderr == subprocess.STDOUT else _output(stderr)
        status_here, status = os.pipe()
        request = {
            "arguments": arguments,
            "cwd": cwd or os.getcwd(),
            "environment": {**(os.environ if env is None else env)},
        }
        socket.send_fds(self._connection, [json.dumps(request, default=str).encode()], [out, err, status])
        for end in (out, err, status):
            os.close(end)
        return Process(command, os.fdopen(status_here), out_here, err_here)

    def run(self, command, *, timeout=None, **options):
        """Runs a command; returns what `subprocess.run` does with its output captured as text."""
        process = self.start(command, **options)
        try:
            output = process.communicate(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        return subprocess.CompletedProcess(command, process.returncode, *output)


def _output(where):
    """Returns the child's end, and the file that reads the other one if there is one."""
    if where == subprocess.DEVNULL:
        return os.open(os.devnull, os.O_WRONLY), None
    here, there = os.pipe()
    return there, os.fdopen(here, encoding="utf-8")


def serve(connection):
    """Forks a child for each request, and returns in it what it has to run; returns None in the server, at the end."""
    # Ctrl-C at the terminal is for the commands and the tests.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, _reap)
    while True:
        request, ends, _, _ = socket.recv_fds(connection, 1 << 20, 3)
        if not request:
            return None
        if os.fork() == 0:
            connection.close()
            return _keep(json.loads(request), *ends)
        for end in ends:
            os.close(end)


def _reap(*_):
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _keep(request, out, err, status):
    """Forks once more, since only a parent hears how a process ended; returns in the child."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if pid := os.fork():
        os.close(out)
        os.close(err)
        os.write(status, f"{pid}\n".encode())
        _, ended = os.waitpid(pid, 0)
        with contextlib.suppress(BrokenPipeError):
            os.write(status, f"{os.waitstatus_to_exitcode(ended)}\n".encode())
        os._exit(0)
    os.close(status)
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.close(out)
    os.close(err)
    return request


def run(request):
    """Runs a module or a script as Python does when it starts with these arguments."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(request["environment"])
    if os.environ.get("PYTHONUNBUFFERED"):
        sys.stdout.reconfigure(write_through=True)
    time.tzset()
    tempfile.tempdir = None
    os.chdir(request["cwd"])
    first, *rest = request["arguments"]
    sys.orig_argv = [sys.executable, first, *rest]
    if first == "-m":
        module, *arguments = rest
        sys.argv = [module, *arguments]
        sys.path[0] = os.getcwd()
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *rest]
        sys.path[0] = os.path.dirname(first)
        runpy.run_path(first, run_name="__main__")


def main():
    for name in PRELOADED:
        importlib.import_module(name)
    beam_caches.install()
    assert threading.active_count() == 1, threading.enumerate()
    # Otherwise each child collects, and so copies, what it has of the server: at its end alone a second of a processor.
    gc.freeze()
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        request = serve(connection)
    if request:
        run(request)


if __name__ == "__main__":
    main()
