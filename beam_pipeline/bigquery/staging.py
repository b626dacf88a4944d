"""Writes a tower's batches into its staging table, through Beam's own `WriteToBigQuery`."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import apache_beam as beam
from apache_beam.io.gcp.bigquery import BigQueryDisposition, WriteToBigQuery
from apache_beam.io.gcp.bigquery_tools import BigQueryWrapper
from apache_beam.io.gcp.internal.clients.bigquery import EncryptionConfiguration
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.pvalue import PCollection

from beam_pipeline import emulators, metrics
from beam_pipeline.bigquery import tables
from beam_pipeline.bigquery.avro import WriteBatches
from beam_pipeline.bigquery.publication import Publication
from beam_pipeline.reading.rows import Batch, to_rows

MAX_FILE_BYTES = 192 << 20
"""BigQuery reads load files in parallel; Beam's own limit of 4 TB would make one file of a whole bundle.
The batch that reaches it is finished: files stay below 256 MB."""


@dataclass
class WriteStaging(beam.PTransform[PCollection[Batch], Any]):
    """Writes batches of a tower into the launch's staging table; Batch in, Beam's `WriteResult` out.

    The launch id comes as a side input from the step that made the tables, so nothing is written before.

    Attributes:
        tower: name of the tower.
        publication: what is published.
        prepared: the launch id, once the staging tables are there.
        writer: "columnar" or "rows"; both write the same. Rows go through stock `WriteToBigQuery`, which loads a
            temporary table and copies it, since the table's name is known only while the job runs.
    """

    tower: str
    publication: Publication
    prepared: beam.pvalue.AsSingleton
    writer: str

    def expand(self, batches: PCollection[Batch]) -> Any:
        """Applies the transform."""
        constants = {training.run.run_id: tables.run_values(training.run) for training in self.publication.trainings}
        counted = batches | "Count" >> beam.ParDo(_CountFn(self.tower, self.publication, self.writer))
        if self.writer == "columnar":
            values = {run_id: list(columns.values()) for run_id, columns in constants.items()}
            return counted | "Load" >> WriteBatches(constants=values, **self._sink_options())
        rows = counted | "Rows" >> beam.FlatMap(to_rows, self.tower, constants)
        return rows | "Load" >> WriteToBigQuery(**self._sink_options())

    def _sink_options(self) -> dict[str, Any]:
        tower, destination = self.tower, self.publication.destination

        def staging(_: Any, launch: str) -> str:
            project, dataset, table = tables.split_name(destination.staging(tower, launch))
            return f"{project}:{dataset}.{table}"

        return {
            "table": staging,
            "table_side_inputs": (self.prepared,),
            "schema": {"fields": tables.schema(tower)},
            "method": WriteToBigQuery.Method.FILE_LOADS,
            "temp_file_format": "AVRO",
            "create_disposition": BigQueryDisposition.CREATE_NEVER,
            # Truncating would be no safer: job ids are deterministic, and the audit counts.
            "write_disposition": BigQueryDisposition.WRITE_APPEND,
            "custom_gcs_temp_location": self.publication.load_files,
            "max_file_size": MAX_FILE_BYTES,
            # Of load and copy jobs; by default Beam's run in the table's project.
            "load_job_project_id": destination.job_project,
            # Beam drops its own kms_key for FILE_LOADS.
            "additional_bq_parameters": (
                {"destinationEncryptionConfiguration": {"kmsKeyName": self.publication.kms_key}}
                if self.publication.kms_key
                else None
            ),
            # Those parameters are of load jobs alone, and Beam has none for copy jobs; a client is what it takes.
            "test_client": (
                _SinkClient(self.publication.kms_key) if self.publication.kms_key or emulators.emulated() else None
            ),
        }


class _SinkClient:
    """Beam's own BigQuery client for its sink, created where it is used: this travels to the workers.

    Its copy jobs carry a Cloud KMS key: rows of more than one load job, and all of the built-in `WriteToBigQuery` here,
    are loaded into temporary tables and copied from there, and a project whose policy demands keys refuses a copy job
    without. And it connects its process to the emulators, where the environment names them: some stages run nothing
    but Beam's own DoFns.
    """

    def __init__(self, kms_key: str | None) -> None:
        self._kms_key = kms_key
        self._client: Any = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # What pickle looks for.
            raise AttributeError(name)
        if self._client is None:
            self._client = self._make()
        return getattr(self._client, name)

    def __getstate__(self) -> dict[str, Any]:
        return {"_kms_key": self._kms_key, "_client": None}

    def _make(self) -> Any:
        # Without emulators, as BigQueryWrapper makes its own.
        client = emulators.beam_client() or BigQueryWrapper._bigquery_client(PipelineOptions())
        if self._kms_key is None:
            return client
        insert = client.jobs.Insert

        @functools.wraps(insert)  # The method's description is an attribute of it.
        def insert_keyed(request: Any, **options: Any) -> Any:
            if copy := request.job.configuration.copy:
                copy.destinationEncryptionConfiguration = EncryptionConfiguration(kmsKeyName=self._kms_key)
            return insert(request, **options)

        client.jobs.Insert = insert_keyed
        return client


class _CountFn(beam.DoFn):
    """Counts rows; its display data stand for all that is written, since a runner gets those of DoFns alone."""

    def __init__(self, tower: str, publication: Publication, writer: str) -> None:
        self._tower = tower
        self._shown = {
            "table": publication.destination.staging(tower, "<launch>"),
            "load_files": publication.load_files,
            "writer": writer,
        }

    def display_data(self) -> dict[str, Any]:
        return self._shown

    def setup(self) -> None:
        emulators.connect_if_emulated()  # For Beam's DoFn that writes the rows, too, which runs in the same stage.

    def process(self, batch: Batch) -> Iterator[Batch]:
        metrics.count(f"write-rows-{self._tower}", len(batch.ids))
        yield batch
