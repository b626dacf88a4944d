"""Measures this pipeline against the ways that it replaces, and writes docs/benchmark.md.

    python benchmarks/bench.py                                        everything: hours, 24 GB of memory, 20 GB of disk
    python benchmarks/bench.py --rows=0.1 --also= --runs=1 --docs=/tmp/docs       a minute, to see it work

Models are made on first use and kept below --work, the largest only with --keep. Each run is a process of its own
(ways.py), in turn, with a limit on its address space; a way that runs out of memory is reported and not tried again.
"""

import argparse
import compileall
import json
import os
import platform
import resource
import select
import shlex
import shutil
import signal
import site
import subprocess
import sys
import time
import urllib.request
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
WAYS = {
    "a": "this pipeline",
    "b": "the script it replaces",
    "c": "naive Beam pipeline",
    "d": "limit: same bytes, nothing in between",
}
INFORMATIVE = {"a-rows": "this pipeline, --writer=rows", "a-gs": "this pipeline, the model on gs://"}
STORAGE = ROOT / "tests/support/storage_server.py"
"""The Cloud Storage that way (a-gs) reads from, and that counts the bytes."""
TRAINED = 1_772_366_400_000
"""When all models were trained, in milliseconds: noon of the day that fake_bigquery.py names."""
HUNDRED_MILLION = (100_000_000, 16)
PHASES = "a-phases"
"""Way (a) once more at each size, with a note of when each of its phases ends; not among the runs."""
SAMPLE_SECONDS = 0.05
EARLY_SAMPLE_SECONDS = 0.005
"""While a process is young: the limit at the smallest size is over before a second sample."""
INLINE_ROWS = 1_500_000
"""Vocabularies of larger models are files by default."""
LARGE_ROWS = 2_000_000
"""Models of more rows are removed after use."""
ENCODED_ROWS = 100_000
"""Of the stock writer in the comparison of writers; ours gets ten times as many."""
PACKAGES = ("apache-beam", "tensorflow", "tf-keras", "mlflow", "google-cloud-bigquery", "numpy", "pandas", "pyarrow")
OUT_OF_MEMORY = (
    "MemoryError",
    "bad_alloc",
    "Cannot allocate memory",
    "ResourceExhausted",
    "OOM when allocating",
    "malloc of size",
    "realloc of size",
    "pthread_create",  # a thread that gets no stack
    "can't start new thread",
)


# Sizes and models.


def size_name(size):
    """Returns the name of (rows, dimension)."""
    rows, dimension = size
    return f"{rows / 1e6:g} million × {dimension}"


def parse_sizes(text, dimension):
    """Returns (rows, dimension) of `0.1,1.5` or `0.1x256`, in millions of rows."""
    sizes = []
    for part in filter(None, text.split(",")):
        rows, _, own = part.partition("x")
        sizes.append((round(float(rows) * 1e6), int(own or dimension)))
    return sizes


def split(rows):
    """Returns the rows of each tower: two thirds are users."""
    return {"user": rows - rows // 3, "item": rows // 3}


def find_model(size, vocabulary, work, environment):
    """Returns what make_model.py says about the model of a size, which is made if it is not there."""
    rows, dimension = size
    kind = vocabulary or ("list" if rows <= INLINE_ROWS else "file")
    record = work / "models" / f"{rows}x{dimension}-{kind}.json"
    if record.exists():
        model = json.loads(record.read_text())
        if Path(model["folder"]).is_dir():
            return model
    print(f"making the model of {size_name(size)}, vocabulary as {kind}", flush=True)
    counts = split(rows)
    made = subprocess.run(
        [
            sys.executable,
            HERE / "make_model.py",
            f"--tracking_uri={tracking_uri(work)}",
            f"--artifact_root={work / 'artifacts'}",
            f"--users={counts['user']}",
            f"--items={counts['item']}",
            f"--dimension={dimension}",
            f"--vocabulary={kind}",
            f"--trained={TRAINED}",
        ],
        stdout=subprocess.PIPE,
        stderr=(work / "logs" / "make_model.log").open("w"),
        env=environment,
        check=False,
    )
    if made.returncode:
        sys.exit(f"the model was not made, see {work / 'logs' / 'make_model.log'}")
    model = {**json.loads(made.stdout.splitlines()[-1]), "vocabulary": kind}
    record.write_text(json.dumps(model))
    return model


def tracking_uri(work):
    """Returns the MLflow store of the benchmark."""
    return f"sqlite:///{work / 'mlflow.db'}"


def read_through(folder):
    """Brings the files of a model into the page cache, so that no way pays for being the first."""
    buffer = bytearray(8 << 20)
    for path in Path(folder).rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


# One run.


class FakeBigQuery:
    """The service that takes the load jobs, in a process of its own that no way is charged for."""

    def __init__(self, folder):
        self._process = subprocess.Popen(
            [sys.executable, HERE / "fake_bigquery.py", folder], stdout=subprocess.PIPE, text=True
        )
        self.url = f"http://127.0.0.1:{self._process.stdout.readline().strip()}"

    def reset(self, rows):
        """Forgets everything and says from now on that each tower has its rows."""
        body = json.dumps({"counts": split(rows)}).encode()
        urllib.request.urlopen(urllib.request.Request(f"{self.url}/reset", body, method="POST")).close()

    def seen(self):
        """Returns the load jobs, their files and bytes."""
        with urllib.request.urlopen(f"{self.url}/seen") as answer:
            return json.load(answer)

    def close(self):
        """Ends the process."""
        self._process.terminate()
        self._process.wait()


def tree_rss(root):
    """Returns the resident bytes of a process and all below it."""
    total, todo = 0, [root]
    while todo:
        pid = todo.pop()
        try:
            total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            for thread in os.listdir(f"/proc/{pid}/task"):
                todo += Path(f"/proc/{pid}/task/{thread}/children").read_text().split()
        except (FileNotFoundError, ProcessLookupError):  # It has just ended.
            continue
    return total


def bytes_read(pid):
    """Returns the bytes that a process has read so far, from files and pipes alike, its imports among them."""
    try:
        text = Path(f"/proc/{pid}/io").read_text()
    except (OSError, ValueError):
        return 0
    return int(text.split("rchar: ")[1].split()[0])


def measure(command, log, environment, memory_limit, timeout):
    """Runs a command to its end; returns seconds, cpu_seconds, peak_rss, read, and `failed`: None or why.

    CPU seconds are those of the process and of all its children that it waited for. The peak is the largest sum over
    the tree that was sampled, or the kernel's own peak of the process if that is larger.
    """

    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (memory_limit, memory_limit))

    with log.open("w") as output:
        started = time.monotonic()
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, preexec_fn=limit, start_new_session=True
        )
        peak, read, age, late = 0, 0, 0.0, False
        ended = os.pidfd_open(process.pid)
        try:
            while not select.select([ended], [], [], EARLY_SAMPLE_SECONDS if age < 0.2 else SAMPLE_SECONDS)[0]:
                peak, read = max(peak, tree_rss(process.pid)), bytes_read(process.pid)
                age = time.monotonic() - started
                if not late and age > timeout:
                    late = True
                    os.killpg(process.pid, signal.SIGKILL)
            seconds = time.monotonic() - started
            read = max(read, bytes_read(process.pid))
        except BaseException:  # Ctrl-C reaches this process alone.
            os.killpg(process.pid, signal.SIGKILL)
            raise
        finally:
            os.close(ended)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
    # The kernel counts what a child held before it became another program, which is this process's memory.
    if usage.ru_maxrss > resource.getrusage(resource.RUSAGE_SELF).ru_maxrss:
        peak = max(peak, usage.ru_maxrss * 1024)
    result = {
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_rss": peak,
        "read": read,
        "failed": None,
    }
    if late:
        result["failed"] = f"not done in {timeout:g} s"
    elif process.returncode:
        text = log.read_text(errors="replace")
        # SIGKILL: the machine itself had no more.
        out_of_memory = process.returncode == -signal.SIGKILL or any(mark in text for mark in OUT_OF_MEMORY)
        result["failed"] = "out of memory" if out_of_memory else f"exit code {process.returncode}"
    return result


def command_of(way, model, work, output_bytes):
    """Returns the command line of a way."""
    ways = [sys.executable, str(HERE / "ways.py")]
    text, store = json.dumps(model), f"--tracking_uri={tracking_uri(work)}"
    return {
        "a": [*ways, "pipeline", text, store],
        "a-phases": [*ways, "phases", text, store],
        "a-gs": [*ways, "pipeline", json.dumps({**model, "run_id": model.get("gs_run_id")}), store],
        "a-rows": [*ways, "pipeline", text, store, "--writer=rows"],
        "b": [*ways, "script", text],
        "c": [*ways, "naive", text],
        "d": [*ways, "limit", text, str(output_bytes)],
    }[way]


def on_cloud_storage(model, work, environment):
    """Returns the id of another run of the same model, whose artifacts are in a bucket that `STORAGE` serves."""
    code = (
        "import sys, mlflow; client = mlflow.MlflowClient(sys.argv[1]); name = 'benchmark on gs'\n"
        "found = client.get_experiment_by_name(name)\n"
        "experiment = found.experiment_id if found else client.create_experiment(name, 'gs://models')\n"
        "run = client.create_run(experiment, int(sys.argv[3]), run_name=sys.argv[2]).info.run_id\n"
        "client.set_terminated(run, 'FINISHED'); print(run)"
    )
    command = [sys.executable, "-c", code, tracking_uri(work), model["run_name"], str(TRAINED)]
    with (work / "logs" / "on_cloud_storage.log").open("w") as log:
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True, check=True)
    run_id = done.stdout.split()[-1]
    folder = work / "storage" / "models" / run_id / "artifacts"
    folder.mkdir(parents=True)
    (folder / "model").symlink_to(model["folder"])
    return run_id


def needed(model):
    """Returns the bytes of vectors and ids in a model."""
    folder = Path(model["folder"])
    ids = [*folder.glob("assets/*")] or [folder / "saved_model.pb"]
    return sum(path.stat().st_size for path in [*folder.glob("variables/variables.data-*"), *ids])


class Storage:
    """The Cloud Storage of one run, in a process of its own that no way is charged for."""

    def __init__(self, folder):
        self._process = subprocess.Popen([sys.executable, STORAGE, folder], stdout=subprocess.PIPE, text=True)
        self.url = f"http://127.0.0.1:{self._process.stdout.readline().strip()}"

    def close(self):
        """Returns the bytes and requests that were asked for, and ends the process."""
        with urllib.request.urlopen(f"{self.url}/seen") as answer:
            seen = json.load(answer)
        self._process.terminate()
        self._process.wait()
        return seen


class Bench:
    """Runs ways and remembers what was measured.

    Attributes:
        runs: one dict per run, as `measure` returns it, with way, rows, dimension, number, files and bytes.
    """

    def __init__(self, args):
        self.args = args
        self.work = Path(args.work).resolve()
        self.bucket = self.work / "bucket"
        for folder in ("models", "logs", "bucket", "tmp", "storage"):
            (self.work / folder).mkdir(parents=True, exist_ok=True)
        self.runs = []
        self.encoded = {}
        self.fake = None
        self.environment = {
            **{name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"},
            "PYTHONPATH": str(ROOT),
            "TMPDIR": str(self.work / "tmp"),  # The Parquet files of (b) go where all load files go: on one disk.
            "BENCH_BUCKET": str(self.bucket),
            "GOOGLE_CLOUD_PROJECT": "local",
            "TF_USE_LEGACY_KERAS": "1",
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }

    def run(self):
        """Measures everything that was asked for."""
        self.fake = FakeBigQuery(self.bucket)
        try:
            self.environment["BIGQUERY_EMULATOR_HOST"] = self.environment["STORAGE_EMULATOR_HOST"] = self.fake.url
            for size, runs in self.args.plan:
                self._measure_size(size, runs)
            self._compare_writers()
        finally:
            self.fake.close()

    def _measure_size(self, size, runs):
        rows, dimension = size
        ways = [way for way in WAYS if way in self.args.ways]
        if rows > self.args.naive_up_to * 1e6 or dimension != self.args.dimension:
            ways = [way for way in ways if way != "c"]
        model = find_model(size, self.args.vocabulary, self.work, self.environment)
        if size == HUNDRED_MILLION:
            ways = [way for way in ways if way in "ad"]
        output_bytes = rows * (20 + 4 * dimension)  # If (a) is not measured: about what it writes.
        for number in range(1, runs + 1):
            informative = [way for way in INFORMATIVE if way != "a-rows" or "c" in ways] if number == 1 else []
            for way in [*ways, *informative]:
                run = self._run_way(way, size, number, model, output_bytes)
                if way == "a" and not run["failed"]:
                    output_bytes = run["bytes"]
                if run["failed"] and way in ways:
                    ways.remove(way)
        if "a" in self.args.ways:
            self._run_way(PHASES, size, 1, model, output_bytes)
        if rows > LARGE_ROWS and not self.args.keep:
            shutil.rmtree(Path(model["folder"]).parent.parent)

    def _run_way(self, way, size, number, model, output_bytes):
        self._empty()
        read_through(model["folder"])
        os.sync()  # What the run before has left to write must not slow this one.
        environment, storage = self.environment, None
        if way == "a-gs":
            model = {**model, "gs_run_id": on_cloud_storage(model, self.work, self.environment)}
            storage = Storage(self.work / "storage")
            environment = {**environment, "STORAGE_EMULATOR_HOST": storage.url}
        self.fake.reset(size[0])
        log = self.work / "logs" / f"{way}-{size[0]}x{size[1]}-{number}.log"
        run = measure(
            command_of(way, model, self.work, output_bytes),
            log,
            environment,
            self.args.memory_limit << 30,
            self.args.timeout,
        )
        if storage:
            run |= {**storage.close(), "needed": needed(model)}
        if way == "d":
            sizes = [path.stat().st_size for path in self.bucket.iterdir()]
            run |= {"jobs": 0, "files": len(sizes), "bytes": sum(sizes)}
        else:
            run |= self.fake.seen()
            if not run["failed"] and run["jobs"] < 2:
                run["failed"] = f"{run['jobs']} load jobs instead of one per tower"
        self._empty()
        run |= {"way": way, "rows": size[0], "dimension": size[1], "number": number}
        run["vocabulary"] = model["vocabulary"]
        self.runs.append(run)
        self._save()
        print(
            f"{size_name(size):>18}  {way:6} run {number}: "
            + (
                f"{run['failed']} after {run['seconds']:.1f} s, peak {run['peak_rss'] / 1e6:,.0f} MB, see {log}"
                if run["failed"]
                else f"{run['seconds']:.2f} s, {run['cpu_seconds']:.2f} CPU s, {run['peak_rss'] / 1e6:,.0f} MB, "
                f"{run['bytes'] / 1e6:,.0f} MB in {run['files']} files"
            ),
            flush=True,
        )
        return run

    def _compare_writers(self):
        for number in range(1, self.args.plan[0][1] + 1):
            for writer, rows in (("stock", ENCODED_ROWS), ("columnar", 10 * ENCODED_ROWS)):
                self._empty()
                os.sync()
                command = [sys.executable, HERE / "ways.py", "encode", writer, str(rows), str(self.args.dimension)]
                with (self.work / "logs" / f"encode-{writer}-{number}.log").open("w") as log:
                    done = subprocess.run(command, env=self.environment, stdout=subprocess.PIPE, stderr=log, check=True)
                found = json.loads(done.stdout.splitlines()[-1])
                rate = found["rows"] / found["cpu_seconds"]
                self.encoded.setdefault(writer, []).append(rate)
                print(f"{'encode and write':>18}  {writer:8} run {number}: {rate:,.0f} rows per CPU second", flush=True)
        self._empty()
        self._save()

    def _empty(self):
        for folder in (self.bucket, self.work / "tmp"):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()

    def _save(self):
        results = {"facts": self.args.facts, "runs": self.runs, "encoded": self.encoded}
        (self.work / "results.json").write_text(json.dumps(results, indent=1))


# The report.


def machine_facts(args):
    """Returns what a reader has to know of the machine, as lines."""
    memory = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    processor = models[0].partition(":")[2].strip() if models else platform.machine()
    kernel = ".".join(platform.release().split(".")[:2])
    return {
        "Measured": f"{datetime.now(UTC):%Y-%m-%d}",
        "Command": f"`{shlex.join(['python', 'benchmarks/bench.py', *args])}`",
        "Machine": f"{len(os.sched_getaffinity(0))} cores ({processor}), {int(memory.split()[1]) / 1e6:.0f} GB of "
        f"memory, {platform.system()} {kernel}; load {os.getloadavg()[0]:.1f} when it began",
        "Software": f"Python {platform.python_version()}, " + ", ".join(f"{name} {version(name)}" for name in PACKAGES),
    }


class Results:
    """Medians and ratios of what was measured."""

    def __init__(self, results):
        self.facts = results["facts"]
        self.encoded = results["encoded"]
        self._runs = {}
        for run in results["runs"]:
            self._runs.setdefault((run["way"], run["rows"], run["dimension"]), []).append(run)
        self.dimension = results["runs"][0]["dimension"]

    def sizes(self):
        """Returns all (rows, dimension)."""
        return list(dict.fromkeys((rows, dimension) for _, rows, dimension in self._runs))

    def of(self, way, size):
        """Returns the runs of a way that ended well."""
        return [run for run in self._runs.get((way, *size), []) if not run["failed"]]

    def failure(self, way, size):
        """Returns why a way did not end, or None."""
        return next((run["failed"] for run in self._runs.get((way, *size), []) if run["failed"]), None)

    def failed_run(self, way, size):
        """Returns the run that did not end."""
        return next(run for run in self._runs[(way, *size)] if run["failed"])

    def median(self, way, millions, field):
        """Returns a median at so many million rows; None if it was not measured."""
        runs = self.of(way, (round(millions * 1e6), self.dimension))
        return median(run[field] for run in runs) if runs else None


def spread(values, form):
    """Returns `median (min-max)`."""
    if len(values) == 1:
        return form.format(values[0])
    return f"{form.format(median(values))} ({form.format(min(values))}-{form.format(max(values))})"


def run_table(results):
    """Returns the table of all runs."""
    lines = [
        "| rows | way | runs | seconds | CPU seconds | peak memory, MB | read, bytes a row | written, bytes a row "
        "| written, MB | files |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for size in results.sizes():
        for way, name in {**WAYS, **INFORMATIVE}.items():
            runs, failure = results.of(way, size), results.failure(way, size)
            label = f"({way}) {name}" if way in WAYS else name
            if runs:
                cells = [
                    str(len(runs)),
                    spread([run["seconds"] for run in runs], "{:.2f}"),
                    spread([run["cpu_seconds"] for run in runs], "{:.2f}"),
                    spread([run["peak_rss"] / 1e6 for run in runs], "{:,.0f}"),
                    f"{median(run['read'] for run in runs) / size[0]:,.0f}",
                    f"{median(run['bytes'] for run in runs) / size[0]:,.0f}",
                    f"{median(run['bytes'] for run in runs) / 1e6:,.0f}",
                    f"{median(run['files'] for run in runs):g}",
                ]
                lines.append(f"| {size_name(size)} | {label} | {' | '.join(cells)} |")
            if failure:
                run = results.failed_run(way, size)
                lines.append(
                    f"| {size_name(size)} | {label} | 1 | **{failure}** after {run['seconds']:.0f} | "
                    f"{run['cpu_seconds']:.0f} | {run['peak_rss'] / 1e6:,.0f} | | | | |"
                )
    return "\n".join(lines)


def fetched_table(results):
    """Returns the table of what the runs that read from Cloud Storage fetched."""
    lines = ["| rows | requests | fetched, MB | vectors and ids, MB | |", "|---|---|---|---|---|"]
    for size in results.sizes():
        for run in results.of("a-gs", size):
            ratio = run["fetched"] / run["needed"]
            lines.append(
                f"| {size_name(size)} | {run['requests']:,} | {run['fetched'] / 1e6:,.1f} | "
                f"{run['needed'] / 1e6:,.1f} | {ratio:.3f} × |"
            )
    return "\n".join(lines)


def ratio_table(results):
    """Returns the table of what has to be shown."""
    lines = ["| what | target | measured | |", "|---|---|---|---|"]

    def add(what, target, value, holds, shown, reason):
        verdict = "" if value is None else ("pass" if holds(value) else "**fail**")
        lines.append(f"| {what} | {target} | {reason if value is None else shown.format(value)} | {verdict} |")

    def ratio(upper, lower):
        return upper / lower if upper and lower else None

    def against(what, way, millions, field, least, target):
        """How many times more another way takes than (a)."""
        missing = results.failure(way, (round(millions * 1e6), results.dimension)) or "not measured"
        value = ratio(results.median(way, millions, field), results.median("a", millions, field))
        add(what, target, value, lambda found: found >= least, "{:.1f} ×", f"({way}): {missing}")

    for millions, least in ((0.1, 1.4), (1.5, 5), (5, 10)):
        against(
            f"{millions:g} million rows: wall time against (b)", "b", millions, "seconds", least, f"{least:g} × faster"
        )
    against("1.5 million rows: peak memory against (b)", "b", 1.5, "peak_rss", 8, "8 × less")
    rates = {writer: median(values) for writer, values in results.encoded.items()}
    add(
        "encoding and writing, rows per CPU second, against Beam's Avro writer",
        "10 ×",
        ratio(rates.get("columnar"), rates.get("stock")),
        lambda found: found >= 10,
        f"{{:.1f}} × ({rates.get('columnar', 0):,.0f} against {rates.get('stock', 0):,.0f})",
        "not measured",
    )
    seconds, limit = results.median("a", 10, "seconds"), results.median("d", 10, "seconds")
    add(
        "10 million rows: wall time, and the limit (d)",
        "8 s, or 2 × the limit if that is more",
        seconds if limit else None,
        lambda found: found <= max(8, 2 * limit),
        f"{{:.1f}} s, limit {limit or 0:.1f} s",
        "not measured",
    )
    add(
        "10 million rows: peak memory",
        "450 MB",
        results.median("a", 10, "peak_rss"),
        lambda found: found <= 450e6,
        f"{(results.median('a', 10, 'peak_rss') or 0) / 1e6:.0f} MB",
        "not measured",
    )
    written = results.median("a", 1.5, "bytes")
    add(
        "1.5 million rows: load-file bytes per row, ids of 10 characters",
        "285",
        written and written / 1.5e6,
        lambda found: found <= 285,
        "{:.0f}",
        "not measured",
    )
    add(
        "5 million rows: bytes fetched over HTTP against bytes needed",
        "1.1 ×",
        ratio(results.median("a-gs", 5, "fetched"), results.median("a-gs", 5, "needed")),
        lambda found: found <= 1.1,
        "{:.3f} ×",
        "not measured",
    )
    more = 10 / 1.5
    add(
        "1.5 to 10 million rows (6.7 × as many): wall time of (a)",
        "linear: 8 × at most",
        ratio(results.median("a", 10, "seconds"), results.median("a", 1.5, "seconds")),
        lambda found: found <= 1.2 * more,
        "{:.1f} ×",
        "not measured",
    )
    add(
        "1.5 to 10 million rows: peak memory of (a)",
        "flat: 1.25 × at most",
        ratio(results.median("a", 10, "peak_rss"), results.median("a", 1.5, "peak_rss")),
        lambda found: found <= 1.25,
        "{:.2f} ×",
        "not measured",
    )
    return "\n".join(lines)


def plot(results, path):
    """Draws rows against seconds and rows against memory, each way a line; an × where a way ran out of memory."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    looks = {"a": ("C0", "o"), "b": ("C1", "s"), "c": ("C3", "^"), "d": ("0.4", "D")}
    sizes = sorted(size for size in results.sizes() if size[1] == results.dimension)
    for axis, field, scale, label in (
        (axes[0], "seconds", 1, "seconds, process start to end"),
        (axes[1], "peak_rss", 1e-6, "peak memory of the process tree, MB"),
    ):
        for way, name in WAYS.items():
            color, marker = looks[way]
            points = [
                (size[0], median(run[field] for run in results.of(way, size)) * scale)
                for size in sizes
                if results.of(way, size)
            ]
            if points:
                axis.plot(*zip(*points, strict=True), color=color, marker=marker, label=f"({way}) {name}")
            for size in sizes:
                if failure := results.failure(way, size):
                    at = (size[0], results.failed_run(way, size)[field] * scale)
                    if points and not results.of(way, size):
                        axis.plot([points[-1][0], at[0]], [points[-1][1], at[1]], color=color, linestyle=":")
                    axis.plot(*at, color=color, marker="x", markersize=10, markeredgewidth=2.5, linestyle="")
                    axis.annotate(failure, at, (-8, 6), textcoords="offset points", color=color, ha="right")
        axis.set(xscale="log", yscale="log", xlabel=f"rows, of {results.dimension} floats", ylabel=label)
        axis.set_xticks([size[0] for size in sizes], [f"{size[0] / 1e6:g} M" for size in sizes])
        axis.minorticks_off()
        axis.yaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda value, _: f"{value:,g}"))
        axis.grid(True, which="both", alpha=0.3)
        axis.margins(x=0.08, y=0.12)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=130)


TEXT = """\
# Benchmark

<!-- Written by benchmarks/bench.py; not edited by hand. -->

How long it takes, and how much memory, to bring the embeddings of a two-tower model (two thirds users, one third
items, vectors of float32) from its SavedModel into load files and to submit the load jobs. `make bench` repeats it.

{facts}

## What was measured

* **(a) This pipeline**: `python -m beam_pipeline` from process start to exit, so all of it is in the time: imports,
  finding the run in MLflow, reading graph and ids, vectors, encoding, Avro files, and the requests of audit,
  publication and clean-up. DirectRunner, which is Beam's FnApiRunner.
* **(b) The script it replaces**, written for this benchmark: TensorFlow's `load_model`, `get_vocabulary()`,
  `get_weights()`, a pandas frame per tower, `load_table_from_dataframe`, which writes a Parquet file. A vector in the
  frame is a row of the matrix as a numpy array; Python lists would take half as much memory again. It does not look
  the run up in MLflow and publishes nothing, so it does less than (a).
* **(c) A naive Beam pipeline**: the model loaded with TensorFlow, `Create` of all rows, Beam's `WriteToBigQuery` with
  its defaults (JSON files), FnApiRunner. At {naive:g} million rows at most: all rows become part of the pipeline's
  description.
* **(d) The limit**: a process that reads the files with vectors and ids in blocks of 8 MB and writes as many bytes as
  (a), in files of 256 MB, with nothing in between. It submits no job.

**What is stubbed.** *BigQuery*: a small HTTP server takes the requests and says that every job is done; nothing is
loaded, and the audit of (a) gets the number of rows that it expects. A way waits for its answers, but its CPU and
memory are not counted. *Cloud Storage*: `gs://` is a folder on the local disk, and no way uploads anything: the load
jobs of (a), (b) and (c) name files in that folder. The models are on the same disk and in the page cache.

**How.** One process per run, in turn (a b c d, a b c d, …), bytecode compiled for all, an address space of
{memory_limit} GiB at most. Between runs, load files are deleted and the disk is synced; within a run nothing is synced,
so bytes written may still be in the page cache when it ends. A way that runs out of memory is not tried again at that
size. CPU seconds and peak memory (resident, sampled every 50 ms) are those of the process tree. Cells are the median,
then minimum and maximum. Vocabularies are inline constants of the graph up to {inline:g} million rows and files above,
unless the command says otherwise. MB are 10⁶ bytes.

## Results

{ratios}

{runs}

![rows against seconds, and rows against peak memory](benchmark.png)

What is read is what the process asks the kernel for, its imports among it (about 60 MB).

## What is fetched from Cloud Storage

One run at each size whose model is on `gs://`, served by a small HTTP server that counts bytes and requests
(`tests/support/storage_server.py`; the storage emulator reads a whole file for each range). Ids are fetched twice: when
they are cut into pieces, and with their vectors.

{fetched}

## Where the time of (a) goes

One run more at each size, by `benchmarks/phases.py`: seconds since the process began, and the peak of its memory so
far. The launcher notes the phases itself.

{phases}

## The writers alone

Encoding and writing is compared alone, in CPU seconds of one process: rows of {dimension} floats, in the form in which
the job has them, to one local file. Beam's `AvroRowWriter` gets {encoded_rows:,} dicts and is asked for its position
after each, as `WriteToBigQuery` does; ours gets ten times as many rows, in batches of 8 MB of vectors.
"""


def phase_tables(logs):
    """Returns what phases.py has printed at each size."""
    found = sorted(logs.glob(f"{PHASES}-*-1.log"), key=lambda log: int(log.name.split("-")[2].split("x")[0]))
    tables = []
    for log in found:
        rows, dimension = log.name.split("-")[2].split("x")
        text = log.read_text()
        if "\nphase " in text:
            table = text[text.rindex("\nphase ") + 1 :].rstrip()
            tables.append(f"{size_name((int(rows), int(dimension)))}:\n\n```\n{table}\n```")
    return "\n\n".join(tables)


def report(results, docs, args):
    """Writes benchmark.md and benchmark.png."""
    docs.mkdir(parents=True, exist_ok=True)
    text = TEXT.format(
        facts="\n".join(f"* {name}: {fact}" for name, fact in results.facts.items()),
        memory_limit=args.memory_limit,
        naive=args.naive_up_to,
        inline=INLINE_ROWS / 1e6,
        ratios=ratio_table(results),
        runs=run_table(results),
        fetched=fetched_table(results),
        phases=phase_tables(Path(args.work) / "logs"),
        dimension=results.dimension,
        encoded_rows=ENCODED_ROWS,
    )
    (docs / "benchmark.md").write_text(text, encoding="utf-8")
    plot(results, docs / "benchmark.png")
    print(f"written: {docs / 'benchmark.md'}, {docs / 'benchmark.png'}")


def parse(argv):
    """Returns the arguments, with `plan`: (size, number of runs) of each size."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--rows", default="0.1,1.5,5,10", help="sizes in million rows (default: %(default)s)")
    parser.add_argument("--dimension", type=int, default=64, help="floats per row (default: %(default)s)")
    parser.add_argument("--also", default="0.1x256", help="further sizes, with their dimension (default: %(default)s)")
    parser.add_argument(
        "--runs", default="5,5,3,2", help="runs at each size; the last counts for all further (default: %(default)s)"
    )
    parser.add_argument("--ways", default="abcd", help="which to run (default: %(default)s)")
    parser.add_argument(
        "--naive_up_to", type=float, default=0.1, help="million rows that (c) gets at most (default: %(default)s)"
    )
    parser.add_argument(
        "--hundred_million",
        action="store_true",
        help="also 100 million rows × 16, once, this pipeline and the limit alone; the model is 8 GB",
    )
    parser.add_argument("--vocabulary", choices=("list", "file"), help=f"default: list up to {INLINE_ROWS:,} rows")
    parser.add_argument(
        "--memory_limit", type=int, default=16, help="address space of a run, GiB (default: %(default)s)"
    )
    parser.add_argument("--timeout", type=float, default=1800, help="seconds of a run (default: %(default)g)")
    parser.add_argument("--work", default=str(ROOT / "bench"), help="folder for models and runs (default: bench)")
    parser.add_argument("--docs", default=str(ROOT / "docs"), help="folder for the report (default: docs)")
    parser.add_argument("--compiled", action="store_true", help="bytecode is there already")
    parser.add_argument("--keep", action="store_true", help="keep models of more than 2 million rows")
    parser.add_argument("--report", action="store_true", help="write the report of the last measurement again")
    args = parser.parse_args(argv)
    sizes = parse_sizes(args.rows, args.dimension)
    if not sizes:
        parser.error("--rows names no size")
    counts = [int(count) for count in args.runs.split(",")]
    args.plan = [(size, counts[min(at, len(counts) - 1)]) for at, size in enumerate(sizes)]
    args.plan += [(size, counts[0]) for size in parse_sizes(args.also, args.dimension)]
    args.plan += [(HUNDRED_MILLION, 1)] if args.hundred_million else []
    # Where files lie is of no interest to a reader.
    changed = {
        name: value
        for name, value in vars(args).items()
        if name not in ("plan", "docs", "work", "keep", "report", "compiled") and value != parser.get_default(name)
    }
    args.facts = machine_facts(
        [f"--{name}" if value is True else f"--{name}={value}" for name, value in changed.items()]
    )
    return args


def main(argv):
    """Measures and reports."""
    args = parse(argv)
    if not args.report:
        print("compiling bytecode", flush=True)
        for folder in [] if args.compiled else [*site.getsitepackages(), ROOT / "beam_pipeline", HERE]:
            compileall.compile_dir(folder, quiet=2, workers=0)
        Bench(args).run()
    results = json.loads((Path(args.work) / "results.json").read_text())
    report(Results(results), Path(args.docs), args)


if __name__ == "__main__":
    main(sys.argv[1:])
