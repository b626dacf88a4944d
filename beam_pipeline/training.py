"""A training: the MLflow run, and the towers of its model. Nouns that the whole package shares."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, time

from beam_pipeline.formats.model import Tower


@dataclass(frozen=True)
class Run:
    """A training.

    Attributes:
        run_id, run_name, experiment_id, experiment_name: as MLflow has them.
        train_date: day on which the run started, in UTC.
        artifact_uri: root of the run's artifacts.
        status: FINISHED, RUNNING, SCHEDULED, FAILED or KILLED.
        started: when the run started, if that is known.
    """

    run_id: str
    run_name: str
    experiment_id: str
    experiment_name: str
    train_date: date
    artifact_uri: str
    status: str = "FINISHED"
    started: datetime | None = None

    @property
    def started_at(self) -> datetime:
        """When the run started; the beginning of its day, if no more is known."""
        return self.started or datetime.combine(self.train_date, time(), UTC)


@dataclass(frozen=True)
class Training:
    """A run and the towers of its model.

    Attributes:
        run: the run.
        model_uri: where the model is; of several models, separated by commas.
        towers: what is read of it, by name.
    """

    run: Run
    model_uri: str
    towers: Mapping[str, Tower]


def by_name(towers: Iterable[Tower]) -> dict[str, Tower]:
    """Returns the towers of a training by their names, in the order given."""
    return {tower.name: tower for tower in towers}
