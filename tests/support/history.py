"""Puts models into the tables of a dataset as published trainings, and compares them."""

import io
import re
import sys
from datetime import date

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from google.cloud import bigquery, storage

from beam_pipeline.bigquery import tables
from beam_pipeline.bigquery.tables import Destination
from beam_pipeline.comparison import command
from beam_pipeline.comparison import tables as result_tables

RESULT_TABLES = {"two_tower_embedding_comparison", "two_tower_item_embedding_change", "two_tower_embedding_lock"}


class History:
    """A dataset with published trainings.

    Attributes:
        client: of the emulated BigQuery.
        dataset: its name.
        destination: the tables.
    """

    def __init__(self, client, dataset, temp_location, commands):
        self.client = client
        self.dataset = dataset
        self.destination = Destination(client.project, dataset, "US", "two_tower")
        self._temp_location = temp_location
        self._commands = commands
        self._flags = [f"--dataset={dataset}", f"--temp_location={temp_location}", f"--project={client.project}"]

    def publish(self, day, run_id, model, *, ids=None, logged=True, name=None):
        """Adds a training: {tower: vectors}, with ids that are counted unless they are given."""
        for tower, vectors in model.items():
            names = [str(one) for one in (ids or {}).get(tower, [f"{tower}-{n:05}" for n in range(len(vectors))])]
            table = bigquery.Table(self.destination.table(tower), schema=tables.schema_fields(tower))
            table.time_partitioning = bigquery.TimePartitioning(type_="DAY", field="train_date")
            self.client.create_table(table, exists_ok=True)
            n = len(names)
            columns = {
                "train_date": pa.array([date.fromisoformat(day)] * n),
                "mlflow_experiment_id": ["1"] * n,
                "mlflow_experiment_name": ["two_tower"] * n,
                "mlflow_run_id": [run_id] * n,
                "mlflow_run_name": [name or f"weekly {run_id}"] * n,
                f"{tower}_id": names,
                f"{tower}_embedding": pa.ListArray.from_arrays(
                    np.arange(n + 1, dtype=np.int32) * vectors.shape[1], vectors.astype(float).ravel()
                ),
            }
            self.load(self.destination.table(tower), pa.table(columns))
        if logged:
            self.log(day, run_id, {tower: len(vectors) for tower, vectors in model.items()}, name)

    def log(self, day, run_id, rows, name=None):
        table = bigquery.Table(self.destination.log, schema=tables.LOG_SCHEMA)
        self.client.create_table(table, exists_ok=True)
        for tower, count in rows.items():
            self.client.query_and_wait(
                f"INSERT INTO `{self.destination.log}` (published_at, train_date, mlflow_experiment_name, mlflow_run_id, "
                f"mlflow_run_name, tower, row_count) VALUES (CURRENT_TIMESTAMP(), DATE '{day}', 'two_tower', '{run_id}', "
                f"'{name or f'weekly {run_id}'}', '{tower}', {count})"
            )

    def load(self, name, rows):
        content = io.BytesIO()
        pq.write_table(rows, content)
        bucket, _, folder = self._temp_location.removeprefix("gs://").partition("/")
        blob = storage.Client(project=self.client.project).bucket(bucket).blob(f"made/{folder}/{name}.parquet")
        blob.upload_from_string(content.getvalue())
        config = bigquery.LoadJobConfig(source_format="PARQUET", write_disposition="WRITE_APPEND")
        self.client.load_table_from_uri(f"gs://{blob.bucket.name}/{blob.name}", name, job_config=config).result()

    def compare(self, *flags):
        """Runs in this process; returns the exit code."""
        return command.main([*self._flags, *flags])

    def report(self, *flags):
        return command.report([f"--dataset={self.dataset}", f"--project={self.client.project}", *flags])

    def command(self, *flags, module="beam_pipeline.compare"):
        return [sys.executable, "-m", module, *self._flags, *flags]

    def start(self, *flags, **options):
        """Starts it in a process of its own, which has its imports done; returns the process."""
        return self._commands.start(self.command(*flags), **options)

    def subprocess(self, *flags, **options):
        """Runs in such a process; returns what `subprocess.run` does."""
        return self._commands.run(self.command(*flags), **options)

    def hooked(self, tmp_path, hook, *flags):
        """Starts the command in a process of its own whose code a test changes first."""
        script = tmp_path / "hooked.py"
        script.write_text(
            f"{hook}\nimport sys\nfrom beam_pipeline.comparison.command import main\nsys.exit(main(sys.argv[1:]))\n"
        )
        return self._commands.start([sys.executable, str(script), *self._flags, *flags])

    def query(self, sql):
        return [row.values() for row in self.client.query_and_wait(sql.format(d=self.dataset))]

    def results(self, where="TRUE"):
        """Returns {(earlier run, later run, tower): columns}; asserts that none is there twice."""
        name = result_tables.comparison_table(self.destination)
        found = {}
        for row in self.client.query_and_wait(f"SELECT * FROM `{name}` WHERE {where}"):
            key = row["previous_mlflow_run_id"], row["mlflow_run_id"], row["tower"]
            assert key not in found
            found[key] = dict(row.items())
        return found

    def changes(self, tower, where="TRUE"):
        """Returns {(earlier run, later run): {id: (score change, distance, norm before, norm after)}}."""
        name = result_tables.change_table(self.destination, tower)
        columns = ", ".join((f"{tower}_id", *result_tables.CHANGE_COLUMNS))
        found = {}
        sql = f"SELECT previous_mlflow_run_id, mlflow_run_id, {columns} FROM `{name}` WHERE {where}"
        for before, after, one, *values in self.query(sql):
            ids = found.setdefault((before, after), {})
            assert one not in ids
            ids[one] = tuple(values)
        return found

    def tables(self):
        return {table.table_id for table in self.client.list_tables(self.dataset)}

    def files(self):
        """Returns what is left below the temp location."""
        bucket, _, folder = self._temp_location.removeprefix("gs://").partition("/")
        blobs = storage.Client(project=self.client.project).bucket(bucket).list_blobs(prefix=f"{folder}/")
        return [blob.name for blob in blobs]


def refused(history, capsys, *flags, code=1):
    """Runs what must fail; returns its one line."""
    before = history.tables()
    assert history.compare(*flags) == code
    error = capsys.readouterr().err.splitlines()
    lines = [line for line in error if not re.match(r"(INFO|WARNING):| |<|Traceback|\w+(\.\w+)*Error", line)]
    assert lines[-1].startswith("error: ")
    assert history.tables() == before
    return lines[-1]
