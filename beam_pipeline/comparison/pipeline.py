"""The graph of a comparison.

Launch ─► Prepare ─► Join (per pair and tower) ─► Fit (per pair, on a sample)
       ─► Measure (all ids, by streams) ─► Ask ─► Look (all items, by streams) ─► Finish
       ─► Load ─► Shape ─► Publish ─► Clean ─► Gate

Only partial results are shuffled, never a vector per id. Every step ends in a Reshuffle: what it did is not done again
because a later one is retried.
"""

import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import apache_beam as beam
from apache_beam.typehints.decorators import no_annotations

from beam_pipeline import emulators
from beam_pipeline.bigquery import publication
from beam_pipeline.comparison import measuring, publishing, values
from beam_pipeline.comparison.measures import Nearest, Totals
from beam_pipeline.comparison.work import FACTS, FILES, Comparison, Found


class _StepFn(beam.DoFn):
    """Runs one step for an element."""

    def __init__(self, step: Callable[..., Iterator[Any]], comparison: Comparison) -> None:
        self._step = step
        self._comparison = comparison

    def display_data(self) -> dict[str, Any]:
        comparison = self._comparison
        latest = comparison.pairs[-1]
        return {
            "tables": ", ".join(comparison.destination.table(tower) for tower in comparison.towers),
            "pairs": len(comparison.pairs),
            "from": str(latest.before),
            "to": str(latest.after),
            "run_id": latest.after.run_id,
        }

    def setup(self) -> None:
        emulators.connect_if_emulated()
        self._client = publication.make_client(self._comparison.destination)

    @no_annotations  # Beam takes the annotation of *inputs for that of a tuple.
    def process(self, element: Any, *inputs: Any) -> Iterator[Any]:
        yield from self._step(self._client, self._comparison, element, *inputs)


class _TotalsFn(beam.CombineFn):
    """Adds up what is kept of the ids of a tower; memory is that of two partial results."""

    def __init__(self, top: int) -> None:
        self._top = top

    def create_accumulator(self, *_: Any) -> Totals:
        return Totals(top=self._top)

    def add_input(self, totals: Totals, found: Totals, *_: Any) -> Totals:
        totals.add(found)
        return totals

    def merge_accumulators(self, many: Iterable[Totals], *_: Any) -> Totals:
        totals = Totals(top=self._top)
        for one in many:
            totals.add(one)
        return totals

    def extract_output(self, totals: Totals, *_: Any) -> Totals:
        return totals


class _FoundFn(beam.CombineFn):
    """Keeps the nearest of what each stream has found."""

    def create_accumulator(self, *_: Any) -> Found:
        return {}

    def add_input(self, nearest: Found, found: Found, *_: Any) -> Found:
        for key, one in found.items():
            if key not in nearest:
                nearest[key] = Nearest.none(*one.scores.shape)
            nearest[key].add(one)
        return nearest

    def merge_accumulators(self, many: Iterable[Found], *_: Any) -> Found:
        nearest: Found = {}
        for one in many:
            self.add_input(nearest, one)
        return nearest

    def extract_output(self, nearest: Found, *_: Any) -> Found:
        return nearest


@dataclass
class Compare(beam.PTransform[Any, Any]):
    """Compares the pairs and publishes the results; a pipeline in, the launch out.

    Streams of all ids are measured in parallel, as many as BigQuery gives; what is done once per pair, or once, is
    small.

    Attributes:
        comparison: what is compared.
    """

    comparison: Comparison

    def expand(self, pipeline: Any) -> Any:
        """Applies the transform."""
        comparison = self.comparison

        def step(run: Callable[..., Iterator[Any]]) -> beam.ParDo:
            return beam.ParDo(_StepFn(run, comparison))

        joined = (
            pipeline
            | "LaunchPrefix" >> beam.Create([comparison.launch_prefix])
            | "CreateLaunchId" >> beam.Map(_new_launch)
            # Materialised: whatever is retried later sees the same id.
            | "KeepLaunchId" >> beam.Reshuffle()
            | "Prepare" >> step(publishing.prepare)
            | "Prepared" >> beam.Reshuffle()
            | "ListPairsAndTowers" >> beam.FlatMap(_work, len(comparison.pairs), comparison.towers)
            | "Spread" >> beam.Reshuffle()
            | "Join" >> step(measuring.join)
            | "GroupTowersByPair" >> beam.GroupByKey()
        )
        fitted = joined | "Fit" >> step(measuring.fit).with_outputs(FACTS, main="streams")
        facts = fitted[FACTS] | "Fitted" >> beam.Reshuffle()
        measured = (
            fitted["streams"]
            | "Streams" >> beam.Reshuffle()
            | "Measure" >> step(measuring.measure).with_outputs(FILES, main="totals")
        )
        files = measured[FILES] | "Written" >> beam.Reshuffle()
        totals = (
            measured["totals"]
            | "Total" >> beam.CombinePerKey(_TotalsFn(comparison.top))
            | "TotalsByPair" >> beam.MapTuple(_by_pair)
        )
        asked = (
            {"facts": facts, "totals": totals}
            | "FactsAndTotals" >> beam.CoGroupByKey()
            | "Ask" >> step(measuring.ask).with_outputs(FACTS, main="streams")
        )
        found = (
            asked["streams"]
            | "Items" >> beam.Reshuffle()
            | "Look" >> step(measuring.look)
            | "Nearest" >> beam.CombinePerKey(_FoundFn())
        )
        return (
            {"measured": asked[FACTS], "found": found}
            | "MeasuredAndFound" >> beam.CoGroupByKey()
            | "Finish" >> step(values.finish)
            | "KeyAllAlike" >> beam.Map(_of_all)
            | "GroupAllPairs" >> beam.GroupByKey()
            | "Load" >> beam.ParDo(_StepFn(publishing.load, comparison), beam.pvalue.AsIter(files))
            | "Loaded" >> beam.Reshuffle()
            | "Shape" >> step(publishing.shape)
            | "Shaped" >> beam.Reshuffle()
            | "Publish" >> step(publishing.publish)
            | "Published" >> beam.Reshuffle()
            | "Clean" >> step(publishing.clean)
            | "Cleaned" >> beam.Reshuffle()
            | "Gate" >> step(publishing.gate)
        )


def build(pipeline: beam.Pipeline, comparison: Comparison) -> None:
    """Builds the graph; opens no file and creates no table."""
    _ = pipeline | "Compare" >> Compare(comparison)


def _new_launch(prefix: str) -> str:
    return prefix + uuid.uuid4().hex[:12]


def _work(launch: str, pairs: int, towers: tuple[str, ...]) -> Iterator[tuple[str, int, str]]:
    for pair in range(pairs):
        for tower in towers:
            yield launch, pair, tower


def _by_pair(key: tuple[int, str], totals: Totals) -> tuple[int, tuple[str, Totals]]:
    return key[0], (key[1], totals)


def _of_all(finished: Any) -> tuple[None, Any]:
    return None, finished
