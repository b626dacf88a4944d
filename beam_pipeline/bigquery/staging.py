"""Writes a tower's pieces into its staging table, through Beam's own file loads."""

import functools
from collections.abc import Callable, Iterator
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
from beam_pipeline.bigquery.avro import WritePieces, Writing
from beam_pipeline.bigquery.publication import Publication
from beam_pipeline.reading.rows import Batch, Element, to_rows
from beam_pipeline.reading.transforms import REPORTS, ROWS, ReadRows

LOADS, COPIES, FILES = "loads", "copies", "files"

MAX_FILE_BYTES = 192 << 20
"""BigQuery reads load files in parallel; Beam's own limit of 4 TB would make one file of a whole bundle.
The piece that reaches it is finished: files stay below 256 MB."""


@dataclass
class WriteStaging(beam.PTransform[PCollection[Element], dict[str, PCollection[Any]]]):
    """Reads pieces of a tower and writes their rows into the launch's staging table.

    `Element` in; out come "reports", a `Report` of each, and what Beam's file loads return: "loads" and "copies", the
    jobs once they are done, and "files".
    The launch id comes as a side input from the step that created the tables, so nothing is written before.

    Attributes:
        tower: name of the tower.
        publication: what is published.
        prepared: the launch id, once the staging tables are there.
        writer: "columnar" or "rows"; both write the same. Rows go through the built-in `WriteToBigQuery`, which loads a
            temporary table and copies it, since the table's name is known only while the job runs.
    """

    tower: str
    publication: Publication
    prepared: beam.pvalue.AsSingleton
    writer: str

    def expand(self, elements: PCollection[Element]) -> Any:
        """Applies the transform."""
        trainings = self.publication.trainings
        towers = {training.run.run_id: training.towers[self.tower] for training in trainings}
        columns = tables.staged_values(trainings)
        displayed = {
            "table": self.publication.destination.staging(self.tower, "<launch>"),
            "load_files": self.publication.load_files,
            "writer": self.writer,
        }
        if self.writer == "columnar":
            wide = any(tower.matrix.dtype == "float64" for tower in towers.values())
            values = {run_id: list(of_run.values()) for run_id, of_run in columns.items()}
            writing = Writing(self.tower, towers, values, "<f8" if wide else "<f4", displayed)
            loads = elements | "Load" >> WritePieces(destination=self._table(), writing=writing, **self._sink_options())
            return {
                LOADS: loads[WritePieces.DESTINATION_JOBID_PAIRS],
                COPIES: loads[WritePieces.DESTINATION_COPY_JOBID_PAIRS],
                FILES: loads[WritePieces.DESTINATION_FILE_PAIRS],
                REPORTS: loads[REPORTS],
            }
        split = functools.partial(_counted_rows, tower=self.tower, constants=columns)
        read = elements | "ReadRows" >> ReadRows(towers, split, displayed)
        written = read[ROWS] | "Load" >> WriteToBigQuery(
            table=self._table(), method=WriteToBigQuery.Method.FILE_LOADS, **self._sink_options()
        )
        return {
            LOADS: written.destination_load_jobid_pairs,
            COPIES: written.destination_copy_jobid_pairs,
            FILES: written.destination_file_pairs,
            REPORTS: read[REPORTS],
        }

    def _table(self) -> Callable[[Any, str], str]:
        """Returns a function from a launch to its staging table, as Beam spells it; Beam would display a method."""
        tower, destination = self.tower, self.publication.destination

        def staging(_: Any, launch: str) -> str:
            project, dataset, table = tables.split_name(destination.staging(tower, launch))
            return f"{project}:{dataset}.{table}"

        return staging

    def _sink_options(self) -> dict[str, Any]:
        return {
            "table_side_inputs": (self.prepared,),
            "schema": {"fields": tables.staging_schema(self.tower)},
            "temp_file_format": "AVRO",
            "create_disposition": BigQueryDisposition.CREATE_NEVER,
            # Truncating would be no safer: job ids are deterministic, and the audit counts.
            "write_disposition": BigQueryDisposition.WRITE_APPEND,
            "custom_gcs_temp_location": self.publication.load_files,
            "max_file_size": MAX_FILE_BYTES,
            # Of load and copy jobs; by default Beam's run in the table's project.
            "load_job_project_id": self.publication.destination.job_project,
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
            self._client = self._create()
        return getattr(self._client, name)

    def __getstate__(self) -> dict[str, Any]:
        return {"_kms_key": self._kms_key, "_client": None}

    def _create(self) -> Any:
        # Without emulators, as BigQueryWrapper creates its own.
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


def _counted_rows(batch: Batch, tower: str, constants: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    metrics.count(f"write-rows-{tower}", len(batch.ids))
    yield from to_rows(batch, tower, constants)
