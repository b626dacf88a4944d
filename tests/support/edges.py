"""Vectors of float32 at the edges of their range, loaded as the job's files are."""

from datetime import date

import numpy as np
import pyarrow as pa
from apache_beam.io.filesystems import FileSystems
from google.cloud import bigquery

from beam_pipeline.bigquery import avro, tables
from beam_pipeline.reading.rows import Batch

_LIMITS = np.finfo(np.float32)
VECTORS = np.array(
    [
        [0.1, 1 / 3, np.nextafter(np.float32(1), np.float32(2)), np.pi],
        [_LIMITS.max, _LIMITS.min, _LIMITS.tiny, -_LIMITS.tiny],
        [_LIMITS.smallest_subnormal, -_LIMITS.smallest_subnormal, 0.0, -0.0],
    ],
    np.float32,
)


def load(client, table, folder):
    """Loads a file of floats into a new table, with the schema of a staging table as Beam gives it, and copies it.

    The copy is what Beam does where one load job does not suffice. Returns the vectors of the copy, as float64.
    """
    schema, sync = {"fields": tables.staging_schema("user")}, bytes(range(16))
    batch = Batch("run", pa.array(["a", "b", "c"]), VECTORS)
    path = f"{folder}/edges.avro"
    with FileSystems.create(path, "application/avro") as file:
        file.write(avro.file_header(avro.avro_schema(schema, "<f4"), sync))
        for block in avro.blocks(batch, [date(2026, 3, 1), 0], sync, "<f4"):
            file.write(b"".join(block))
    config = bigquery.LoadJobConfig(
        source_format="AVRO", schema=tables.staging_fields("user"), use_avro_logical_types=True
    )
    loaded, copied = f"{table}_loaded", f"{table}_copied"
    client.create_table(bigquery.Table(copied, schema=tables.staging_fields("user")))
    try:
        client.load_table_from_uri(path, loaded, job_config=config).result()
        append = bigquery.CopyJobConfig(write_disposition="WRITE_APPEND", create_disposition="CREATE_NEVER")
        client.copy_table(loaded, copied, job_config=append).result()
        rows = client.query_and_wait(f"SELECT user_embedding FROM `{copied}` ORDER BY user_id")
        return np.array([row[0] for row in rows], np.float64)
    finally:
        FileSystems.delete([path])
        for name in (loaded, copied):
            client.delete_table(name, not_found_ok=True)
