"""The transform: a tower's ids in, computed batches and reports out; Beam's RunInference between them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
from apache_beam.ml.inference.base import ModelHandler, PredictionResult, RunInference
from apache_beam.pvalue import PBegin, TaggedOutput
from apache_beam.typehints.decorators import no_annotations

from beam_pipeline import emulators, metrics
from beam_pipeline.bigquery.tables import Destination
from beam_pipeline.computing import columns as inputs
from beam_pipeline.computing import model
from beam_pipeline.computing.sources import Context
from beam_pipeline.computing.tower import ComputedTower
from beam_pipeline.errors import ModelCallError, PipelineError
from beam_pipeline.reading.rows import Batch
from beam_pipeline.reading.tally import Report
from beam_pipeline.reading.transforms import REPORTS

BATCHES = "batches"

_TOGETHER = 16
"""Shares that stay together where there are several runs, so that a worker does not load a model for each."""


@dataclass(frozen=True)
class Chunk:
    """Ids, and what else a tower is called with.

    Attributes:
        run_id: of which run's model.
        ids: Arrow string array [n].
        table: the columns of the tower's inputs.
    """

    run_id: str
    ids: pa.Array
    table: pa.RecordBatch

    def __len__(self) -> int:
        """Returns the number of ids, which RunInference counts."""
        return len(self.ids)


class Models:
    """The parts that compute a tower, by run; the models are loaded when they are first called."""

    def __init__(self, towers: Mapping[str, ComputedTower]) -> None:
        self._towers = towers

    def part(self, run_id: str) -> model.Part:
        """Returns what computes the tower of a run."""
        tower = self._towers[run_id]
        part = model.loaded(tower.model_path).part(tower.name, tower.part)
        if (part.signature.inputs, part.signature.dimension) != (tower.signature.inputs, tower.signature.dimension):
            raise ModelCallError(
                f"tower {tower.name!r}: {tower.model_path} changed since the job was started; start it again"
            )
        return part


class TowerHandler(ModelHandler[Chunk, PredictionResult, Models]):
    """Calls a tower with chunks; an element is a batch already.

    Beam's own handler for TensorFlow loads with Keras, which no longer reads SavedModels, and needs TensorFlow Hub.
    """

    def __init__(self, towers: Mapping[str, ComputedTower]) -> None:
        super().__init__()
        self._towers = towers

    def load_model(self) -> Models:
        """Returns the models of this process; a single one is loaded at once."""
        emulators.connect_if_emulated()
        models = Models(self._towers)
        if len(self._towers) == 1:  # Of several, a worker may be given the ids of a few alone.
            models.part(next(iter(self._towers)))
        return models

    def run_inference(
        self, batch: Any, model: Models, inference_args: dict[str, Any] | None = None
    ) -> Iterable[PredictionResult]:
        """Returns the vectors of a chunk, or what is wrong with it: a retry would not fix that."""
        part, tower = model.part(batch.run_id), self._towers[batch.run_id]
        try:
            return [PredictionResult(batch, compute(part, batch, tower))]
        except PipelineError as problem:
            return [PredictionResult(batch, problem)]

    def should_skip_batching(self) -> bool:
        """Returns True: a chunk is as large as a batch should be."""
        return True

    def get_num_bytes(self, batch: Any) -> int:
        """Returns the bytes of a chunk, for Beam's metrics."""
        return int(batch.table.nbytes)

    def get_metrics_namespace(self) -> str:
        """Returns the namespace of Beam's metrics of the model."""
        return f"{metrics.NAMESPACE}_inference"


def compute(part: model.Part, chunk: Chunk, tower: ComputedTower) -> np.ndarray:
    """Returns the vectors [n, dimension] of a chunk's ids.

    Raises:
        FeaturesError: a value is not what the tower takes.
        ModelCallError: the model fails; the first of the ids is named.
    """
    vectors: np.ndarray | None = None
    for rows, values in inputs.arrays(chunk.table, tower.columns, chunk.ids):
        try:
            found = part(values)
        except ModelCallError as error:
            first = chunk.ids[int(rows[0]) if rows is not None else 0].as_py()
            raise ModelCallError(f"tower {tower.name!r}: {error}; ids from {first!r} on") from error
        expected = len(chunk) if rows is None else len(rows)
        if len(found) != expected:
            raise ModelCallError(
                f"tower {tower.name!r}: the model returned {len(found):,} vectors for {expected:,} ids"
            )
        if rows is None:
            return found
        if vectors is None:
            vectors = np.empty((len(chunk), tower.matrix.dimension), found.dtype)
        vectors[rows] = found
    return np.empty((0, tower.matrix.dimension), np.float32) if vectors is None else vectors


class _CutFn(beam.DoFn):
    def __init__(self, towers: dict[str, ComputedTower], destination: Destination | None, kms_key: str | None) -> None:
        self._towers = towers
        self._destination = destination
        self._kms_key = kms_key

    def setup(self) -> None:
        emulators.connect_if_emulated()

    @no_annotations
    def process(self, run_ids: Sequence[str], launch: str = "") -> Iterator[Any]:
        """Cuts a source once for all the runs that it is the source of."""
        tower = self._towers[run_ids[0]]
        try:
            together: list[Any] = []
            for share, rows in tower.ids_from.cut(tower.columns, self._context(tower, launch)):
                for run_id in run_ids:
                    yield TaggedOutput(REPORTS, Report(run_id, tower.name, None, announced=rows))
                together.append(share)
                if len(together) == (1 if len(self._towers) == 1 else _TOGETHER):
                    yield from ((run_id, tuple(together)) for run_id in run_ids)
                    together = []
            if together:
                yield from ((run_id, tuple(together)) for run_id in run_ids)
        except PipelineError as problem:
            yield TaggedOutput(REPORTS, Report(run_ids[0], tower.name, None, problem=problem))

    def _context(self, tower: ComputedTower, launch: str) -> Context:
        if self._destination is None:
            return Context()
        from beam_pipeline.bigquery import publication

        return Context(
            publication.make_client(self._destination),
            features_table(self._destination, tower.name, launch),
            self._kms_key,
        )


def features_table(destination: Destination, tower: str, launch: str) -> str:
    """Returns the table for the result of a tower's query, named so that it is dropped with the staging tables."""
    return f"{destination.staging(tower, launch)}_features"


class _ReadFn(beam.DoFn):
    def __init__(self, towers: dict[str, ComputedTower]) -> None:
        self._towers = towers

    def setup(self) -> None:
        emulators.connect_if_emulated()

    def process(self, element: tuple[str, tuple[Any, ...]]) -> Iterator[Any]:
        run_id, shares = element
        tower = self._towers[run_id]
        try:
            for share in shares:
                for table in tower.ids_from.read(share, tower.columns):
                    if table.num_rows:
                        yield Chunk(run_id, inputs.ids_of(table, tower.columns), table)
        except PipelineError as problem:
            yield TaggedOutput(REPORTS, Report(run_id, tower.name, None, problem=problem))


def _batch(result: Any, tower: str) -> Any:
    """Returns the batch of a PredictionResult, or the report of what is wrong with it."""
    chunk, vectors = result.example, result.inference
    if isinstance(vectors, PipelineError):
        return TaggedOutput(REPORTS, Report(chunk.run_id, tower, None, problem=vectors))
    return Batch(chunk.run_id, chunk.ids, vectors)


@dataclass
class ComputeTower(beam.PTransform[PBegin, dict[str, Any]]):
    """Computes a tower of one or more runs: nothing in; batches and reports out, as "batches" and "reports".

    Cutting a source is sequential; reading and computing are parallel, a share at a time, and fused. What is wrong with
    ids, features or vectors is reported, not raised: a retry would not fix it.

    Attributes:
        towers: run id → the tower in that run's model.
        destination: where the result of a query is kept for a while; None where no source is a query.
        launch: the launch id, a side input; None as with `destination`.
        kms_key: Cloud KMS key of that result.
    """

    towers: dict[str, ComputedTower]
    destination: Destination | None = None
    launch: Any = None
    kms_key: str | None = None

    def expand(self, pbegin: PBegin) -> Any:
        """Applies the transform."""
        name = next(iter(self.towers.values())).name
        by_source: dict[Any, list[str]] = {}
        for run_id, tower in self.towers.items():
            by_source.setdefault((tower.ids_from, tower.columns), []).append(run_id)
        launch = () if self.launch is None else (self.launch,)
        cut = (
            pbegin
            | "Create" >> beam.Create([tuple(run_ids) for run_ids in by_source.values()])
            | "Cut"
            >> beam.ParDo(_CutFn(self.towers, self.destination, self.kms_key), *launch).with_outputs(
                REPORTS, main="shares"
            )
        )
        # A Reshuffle before, so that workers share the rows; none after, so that no features or vectors are shuffled.
        read = (
            cut.shares
            | "Spread" >> beam.Reshuffle()
            | "Read" >> beam.ParDo(_ReadFn(self.towers)).with_outputs(REPORTS, main="chunks")
        )
        computed = (
            read.chunks
            | "Compute" >> RunInference(TowerHandler(self.towers))
            | "Batch" >> beam.Map(_batch, name).with_outputs(REPORTS, main=BATCHES)
        )
        reports = (cut[REPORTS], read[REPORTS], computed[REPORTS]) | "Reports" >> beam.Flatten()
        return {BATCHES: computed[BATCHES], REPORTS: reports}
