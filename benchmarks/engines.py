"""Measures how the job scales out: the same job with its SDK workers in one, two and four other processes.

    python benchmarks/engines.py [--rows=5000000] [--prism=.engines/prism --boot=.engines/boot]

As in bench.py, the bucket is a local folder and BigQuery a service that does nothing.
"""

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import bench

HERE = Path(__file__).parent
# In the workers, too, the bucket is a local folder.
IN_EVERY_PROCESS = f"""
import os, sys
if "BENCH_BUCKET" in os.environ:
    sys.path.append({str(HERE)!r})
    import local_bucket
    local_bucket.install()
"""


class Peaks(threading.Thread):
    """Samples the SDK workers that have a variable in their environment.

    Attributes:
        found: process id → the kernel's own peak of its resident memory, in bytes.
    """

    def __init__(self, marker):
        super().__init__(daemon=True)
        self._marker, self._over = marker.encode(), threading.Event()
        self.found = {}

    def run(self):
        """Samples until it is stopped."""
        while not self._over.wait(0.2):
            for entry in Path("/proc").glob("[0-9]*"):
                try:
                    command = (entry / "cmdline").read_bytes().split(b"\0")
                    if b"apache_beam.runners.worker.sdk_worker_main" not in command:
                        continue
                    if self._marker in (entry / "environ").read_bytes():
                        peak = int((entry / "status").read_text().partition("VmHWM:")[2].split()[0]) * 1024
                        self.found[entry.name] = max(peak, self.found.get(entry.name, 0))
                except (OSError, IndexError):  # It has ended.
                    continue

    def stop(self):
        """Ends the thread."""
        self._over.set()
        self.join()


def pool(boot, environment):
    """Starts a pool of SDK workers; returns its process and the flags that name it."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "apache_beam.runners.worker.worker_pool_main", f"--service_port={port}"]
    process = subprocess.Popen(
        [*command, f"--container_executable={boot}"],
        env={**environment, "RUN_PYTHON_SDK_IN_DEFAULT_ENVIRONMENT": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    time.sleep(4)
    return process, ["--environment_type=EXTERNAL", f"--environment_config=localhost:{port}"]


def measure(args):
    """Prints a line for each engine and number of workers."""
    work = Path(args.work).resolve()
    for folder in ("models", "logs", "bucket", "tmp"):
        (work / folder).mkdir(parents=True, exist_ok=True)
    size = (args.rows, args.dimension)
    model = bench.find_model(size, None, work, dict(os.environ))
    bench.read_through(model["folder"])
    fake = bench.FakeBigQuery(work / "bucket")
    with tempfile.TemporaryDirectory() as site:
        Path(site, "sitecustomize.py").write_text(IN_EVERY_PROCESS)
        environment = {
            **os.environ,
            "BIGQUERY_EMULATOR_HOST": fake.url,
            "STORAGE_EMULATOR_HOST": fake.url,
            "BENCH_BUCKET": str(work / "bucket"),
            "GOOGLE_CLOUD_PROJECT": "local",
            "PYTHONPATH": os.pathsep.join([site, str(HERE.parent)]),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        }
        workers, flags = pool(args.boot, environment) if args.prism else (None, [])
        ways = {"in the launcher's process": []}
        for count in args.workers[1:]:
            ways[f"{count} threads of it"] = [
                "--direct_running_mode=multi_threading",
                f"--direct_num_workers={count}",
            ]
        for count in args.workers:
            ways[f"{count} worker processes"] = [
                "--direct_running_mode=multi_processing",
                f"--direct_num_workers={count}",
            ]
        if args.prism:
            prism = ["--runner=PrismRunner", f"--prism_location={args.prism}", "--shared_files"]
            ways["Prism, 1 worker process"] = [*prism, *flags]
        try:
            print("| engine | seconds | CPU seconds | peak memory per worker |\n|---|---|---|---|", flush=True)
            for number in range(args.times):
                for name, engine in ways.items():
                    one(args, model, work, fake, environment, f"{name} ({number + 1})", engine)
        finally:
            fake.close()
            if workers:
                os.killpg(workers.pid, signal.SIGKILL)


def one(args, model, work, fake, environment, name, engine):
    """Measures one run and prints its line."""
    fake.reset(args.rows)
    command = [sys.executable, "-m", "beam_pipeline", f"--run_id={model['run_id']}", "--project=local"]
    command += ["--dataset=raw_dev", "--temp_location=gs://bench/tmp", f"--tracking_uri={bench.tracking_uri(work)}"]
    peaks = Peaks(f"BENCH_BUCKET={environment['BENCH_BUCKET']}")
    peaks.start()
    result = bench.measure([*command, *engine], work / "logs" / "engines.log", environment, 1 << 40, 900)
    peaks.stop()
    # Where no other process has worked, it was the launcher's.
    found = sorted(peaks.found.values(), reverse=True) or [result["peak_rss"]]
    memory = ", ".join(f"{peak / 1e9:.2f} GB" for peak in found)
    failed = f" **{result['failed']}**" if result["failed"] else ""
    print(f"| {name} | {result['seconds']:.1f}{failed} | {result['cpu_seconds']:.0f} | {memory} |", flush=True)
    for folder in (work / "bucket").iterdir():
        shutil.rmtree(folder, ignore_errors=True)


def main(argv):
    """Measures what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--dimension", type=int, default=64)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--prism", help="Prism's binary")
    parser.add_argument("--boot", help="Beam's boot program for SDK workers, which Prism needs")
    parser.add_argument("--work", default="bench", help="folder for models and files")
    measure(parser.parse_args(argv))


if __name__ == "__main__":
    main(sys.argv[1:])
