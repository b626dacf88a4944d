"""Servers in processes of their own, for the tests of engines and for the benchmark of them."""

import os
import signal
import socket
import subprocess
import time
from contextlib import contextmanager


def free_port():
    """Returns a port that nothing uses."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@contextmanager
def running(command, log, port, **options):
    """Runs a server until the block ends, with all that it started; waits until its port answers."""
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True, **options)
    try:
        deadline = time.monotonic() + 60
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.1)
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
