"""Writes a tower's batches into its staging table, through Beam's own `WriteToBigQuery`."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import apache_beam as beam
from apache_beam.io.gcp.bigquery import BigQueryDisposition, WriteToBigQuery
from apache_beam.pvalue import PCollection

from beam_pipeline import tables
from beam_pipeline.publication import Publication, partition_life
from beam_pipeline.transforms import Batch, to_rows

MAX_FILE_BYTES = 256 << 20
"""BigQuery reads load files in parallel; Beam's own limit of 4 TB would make one file of a whole bundle."""


@dataclass
class WriteStaging(beam.PTransform[PCollection[Batch], Any]):
    """Writes batches of a tower into the launch's staging table; Batch in, Beam's `WriteResult` out.

    The launch id comes as a side input from the step that made the tables, so nothing is written before. The table's
    name is known only then, which makes Beam load into temporary tables and copy from them: wait for both.

    Attributes:
        tower: name of the tower.
        publication: what is published.
        prepared: the launch id, once the staging tables are there.
    """

    tower: str
    publication: Publication
    prepared: beam.pvalue.AsSingleton

    def expand(self, batches: PCollection[Batch]) -> Any:
        """Applies the transform."""
        constants = tables.run_values(self.publication.run)
        return (
            batches
            | "Rows" >> beam.FlatMap(to_rows, self.tower, constants)
            | "Load" >> WriteToBigQuery(**sink_options(self.tower, self.publication, self.prepared))
        )


def sink_options(tower: str, publication: Publication, prepared: beam.pvalue.AsSingleton) -> dict[str, Any]:
    """Returns the arguments of `WriteToBigQuery` for a tower's staging table."""
    destination = publication.destination

    def staging(_: Any, launch: str) -> str:
        project, dataset, table = destination.staging(tower, launch).split(".")
        return f"{project}:{dataset}.{table}"

    return {
        "table": staging,
        "table_side_inputs": (prepared,),
        "schema": {"fields": tables.schema(tower)},
        "method": WriteToBigQuery.Method.FILE_LOADS,
        "temp_file_format": "AVRO",
        "create_disposition": BigQueryDisposition.CREATE_NEVER,
        # A truncating load would be no safer: job ids are deterministic, and the audit counts.
        "write_disposition": BigQueryDisposition.WRITE_APPEND,
        "custom_gcs_temp_location": publication.load_files,
        "max_file_size": MAX_FILE_BYTES,
        # For Beam's temporary tables, from which it copies into the staging table.
        "additional_bq_parameters": {
            "timePartitioning": {
                "type": "DAY",
                "field": tables.PARTITION_COLUMN,
                "expirationMs": partition_life(publication.run.train_date, datetime.now(UTC)),
            }
        },
    }
