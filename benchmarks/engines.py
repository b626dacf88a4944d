"""Measures how the job scales out: the same job with one, two and four bundles at a time, in one or several processes.

    python benchmarks/engines.py                               5 million rows, 3 times: ten minutes on 2 cores
    python benchmarks/engines.py --rows=20000 --times=1 --cut=1     half a minute, to see it work

As in bench.py, the bucket is a local folder and BigQuery a service that does nothing. Job services and Prism need what
`make .engines/.installed` builds; without it they are left out. Prints the tables of docs/engines.md.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

import bench

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.append(str(ROOT / "tests/support"))

from servers import free_port, running  # noqa: E402 - that is where it is

REPEATING = ROOT / "tests/support/retrying.py"
"""A job service of several workers; Beam's own has one."""
HUNDRED_MILLION = 100_000_000
TICKS = os.sysconf("SC_CLK_TCK")
# In the workers, too, the bucket is a local folder.
IN_EVERY_PROCESS = f"""
import os, sys
if "BENCH_BUCKET" in os.environ:
    sys.path.append({str(HERE)!r})
    import local_bucket
    local_bucket.install()
"""
# Runs in a process of its own, so that its memory and its seconds are those of cutting.
CUT = """
import json, resource, sys, time
from beam_pipeline.files import open_file
from beam_pipeline.formats.model import Encoding, Matrix, Tower, Vocabulary
from beam_pipeline.formats.protobuf import Span
from beam_pipeline.reading import pieces
path, rows, dimension, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
tower = Tower("user", "user_layer", Matrix("", 0, rows, dimension, "float32", None),
              Vocabulary(path, Span(0, size), Encoding.LINES, 0))
started, spent = time.monotonic(), time.process_time()
found = sum(piece.rows for piece in pieces.cut(tower, open_file, pieces.PIECE_BYTES))
assert found == rows, found
print(json.dumps({"seconds": time.monotonic() - started, "cpu": time.process_time() - spent,
                  "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
"""


class Workers(threading.Thread):
    """Samples the SDK workers that have a variable in their environment.

    Attributes:
        peaks: process id → the kernel's own peak of its resident memory, in bytes.
        cpu: process id → CPU seconds, as of the last sample.
    """

    def __init__(self, marker):
        super().__init__(daemon=True)
        self._marker, self._over = marker.encode(), threading.Event()
        self.peaks, self.cpu = {}, {}

    def run(self):
        """Samples until it is stopped."""
        while not self._over.wait(0.2):
            for entry in Path("/proc").glob("[0-9]*"):
                try:
                    command = (entry / "cmdline").read_bytes().split(b"\0")
                    if b"apache_beam.runners.worker.sdk_worker_main" not in command:
                        continue
                    if b"python" not in command[0] or self._marker not in (entry / "environ").read_bytes():
                        continue
                    self.peaks[entry.name] = int((entry / "status").read_text().partition("VmHWM:")[2].split()[0]) << 10
                    fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                    self.cpu[entry.name] = (int(fields[11]) + int(fields[12])) / TICKS
                except (OSError, IndexError):  # It has ended.
                    continue

    def stop(self):
        """Ends the thread, and the workers: their pool leaves those of a job that failed."""
        self._over.set()
        self.join()
        for pid in self.cpu:
            try:
                if self._marker in Path(f"/proc/{pid}/environ").read_bytes():
                    os.kill(int(pid), signal.SIGKILL)
            except OSError:  # It has ended.
                continue


@contextmanager
def serving(command, environment):
    """Runs a server on a free port, given as its last argument, until the block ends; gives the port.

    In the benchmark's folder: Beam's boot program leaves a file where it is started.
    """
    port, folder = free_port(), Path(environment["BENCH_BUCKET"]).with_name("tmp")
    with running([*command, str(port)], folder / f"server_{port}.log", port, cwd=folder, env=environment):
        yield port


def engines(tools, environment, stack):
    """Returns the lines of the table: name → (worker processes, bundles at a time, flags, whether in a pool)."""
    found = {"the launcher's own process": (1, 1, [], False)}
    for count in (2, 4):
        flags = ["--direct_running_mode=multi_threading", f"--direct_num_workers={count}"]
        found[f"{count} threads of it"] = (1, count, flags, False)
    for count in (1, 2, 4):
        flags = ["--direct_running_mode=multi_processing", f"--direct_num_workers={count}"]
        found[f"multi_processing {count}"] = (count, count, flags, False)
    if not (tools / "boot").exists():
        print(f"{tools}/boot is missing (make .engines/.installed): job services and Prism are left out")
        return found
    pool = [sys.executable, "-m", "apache_beam.runners.worker.worker_pool_main"]
    pool += [f"--container_executable={tools / 'boot'}", "--service_port"]
    port = stack.enter_context(serving(pool, {**environment, "RUN_PYTHON_SDK_IN_DEFAULT_ENVIRONMENT": "1"}))
    workers = ["--environment_type=EXTERNAL", f"--environment_config=localhost:{port}", "--shared_files"]
    service = [sys.executable, "-m", "apache_beam.runners.portability.local_job_service_main", "--port"]
    port = stack.enter_context(serving(service, environment))
    portable = ["--runner=PortableRunner", *workers]
    found["Beam's job service"] = (1, 1, [*portable, f"--job_endpoint=localhost:{port}"], True)
    port = stack.enter_context(serving([sys.executable, str(REPEATING), "--port"], environment))
    for count in (1, 2, 4):
        flags = [*portable, f"--job_endpoint=localhost:{port}", f"--direct_num_workers={count}"]
        found[f"the tests' job service {count}"] = (count, count, flags, True)
    prism = ["--runner=PrismRunner", f"--prism_location={tools / 'prism'}", *workers]
    found["Prism"] = (1, 8, prism, True)
    return found


def measure_all(args, work):
    """Measures every engine in turn, as often as was asked for or as the minutes allow; returns name → results."""
    model = bench.find_model((args.rows, args.dimension), None, work, dict(os.environ))
    bench.read_through(model["folder"])
    fake = bench.FakeBigQuery(work / "bucket")
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as site, ExitStack() as stack:
        stack.callback(fake.close)
        Path(site, "sitecustomize.py").write_text(IN_EVERY_PROCESS)
        environment = {
            **{name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"},
            "BIGQUERY_EMULATOR_HOST": fake.url,
            "STORAGE_EMULATOR_HOST": fake.url,
            "BENCH_BUCKET": str(work / "bucket"),
            "GOOGLE_CLOUD_PROJECT": "local",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "PYTHONPATH": os.pathsep.join([site, str(ROOT)]),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        }
        ways = engines(Path(args.tools).resolve(), environment, stack)
        if args.engines is not None:
            ways = {name: way for name, way in ways.items() if name in args.engines.split(",")}
        results = {name: [] for name in ways}
        for number in range(args.times):
            longest = max((each["seconds"] for runs in results.values() for each in runs), default=0)
            for name, (_, _, flags, in_pool) in ways.items():
                if number and time.monotonic() - began + longest > 60 * args.minutes:  # The first round is complete.
                    print(f"{args.minutes:g} minutes are over in round {number + 1}", flush=True)
                    return ways, results
                found = measure_one(args, model, work, fake, environment, flags, in_pool)
                results[name].append(found)
                print(f"{name}: {found['seconds']:.1f} s {found['failed'] or ''}", file=sys.stderr, flush=True)
    return ways, results


def measure_one(args, model, work, fake, environment, flags, in_pool):
    """Runs the job once; returns what bench.py's `measure` does, and `workers`: the peak memory of each."""
    fake.reset(args.rows)
    command = [sys.executable, "-m", "beam_pipeline", f"--run_id={model['run_id']}", "--project=local"]
    command += ["--dataset=raw_dev", "--temp_location=gs://bench/tmp", f"--tracking_uri={bench.tracking_uri(work)}"]
    workers = Workers(f"BENCH_BUCKET={environment['BENCH_BUCKET']}")
    workers.start()
    found = bench.measure([*command, *flags], work / "logs" / "engines.log", environment, 1 << 40, args.timeout)
    workers.stop()
    # Where no other process has worked, the launcher has; it has waited for its own workers, and not for a pool's.
    found["workers"] = sorted(workers.peaks.values()) or [found["peak_rss"]]
    found["cpu_seconds"] += sum(workers.cpu.values()) if in_pool else 0
    for folder in (work / "bucket").iterdir():
        shutil.rmtree(folder, ignore_errors=True)
    return found


def engines_table(ways, results):
    """Returns the lines of the table of engines: medians, and the fastest and slowest run."""
    lines = [
        "| engine | workers | bundles at a time | seconds | CPU seconds | peak memory per worker |",
        "|---" * 6 + "|",
    ]
    for name, runs in results.items():
        workers, slots, *_ = ways[name]
        good = [run for run in runs if not run["failed"]]
        if not good:
            reasons = ", ".join(run["failed"] for run in runs)
            lines.append(f"| {name} | {workers} | {slots} | failed: {reasons} | | |")
            continue
        seconds = [run["seconds"] for run in good]
        spread = f" ({min(seconds):.1f} to {max(seconds):.1f})" if len(seconds) > 1 else ""
        failed = f", {len(runs) - len(good)} failed" if len(runs) > len(good) else ""
        cpu = median(run["cpu_seconds"] for run in good)
        memory = median(peak for run in good for peak in run["workers"])
        wall = f"{median(seconds):.1f}{spread}{failed}"
        lines.append(f"| {name} | {workers} | {slots} | {wall} | {cpu:.1f} | {memory / 1e9:.2f} GB |")
    return lines


def cut_table(args, work):
    """Returns the lines of the table of the cut of a vocabulary, which one worker does alone."""
    lines = ["| ids | bytes | seconds | CPU seconds | peak memory |", "|---|---|---|---|---|"]
    found = None
    for rows in [round(float(size) * 1e6) for size in args.cut.split(",")]:
        path = work / "tmp" / "ids.txt"
        with path.open("w", encoding="utf-8") as file:
            for first in range(0, rows, 100_000):
                file.writelines(f"user-{number:09}\n" for number in range(first, min(first + 100_000, rows)))
        size = path.stat().st_size
        command = [sys.executable, "-c", CUT, str(path), str(rows), str(args.dimension), str(size)]
        runs = []
        for _ in range(args.times):
            done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, check=True)
            runs.append(json.loads(done.stdout))
        path.unlink()
        found = {name: median(run[name] for run in runs) for name in runs[0]}
        lines.append(
            f"| {rows / 1e6:g} million | {size / 1e6:,.0f} MB | {found['seconds']:.2f} | {found['cpu']:.2f} | "
            f"{found['memory'] / 1e9:.2f} GB |"
        )
        times = HUNDRED_MILLION / rows
    lines.append(
        f"| 100 million, at that rate | {size * times / 1e6:,.0f} MB | {found['seconds'] * times:.1f} | "
        f"{found['cpu'] * times:.1f} | |"
    )
    return lines


def main(argv):
    """Measures what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--dimension", type=int, default=64)
    parser.add_argument("--times", type=int, default=3, help="runs of each engine and cut")
    parser.add_argument("--minutes", type=float, default=9, help="after which no run of a second or third round begins")
    parser.add_argument("--engines", help="names as in the table, separated by commas; default: all; '': none")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one run")
    parser.add_argument("--cut", default="5,20", help="millions of ids that are cut; the last is extrapolated")
    parser.add_argument("--tools", default=str(ROOT / ".engines"), help="folder of prism and boot")
    parser.add_argument("--work", default="bench", help="folder for models and files")
    args = parser.parse_args(argv)
    work = Path(args.work).resolve()
    for folder in ("models", "logs", "bucket", "tmp"):
        (work / folder).mkdir(parents=True, exist_ok=True)
    cut = cut_table(args, work)
    if args.engines != "":
        ways, results = measure_all(args, work)
        print(f"{bench.size_name((args.rows, args.dimension))}, runs of each: {args.times} or fewer\n")
        print("\n".join([*engines_table(ways, results), ""]))
    print("\n".join(cut))


if __name__ == "__main__":
    main(sys.argv[1:])
