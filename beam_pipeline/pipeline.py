"""The job graph.

for each tower:  ReadTower ─► WriteStaging
Launch ─► Prepare ─► (the writes) ─► Check, Audit ─► Shape ─► Publish ─► Clean
"""

import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import apache_beam as beam
from apache_beam.typehints.decorators import no_annotations

from beam_pipeline import publication, transforms
from beam_pipeline.formats.artifact import Tower
from beam_pipeline.publication import Publication
from beam_pipeline.transforms import ReadTower, Report
from beam_pipeline.writing import WriteStaging


@dataclass(frozen=True)
class Job:
    """All that the graph needs to know.

    Attributes:
        towers: what is read.
        publication: what becomes of it.
        writer: "columnar" or "rows".
    """

    towers: tuple[Tower, ...]
    publication: Publication
    writer: str


class _StepFn(beam.DoFn):
    """Runs one step of the publication for a launch id and passes the id on."""

    def __init__(self, step: Callable[..., None], job: Job) -> None:
        self._step = step
        self._publication = job.publication

    def display_data(self) -> dict[str, Any]:
        what = self._publication
        return {
            "tables": ", ".join(what.destination.table(tower) for tower in what.towers),
            "train_date": str(what.run.train_date),
            "run_id": what.run.run_id,
            "if_partition_taken": what.if_partition_taken,
        }

    def setup(self) -> None:
        self._client = publication.make_client(self._publication.destination)

    @no_annotations  # Beam takes the annotation of *inputs for that of a tuple.
    def process(self, launch: str, *inputs: Any) -> Iterator[str]:
        self._step(self._client, self._publication, launch, *inputs)
        yield launch


def build(pipeline: beam.Pipeline, job: Job) -> None:
    """Builds the graph; opens no file and makes no table."""
    launch = (
        pipeline
        | "Launch" >> beam.Create([job.publication.token])
        | "Id" >> beam.Map(_new_launch)
        # Materialised: whatever is retried later sees the same id.
        | "Keep" >> beam.Reshuffle()
    )
    # Every step ends in a Reshuffle: what it did is not done again because a later one is retried.
    prepared = launch | "Prepare" >> beam.ParDo(_StepFn(publication.prepare, job)) | "Prepared" >> beam.Reshuffle()
    waits, load_files, reports = [], [], []
    for tower in job.towers:
        read = pipeline | f"Read {tower.name}" >> ReadTower(tower)
        written = read["batches"] | f"Write {tower.name}" >> WriteStaging(
            tower.name, job.publication, beam.pvalue.AsSingleton(prepared), job.writer
        )
        reports.append(read[transforms.REPORTS])
        waits += [written.destination_load_jobid_pairs, written.destination_copy_jobid_pairs]
        load_files.append(written.destination_file_pairs)
    expected = (
        pipeline
        | "All" >> beam.Create([None])
        | "Check" >> beam.Map(_check, job.towers, beam.pvalue.AsIter(reports | "Reports" >> beam.Flatten()))
    )
    _ = (
        prepared
        | "Audit"
        >> beam.ParDo(
            _StepFn(_audit, job), beam.pvalue.AsSingleton(expected), *(beam.pvalue.AsIter(jobs) for jobs in waits)
        )
        | "Audited" >> beam.Reshuffle()
        | "Shape" >> beam.ParDo(_StepFn(publication.shape, job))
        | "Shaped" >> beam.Reshuffle()
        | "Publish" >> beam.ParDo(_StepFn(publication.publish, job))
        | "Published" >> beam.Reshuffle()
        | "Clean" >> beam.ParDo(_StepFn(_clean, job), *(beam.pvalue.AsIter(files) for files in load_files))
    )


def _new_launch(token: str) -> str:
    return token + uuid.uuid4().hex[:12]


def _check(_: None, towers: Sequence[Tower], reports: Iterable[Report]) -> dict[str, int]:
    return transforms.expected_ids(reports, towers)


def _audit(client: Any, what: Publication, launch: str, expected: dict[str, int], *_waited_for: Any) -> None:
    publication.audit(client, what, launch, expected)


def _clean(client: Any, what: Publication, launch: str, *load_files: Iterable[tuple[Any, tuple[str, int]]]) -> None:
    publication.clean(client, what, launch, [path for files in load_files for _, (path, _) in files])
