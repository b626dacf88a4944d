"""Puts an earlier training into the latest tables again, while the history stays as it is.

    python -m beam_pipeline.rollback --date=2026-03-01 --env=prod --project=my-project

The next publication of a newer run with --latest_tables replaces it.
"""

from __future__ import annotations

import argparse
import uuid
from collections.abc import Sequence

from beam_pipeline import command
from beam_pipeline.errors import TrainingMissingError
from beam_pipeline.launch import asking, options


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the flags."""
    result = options.base_parser(
        "rollback",
        "Puts an earlier training into the tables of --latest_tables again, both towers in one transaction; the "
        "history stays as it is, and the next newer run replaces it.",
    )
    which = result.add_mutually_exclusive_group(required=True)
    which.add_argument("--date", metavar="DATE", type=options.to_date, help="day of the training (train_date)")
    which.add_argument("--run_id", metavar="ID", help="MLflow run of the training")
    asking.add_towers(result)
    options.add_destination(result)
    result.add_argument("--project", help="Google Cloud project")
    result.add_argument("--warehouse", metavar="DIR", help="the folder of --warehouse that holds the tables")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    ours = parser()
    found = ours.parse_args(argv)
    named = asking.towers(ours, found)
    dataset_project, dataset = options.dataset(ours, found)
    return command.exit_code(lambda: _run(found, named, dataset_project, dataset))


def _run(found: argparse.Namespace, named: Sequence[str], dataset_project: str | None, dataset: str) -> None:
    from google.api_core.exceptions import NotFound

    from beam_pipeline.bigquery import history, publication, tables

    with asking.connected(found, dataset_project, dataset) as (client, destination):
        towers = history.find_towers(client, destination, named).names
        trainings = history.find_trainings(client, destination, towers)
        wanted, flag = (found.date.isoformat(), "--date") if found.date else (found.run_id, "--run_id")
        training = history.resolve(trainings, wanted, flag)
        if missing := ", ".join(sorted({*towers} - training.rows.keys())):
            raise TrainingMissingError(f"training {training} ({training.run_id}) has no tower {missing}; name another")
        for tower in towers:
            try:
                client.get_table(destination.latest(tower))
            except NotFound as error:
                raise TrainingMissingError(
                    f"there is no table {destination.latest(tower)}; publish with --latest_tables to have one"
                ) from error
        launch = uuid.uuid4().hex[:12]
        script = tables.rollback_script(destination, towers, training.train_date, training.run_id, launch)
        publication.run_script(client, f"rollback_{launch}", script, f"training {training}")
        for tower in towers:
            print(f"rolled back {destination.latest(tower)} to {training}: {training.rows[tower]:,} rows")


if __name__ == "__main__":
    command.run_process(main)
