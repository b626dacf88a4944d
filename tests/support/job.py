"""Runs the whole job against emulators and reads back what it published; for tests of several files."""

import re
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta

from google.cloud import storage

from beam_pipeline.bigquery.tables import Destination
from beam_pipeline.launch.launcher import launch
from beam_pipeline.launch.options import parse

MARCH_1 = datetime(2026, 3, 1, 23, 30, tzinfo=UTC)
MARCH_2 = datetime(2026, 3, 2, 0, 30, tzinfo=UTC)


class Job:
    """Runs the job into a dataset of its own.

    Attributes:
        client: of the emulated BigQuery.
        dataset: made for this test.
    """

    def __init__(self, client, dataset, store, temp_location, commands):
        self.client = client
        self.dataset = dataset
        self.destination = Destination(client.project, dataset, "US", "two_tower")
        self._flags = [
            f"--tracking_uri={store.uri}",
            f"--dataset={dataset}",
            f"--temp_location={temp_location}",
        ]
        self._temp_location = temp_location
        self._commands = commands

    def run(self, run_id, *flags):
        """Runs in this process; returns the exit code."""
        return launch(self.config(run_id, *flags))

    def publish_all(self, store, models, *flags):
        """Publishes models in one job, each as the training of another day; asserts that every row is its library's.

        Args:
            store: to which they are logged, in an experiment of this test.
            models: by their names.
            flags: the same for all.
        """
        runs = {}
        for number, (name, model) in enumerate(models.items()):
            start = MARCH_1 + timedelta(days=number)
            runs[name] = (str(start.date()), store.log(model, name, start, experiment=self.dataset))
        assert self.run(None, f"--experiment_name={self.dataset}", "--all_runs", *flags) == 0
        for tower in ("user", "item"):
            rows = self.rows(tower)
            assert rows.keys() == {*runs.values()}
            for name, model in models.items():
                assert rows[runs[name]] == model.rows(tower), f"{tower} of {name}"

    def config(self, run_id, *flags):
        return parse([*self._flags, *([f"--run_id={run_id}"] if run_id else []), *flags])

    def command(self, run_id, *flags):
        which = [f"--run_id={run_id}"] if run_id else []
        return [sys.executable, "-m", "beam_pipeline", *self._flags, *which, *flags]

    def start(self, run_id, *flags, **options):
        """Starts it in a process of its own, which has its imports done; returns the process."""
        return self._commands.start(self.command(run_id, *flags), **options)

    def subprocess(self, run_id, *flags, **options):
        """Runs in such a process; returns what `subprocess.run` does."""
        return self._commands.run(self.command(run_id, *flags), **options)

    def cold(self, run_id, *flags, **options):
        """Runs as a user does, imports and all."""
        return subprocess.run(self.command(run_id, *flags), capture_output=True, text=True, check=False, **options)

    def dataflow_graph(self, run_id, *flags):
        """Builds the job for Dataflow, where nobody runs it; returns the graph that it would be given, as bytes."""
        bucket, _, folder = self._temp_location.removeprefix("gs://").partition("/")
        done = self.subprocess(
            run_id,
            *flags,
            "--runner=DataflowRunner",
            "--region=europe-west1",
            f"--project={self.client.project}",
            f"--template_location={self._temp_location}/job",
            f"--staging_location={self._temp_location}",
            "--no_auth",
        )
        assert done.returncode == 0, done.stderr[-2000:]
        blobs = {blob.name: blob for blob in storage.Client().list_blobs(bucket, prefix=f"{folder}/")}
        assert f"{folder}/job" in blobs
        (graph,) = [name for name in blobs if name.endswith("/pipeline.pb")]
        return blobs[graph].download_as_bytes()

    def hooked(self, tmp_path, hook, run_id, *flags):
        """Starts the job in a process of its own whose code a test changes first; nothing else can stop it midway."""
        script = tmp_path / "hooked.py"
        script.write_text(
            f"{hook}\nimport sys\n"
            "from beam_pipeline.launch.launcher import launch\n"
            "from beam_pipeline.launch.options import parse\n"
            "sys.exit(launch(parse(sys.argv[1:])))\n"
        )
        return self._commands.start([sys.executable, str(script), *self.command(run_id, *flags)[3:]])

    def query(self, sql):
        sql = sql.format(
            user=f"{self.dataset}.two_tower_user_embedding",
            item=f"{self.dataset}.two_tower_item_embedding",
            log=f"{self.dataset}.two_tower_embedding_log",
        )
        return [row.values() for row in self.client.query_and_wait(sql)]

    def rows(self, tower, where="TRUE"):
        """Returns (train_date, run id) → {id: vector}; asserts that no id is there twice."""
        found = {}
        sql = f"SELECT train_date, mlflow_run_id, {tower}_id, {tower}_embedding FROM {{{tower}}} WHERE {where}"
        for day, run_id, name, vector in self.query(sql):
            model = found.setdefault((str(day), run_id), {})
            assert name not in model
            model[name] = vector
        return found

    def published(self):
        """Returns {(train_date, run id): (users, items)}; fails if one tower was published without the other."""
        users, items = self.rows("user"), self.rows("item")
        assert users.keys() == items.keys()
        return {key: (len(users[key]), len(items[key])) for key in users}

    def tables(self):
        return {table.table_id for table in self.client.list_tables(self.dataset)}


DESTINATION_TABLES = {
    "two_tower_user_embedding",
    "two_tower_item_embedding",
    "two_tower_embedding_lock",
    "two_tower_embedding_log",
}


def refused(job, capsys, run_id, *flags):
    """Runs what must fail; returns its one line."""
    before = job.tables()
    assert job.run(run_id, *flags) == 1
    error = capsys.readouterr().err.splitlines()
    lines = [line for line in error if not re.match(r"(INFO|WARNING):| |<|Traceback|\w+(\.\w+)*Error", line)]
    assert lines[-1].startswith("error: ")
    assert job.tables() == before
    return lines[-1]


def error_of(done):
    """Returns the one line that a failed job ends with."""
    assert done.returncode == 1, done.stderr[-3000:]
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return line


class Reader:
    """Asks for both towers in one query, again and again, and keeps every answer.

    Attributes:
        seen: {(users, items) of the run}, as numbers of rows.
    """

    def __init__(self, job, run_id):
        self._job, self._run_id = job, run_id
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._read)
        self.seen = set()

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exc_info):
        self._over.set()
        self._thread.join()

    def _read(self):
        counts = ", ".join(
            f"(SELECT COUNT(*) FROM {{{tower}}} WHERE mlflow_run_id = '{self._run_id}')" for tower in ("user", "item")
        )
        while not self._over.is_set():
            try:
                self.seen.update(self._job.query(f"SELECT {counts}"))
            except Exception as error:
                if not re.search("not found|does not exist", str(error), re.IGNORECASE):
                    raise
            time.sleep(0.05)
