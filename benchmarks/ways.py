"""The ways that bench.py compares, each a program of its own: `python ways.py WAY …`.

    pipeline  MODEL [ARGUMENT …]   (a) python -m beam_pipeline, as it is
    phases    MODEL [ARGUMENT …]   the same, noting when each phase ends (phases.py)
    script    MODEL                (b) the way before: TensorFlow, pandas, load_table_from_dataframe
    naive     MODEL                (c) a Beam pipeline as one writes it first: Create the rows, WriteToBigQuery as JSON
    limit     MODEL BYTES          (d) reads the same bytes, writes as many as (a), nothing in between
    encode    columnar|stock ROWS DIMENSION    encoding and writing alone; prints CPU seconds

MODEL is the line of JSON that make_model.py printed. Load files go below the folder BENCH_BUCKET, which is
`gs://bench/` to the job; the BigQuery that takes their load jobs is fake_bigquery.py, at BIGQUERY_EMULATOR_HOST.

Imports are inside the functions: each is part of its way.
"""

import json
import os
import sys
import time
import uuid
from pathlib import Path

import local_bucket

TOWERS = ("user", "item")
DATASET = "raw_dev"
PROJECT = os.environ.get("GOOGLE_CLOUD_PROJECT", "local")
BLOCK_BYTES = 8 << 20
FILE_BYTES = 256 << 20


def phases(model, *arguments):
    """Runs (a) under phases.py."""
    pipeline(model, *arguments, program="phases.py")


def pipeline(model, *arguments, program=None):
    """Runs the real command line; of its surroundings BigQuery and the bucket alone are replaced."""
    import runpy

    local_bucket.install()
    sys.argv = [
        "beam_pipeline",
        f"--run_id={model['run_id']}",
        f"--project={PROJECT}",
        f"--dataset={DATASET}",
        f"--temp_location={local_bucket.BUCKET}tmp",
        *arguments,
    ]
    if program:
        runpy.run_path(str(Path(__file__).with_name(program)), run_name="__main__")
    else:
        runpy.run_module("beam_pipeline", run_name="__main__", alter_sys=True)


def script(model):
    """Loads the model and sends a frame per tower.

    `load_table_from_dataframe` is Google's own up to the Parquet file on disk. Its upload is left out, as (a)'s
    is: the file stays where it is, and the load job names it.
    """
    import pandas as pd
    import tensorflow as tf
    from google.auth.credentials import AnonymousCredentials
    from google.cloud import bigquery

    from beam_pipeline.bigquery import tables

    class Client(bigquery.Client):
        def load_table_from_file(self, file_obj, destination, *, job_config, **_):
            name = f"{uuid.uuid4().hex}.parquet"
            os.link(file_obj.name, Path(os.environ["BENCH_BUCKET"], name))
            return self.load_table_from_uri(local_bucket.BUCKET + name, destination, job_config=job_config)

    keras_model = tf.keras.models.load_model(model["folder"])
    client = Client(project=PROJECT, credentials=AnonymousCredentials())

    def send(tower):
        lookup, embedding = getattr(keras_model, f"{tower}_layer").layers
        ids = lookup.get_vocabulary()[1:]  # The first is the token for unknown ids.
        vectors = embedding.get_weights()[0][1:]
        # Rows as numpy arrays: `tolist()` works too, and takes half as much memory again.
        frame = pd.DataFrame({**_constants(model), f"{tower}_id": ids, f"{tower}_embedding": list(vectors)})
        options = bigquery.LoadJobConfig(
            schema=tables.schema_fields(tower),
            time_partitioning=bigquery.TimePartitioning(type_="DAY", field=tables.PARTITION_COLUMN),
            write_disposition="WRITE_APPEND",
        )
        client.load_table_from_dataframe(frame, _table(tower, "."), job_config=options).result()

    for tower in TOWERS:
        send(tower)


def naive(model):
    """Loads the model, turns it into dicts, and leaves the rest to Beam's defaults."""
    local_bucket.install()
    import apache_beam as beam
    import tensorflow as tf
    from apache_beam.io.gcp.bigquery import WriteToBigQuery
    from apache_beam.options.pipeline_options import PipelineOptions

    from beam_pipeline import emulators
    from beam_pipeline.bigquery import tables

    emulators.connect()
    keras_model = tf.keras.models.load_model(model["folder"])
    options = PipelineOptions(
        ["--runner=FnApiRunner", f"--project={PROJECT}", f"--temp_location={local_bucket.BUCKET}tmp"]
    )
    with beam.Pipeline(options=options) as job:
        for tower in TOWERS:
            lookup, embedding = getattr(keras_model, f"{tower}_layer").layers
            ids = lookup.get_vocabulary()[1:]
            vectors = embedding.get_weights()[0][1:].tolist()
            constants = {name: str(value) for name, value in _constants(model).items()}
            rows = [
                {**constants, f"{tower}_id": an_id, f"{tower}_embedding": vector}
                for an_id, vector in zip(ids, vectors, strict=True)
            ]
            _ = (
                job
                | f"Create {tower}" >> beam.Create(rows)
                | f"Write {tower}"
                >> WriteToBigQuery(
                    _table(tower, ":"),
                    schema={"fields": tables.schema(tower)},
                    method=WriteToBigQuery.Method.FILE_LOADS,
                )
            )


def limit(model, size):
    """Reads vectors and ids in blocks and writes the block over and over: what the disk and the kernel take."""
    folder = Path(model["folder"])
    data = [*folder.glob("variables/variables.data-*")]
    ids = [*folder.glob("assets/*")] or [folder / "saved_model.pb"]
    buffer = memoryview(bytearray(BLOCK_BYTES))
    for path in [*data, *ids]:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    missing, number = int(size), 0
    while missing:
        with Path(os.environ["BENCH_BUCKET"], f"{number}.bytes").open("wb", buffering=0) as file:
            space = min(FILE_BYTES, missing)
            missing -= space
            while space:
                space -= file.write(buffer[: min(BLOCK_BYTES, space)])
        number += 1


def encode(writer, rows, dimension):
    """Encodes rows as Avro into one file; both writers start from what the job hands them.

    That is batches for ours and dicts for Beam's, made before the clock starts, 8 MB of vectors at a time. The stock
    sink asks its writer for the position after each row, to compare it with the file size limit; so does this.
    """
    from datetime import date

    import numpy as np
    import pyarrow as pa
    from apache_beam.io.gcp import bigquery_tools

    from beam_pipeline.bigquery import avro, tables
    from beam_pipeline.reading.pieces import PIECE_BYTES
    from beam_pipeline.reading.rows import Batch, to_rows

    rows, dimension = int(rows), int(dimension)
    schema = {"fields": tables.staging_schema("user")}
    constants = {tables.PARTITION_COLUMN: date(2026, 3, 1), tables.TRAINING_COLUMN: 0}
    random = np.random.default_rng(1)
    path = Path(os.environ["BENCH_BUCKET"], "encoded.avro")
    spent = 0.0
    with path.open("wb") as file:
        sync = bytes(16)
        if writer == "columnar":
            file.write(avro.file_header(avro.avro_schema(schema, "<f4"), sync))
        else:
            stock = bigquery_tools.AvroRowWriter(file, bigquery_tools.parse_table_schema_from_json(json.dumps(schema)))
        step = max(PIECE_BYTES // (4 * dimension), 1)
        for first in range(0, rows, step):
            count = min(step, rows - first)
            names = pa.array([f"user-{number:08}" for number in range(first, first + count)])
            batch = Batch("run", names, random.random((count, dimension), "f4"))
            if writer == "columnar":
                started = time.process_time()
                for block in avro.blocks(batch, list(constants.values()), sync, "<f4"):
                    file.writelines(block)
            else:
                dicts = list(to_rows(batch, "user", {"run": constants}))
                started = time.process_time()
                for row in dicts:
                    stock.write(row)
                    stock.tell()
            spent += time.process_time() - started
        started = time.process_time()
        file.flush()
        spent += time.process_time() - started
        size = file.tell()
    print(json.dumps({"rows": rows, "cpu_seconds": spent, "bytes": size}))


def _constants(model):
    """The columns that are the same in every row, of the same lengths as the pipeline writes."""
    from datetime import date

    return {
        "train_date": date(2026, 3, 1),
        "mlflow_experiment_id": "1",
        "mlflow_experiment_name": "benchmark",
        "mlflow_run_id": model["run_id"],
        "mlflow_run_name": model.get("run_name", "a run"),
    }


def _table(tower, separator):
    return f"{PROJECT}{separator}{DATASET}.two_tower_{tower}_embedding"


def main():
    """Runs one way."""
    way, *arguments = sys.argv[1:]
    if way != "encode":
        arguments[0] = json.loads(arguments[0])
    {"pipeline": pipeline, "phases": phases, "script": script, "naive": naive, "limit": limit, "encode": encode}[way](
        *arguments
    )


if __name__ == "__main__":
    main()
