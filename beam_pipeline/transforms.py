"""Transforms for other people's pipelines: one reads a tower's embeddings, one publishes a model's towers."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import apache_beam as beam
import numpy as np
from apache_beam.options.pipeline_options import GoogleCloudOptions
from apache_beam.pvalue import PBegin, PCollection

from beam_pipeline.bigquery import tables
from beam_pipeline.bigquery.publication import JOB_NAME, Publication
from beam_pipeline.bigquery.tables import Destination
from beam_pipeline.errors import ConfigError
from beam_pipeline.formats.model import Ending
from beam_pipeline.launch.options import IF_TAKEN, is_tower
from beam_pipeline.launch.vectors import not_served
from beam_pipeline.model import ModelTower, alone
from beam_pipeline.pipeline import Job, build
from beam_pipeline.reading import pieces
from beam_pipeline.reading.rows import Batch
from beam_pipeline.reading.tally import Report, tally
from beam_pipeline.reading.transforms import PIECES, REPORTS, ROWS, CutTower, ReadRows
from beam_pipeline.training import Run, Training, by_name


@dataclass
class ReadEmbeddings(beam.PTransform[PBegin, PCollection[tuple[str, np.ndarray]]]):
    """Reads a tower: nothing in, a `(id, vector)` for each id out, as `tuple[str, numpy.ndarray]`.

    A vector has the floats of the model: float32 as a rule (bfloat16 as float32). The vocabulary is cut in one
    sequential scan; ids and vectors are then read in parallel, some 8 MB at a time, by workers that have to reach the
    model's files.

    Every id is read exactly once. The checksum covers all bytes together, so elements are emitted before it is
    verified; if it does not match, or an id or a vector is not valid, the pipeline fails with the error that
    `ModelTower.read` would raise. A sink that must not see elements of a damaged file waits for the pipeline's end.

    >>> import apache_beam as beam
    >>> import beam_pipeline as bp
    >>> with bp.open_model(folder) as model:
    ...     tower = model.tower("item_layer")
    >>> with beam.Pipeline() as pipeline:
    ...     _ = (
    ...         pipeline
    ...         | bp.ReadEmbeddings(tower)
    ...         | beam.MapTuple(lambda item_id, vector: len(vector))
    ...         | beam.combiners.Count.PerElement()
    ...         | beam.Map(print)
    ...     )
    (8, 2014)

    Attributes:
        tower: of `Model.tower` or `Model.towers`.
    """

    tower: ModelTower

    def expand(self, pbegin: PBegin) -> PCollection[tuple[str, np.ndarray]]:
        """Applies the transform."""
        training = alone(self.tower)
        (tower,) = training.towers.values()
        towers = {training.run.run_id: tower}
        cut = pbegin | CutTower(towers)
        read = cut[PIECES] | ReadRows(towers, _rows)
        _ = (
            pbegin
            | "CreateCheck" >> beam.Create([training])
            | "Check" >> beam.Map(_check, *(beam.pvalue.AsIter(reports) for reports in (cut[REPORTS], read[REPORTS])))
        )
        rows: PCollection[tuple[str, np.ndarray]] = read[ROWS]
        return rows


def _check(training: Training, of_cutting: Iterable[Report], of_reading: Iterable[Report]) -> None:
    tally([*of_cutting, *of_reading], [training])


def _rows(batch: Batch) -> Iterator[tuple[str, np.ndarray]]:
    yield from zip(batch.ids.to_pylist(), batch.vectors, strict=True)


@dataclass
class PublishEmbeddings(beam.PTransform[PBegin, PCollection[str]]):
    """Publishes the towers of a model as one partition of their tables: nothing in, the launch id out, as `str`.

    The guarantees are those of the command line. Rows are loaded into staging tables, ids, vectors and checksums are
    verified on the way, the staging tables are audited, and all towers become visible in one transaction: readers see
    the whole model or nothing of it, and the same run again replaces its own rows. Then the launch id is emitted, for
    whatever should happen after the publication. An error fails the pipeline and nothing is published; what is left in
    staging expires after 48 hours.

    What the command line checks before it starts a job is checked here by the job: whether the dataset exists, the
    tables are compatible, the partition is taken. Whether vectors are as long as those of the table's latest partition
    is not checked.

    The pipeline needs the options of Beam's `WriteToBigQuery`, `--project` among them.

    >>> from datetime import date
    >>> import apache_beam as beam
    >>> import beam_pipeline as bp
    >>> with bp.open_model(folder) as model:
    ...     towers = model.towers({"user": "user_layer", "item": "item_layer"})
    >>> with beam.Pipeline(options=options) as pipeline:
    ...     published = pipeline | bp.PublishEmbeddings(
    ...         towers,
    ...         run=bp.Run("4e6f", "weekly", "1", "two_tower", date(2026, 3, 1), artifact_uri=""),
    ...         dataset=dataset,  # such as "my-project.raw_prod"
    ...         location="US",
    ...         temp_location=temp_location,  # such as "gs://my-bucket/tmp"
    ...     )
    ...     _ = published | beam.Map(lambda launch: print("published"))
    published

    Attributes:
        towers: of `Model.towers`: name, as in the names of table and columns → tower.
        run: the training; `train_date` is the partition.
        dataset: `PROJECT.DATASET`, which exists.
        location: the dataset's, such as "EU".
        temp_location: `gs://` folder for load files.
        table_prefix: tables are PREFIX_TOWER_embedding.
        if_partition_taken: the partition holds rows of another run: "fail", "replace" them or "keep" both.
        embedding_rows: publish the rows of an embedding even where the model serves something else.

    Raises:
        ConfigError: an argument is malformed, or the towers are of several models.
        VectorNotServedError: a tower continues after its embedding.
    """

    towers: Mapping[str, ModelTower]
    run: Run
    dataset: str
    location: str
    temp_location: str
    table_prefix: str = "two_tower"
    if_partition_taken: str = "fail"
    embedding_rows: bool = False

    def __post_init__(self) -> None:
        # Here, where the mistake is in the caller's code, rather than when the pipeline is built or runs.
        self._require_valid()
        for name, tower in self.towers.items():
            tail = tower.description.tail
            if tail.ending == Ending.GOES_ON and not self.embedding_rows:
                raise not_served(name, tower.layer, tail, "Publish the rows all the same with embedding_rows=True")

    def expand(self, pbegin: PBegin) -> PCollection[str]:
        """Applies the transform."""
        project, _, dataset = self.dataset.rpartition(".")
        named = [replace(tower.description, name=name) for name, tower in self.towers.items()]
        (model_path,) = {tower.model_path for tower in self.towers.values()}
        publication = Publication(
            destination=Destination(
                project=project,
                dataset=dataset,
                location=self.location,
                prefix=self.table_prefix,
                billing_project=pbegin.pipeline.options.view_as(GoogleCloudOptions).project,
            ),
            trainings=(Training(self.run, model_path, by_name(pieces.cover(named))),),
            temp_location=self.temp_location,
            if_partition_taken=self.if_partition_taken,
            launch_prefix=uuid.uuid4().hex[:12],
            job_name=pbegin.pipeline.options.get_all_options().get("job_name") or JOB_NAME,
        )
        return build(pbegin.pipeline, Job(publication, "columnar"))

    def _require_valid(self) -> None:
        if len({tower.model_path for tower in self.towers.values()}) != 1:
            raise ConfigError("towers: one or more, of one model: vectors of two trainings cannot be compared")
        if wrong := [name for name in self.towers if not is_tower(name)]:
            raise ConfigError(f"towers: {wrong[0]!r} is not a name of lower-case letters, digits and _")
        if not all(self.dataset.rpartition(".")):
            raise ConfigError(f"dataset={self.dataset!r}: PROJECT.DATASET")
        if not self.temp_location.startswith("gs://"):
            raise ConfigError(f"temp_location={self.temp_location!r}: load files need a bucket: gs://BUCKET/FOLDER")
        if self.if_partition_taken not in IF_TAKEN:
            raise ConfigError(f"if_partition_taken={self.if_partition_taken!r}: one of {', '.join(IF_TAKEN)}")
        try:  # As the publish script would, at the very end of the job.
            for text in (self.run.run_id, self.run.experiment_id):
                tables.literal(text)
        except ValueError as error:
            raise ConfigError(f"run: {error}") from error
