"""The job graph.

for each tower:  CutTower or ComputeTower ─► WriteStaging
Launch ─► Prepare ─► (the writes) ─► Check, Audit ─► Shape ─► Publish ─► Clean
"""

import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import apache_beam as beam
from apache_beam.pvalue import PCollection
from apache_beam.typehints.decorators import no_annotations

from beam_pipeline import emulators, metrics
from beam_pipeline.bigquery import publication as steps
from beam_pipeline.bigquery.publication import Publication, Tallies
from beam_pipeline.bigquery.staging import COPIES, FILES, LOADS, WriteStaging
from beam_pipeline.computing.sources import Query
from beam_pipeline.computing.tower import ComputedTower
from beam_pipeline.computing.transforms import BATCHES, ComputeTower, features_table
from beam_pipeline.reading.tally import Report, Tally, tally
from beam_pipeline.reading.transforms import PIECES, REPORTS, CutTower
from beam_pipeline.training import Training


@dataclass(frozen=True)
class Job:
    """All that the graph needs to know.

    Attributes:
        publication: what is read, and what becomes of it.
        writer: "columnar" or "rows".
    """

    publication: Publication
    writer: str


class _StepFn(beam.DoFn):
    """Runs one step of the publication for a launch id and passes the id on."""

    def __init__(self, step: Callable[..., None], job: Job) -> None:
        self._step = step
        self._publication = job.publication

    def display_data(self) -> dict[str, Any]:
        publication = self._publication
        latest = publication.trainings[-1].run
        return {
            "tables": ", ".join(publication.destination.table(tower) for tower in publication.towers),
            "runs": len(publication.trainings),
            "run_id": latest.run_id,
            "train_date": str(latest.train_date),
            "if_partition_taken": publication.if_partition_taken,
        }

    def setup(self) -> None:
        emulators.connect_if_emulated()
        self._client = steps.make_client(self._publication.destination)

    @no_annotations  # Beam takes the annotation of *inputs for that of a tuple.
    def process(self, launch: str, *inputs: Any) -> Iterator[str]:
        self._step(self._client, self._publication, launch, *inputs)
        metrics.end_phase(f"the job, until {self._step.__name__.strip('_')} has ended")
        yield launch


def build(pipeline: beam.Pipeline, job: Job) -> PCollection[str]:
    """Builds the graph; opens no file and creates no table.

    Returns:
        The launch id, once everything is published.
    """
    launch = (
        pipeline
        | "LaunchPrefix" >> beam.Create([job.publication.launch_prefix])
        | "CreateLaunchId" >> beam.Map(_new_launch)
        # Materialised: whatever is retried later sees the same id.
        | "KeepLaunchId" >> beam.Reshuffle()
    )
    # Every step ends in a Reshuffle: what it did is not done again because a later one is retried.
    prepared = launch | "Prepare" >> beam.ParDo(_StepFn(steps.prepare, job)) | "Prepared" >> beam.Reshuffle()
    waits, load_files, reports = [], [], []
    trainings = job.publication.trainings
    for tower in job.publication.towers:
        elements, seen = _elements(pipeline, tower, job, prepared)
        written = elements | f"Write {tower}" >> WriteStaging(
            tower, job.publication, beam.pvalue.AsSingleton(prepared), job.writer
        )
        reports += [seen, written[REPORTS]]
        waits += [written[LOADS], written[COPIES]]
        load_files.append(written[FILES])
    # As a side input the check waits for every report, and whatever takes it waits for the check.
    tallies = beam.pvalue.AsSingleton(
        pipeline
        | "Once" >> beam.Create([None])
        | "Check" >> beam.Map(_check, trainings, beam.pvalue.AsIter(reports | "Reports" >> beam.Flatten()))
    )
    published: PCollection[str] = (
        prepared
        | "Audit" >> beam.ParDo(_StepFn(_audit, job), tallies, *(beam.pvalue.AsIter(jobs) for jobs in waits))
        | "Audited" >> beam.Reshuffle()
        | "Shape" >> beam.ParDo(_StepFn(steps.shape, job))
        | "Shaped" >> beam.Reshuffle()
        | "Publish" >> beam.ParDo(_StepFn(steps.publish, job), tallies)
        | "Published" >> beam.Reshuffle()
    )
    # What is published stays, whatever becomes of this step.
    clean = beam.ParDo(_StepFn(_clean, job), *(beam.pvalue.AsIter(files) for files in load_files))
    _ = published | "Clean" >> clean
    return published


def _elements(
    pipeline: beam.Pipeline, tower: str, job: Job, prepared: PCollection[str]
) -> tuple[PCollection[Any], PCollection[Report]]:
    """Returns what the sink writes of a tower: pieces that it reads, or batches that were computed; and reports."""
    towers = {training.run.run_id: training.towers[tower] for training in job.publication.trainings}
    computed = {run_id: each for run_id, each in towers.items() if isinstance(each, ComputedTower)}
    if not computed:
        cut = pipeline | f"Cut {tower}" >> CutTower(towers)
        return cut[PIECES], cut[REPORTS]
    found = pipeline | f"Compute {tower}" >> ComputeTower(
        computed, job.publication.destination, beam.pvalue.AsSingleton(prepared), job.publication.kms_key
    )
    return found[BATCHES], found[REPORTS]


def _new_launch(prefix: str) -> str:
    return prefix + uuid.uuid4().hex[:12]


def _check(_: None, trainings: Sequence[Training], reports: Iterable[Report]) -> dict[tuple[str, str], Tally]:
    return tally(reports, trainings)


def _audit(client: Any, publication: Publication, launch: str, tallies: Tallies, *_waited_for: Any) -> None:
    steps.audit(client, publication, launch, tallies)


def _clean(
    client: Any, publication: Publication, launch: str, *load_files: Iterable[tuple[Any, tuple[str, int]]]
) -> None:
    steps.clean(client, publication, launch, [path for files in load_files for _, (path, _) in files])
    for tower in publication.trainings[-1].towers.values():
        if isinstance(tower, ComputedTower) and isinstance(tower.ids_from, Query):
            client.delete_table(features_table(publication.destination, tower.name, launch), not_found_ok=True)
