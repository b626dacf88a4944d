"""The command line of a search: flags, checks, the search, and its answer as a table or as JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from beam_pipeline import __version__
from beam_pipeline import command as boundary
from beam_pipeline.errors import ConfigError, TrainingMissingError
from beam_pipeline.launch import asking, options

if TYPE_CHECKING:
    from beam_pipeline.bigquery.history import Towers, Trained
    from beam_pipeline.bigquery.tables import Destination
    from beam_pipeline.retrieval.finding import Neighbour
    from beam_pipeline.retrieval.sql import Search

_EPILOG = """\
examples:
  items near an item, in the latest training of a warehouse on this machine:
    python -m beam_pipeline.search --warehouse=./warehouse --item=item-jazz-007
  what a user was recommended on a date:
    python -m beam_pipeline.search --env=prod --project=my-project --user=4711 --date=2026-03-08
"""


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the flags."""
    result = options.base_parser(
        "search",
        "Finds the nearest ids of an id in one training: items near an item, items recommended to a user, users like a "
        "user. On BigQuery by VECTOR_SEARCH; in a warehouse on this machine by comparing with every vector.",
        _EPILOG,
    )
    result.add_argument("--version", action="version", version=__version__)
    searched = result.add_argument_group("what is searched")
    whose = searched.add_mutually_exclusive_group(required=True)
    whose.add_argument("--item", metavar="ID", help="the items that are nearest to this item")
    whose.add_argument("--user", metavar="ID", help="the items that this user is recommended: the highest scores")
    searched.add_argument("--users", action="store_true", help="with --user: the users that are nearest to this user")
    searched.add_argument("--k", type=int, default=10, help="how many (default: %(default)s)")
    searched.add_argument(
        "--distance",
        choices=options.DISTANCES,
        help="how near is measured (default: DOT_PRODUCT for a user's items, as the model scores them; else COSINE)",
    )
    asking.add_towers(searched)
    asking.add_labels(searched)
    which = result.add_argument_group("which training", "the latest one, unless it is named")
    one = which.add_mutually_exclusive_group()
    one.add_argument("--date", metavar="DATE", type=options.to_date, help="day of the training (train_date)")
    one.add_argument("--run_id", metavar="ID", help="MLflow run of the training")
    options.add_destination(which)
    which.add_argument("--project", help="Google Cloud project of the tables; searches run and are billed there")
    which.add_argument("--warehouse", metavar="DIR", help="the folder of --warehouse that holds the tables")
    how = result.add_argument_group("output").add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="print the answer as JSON")
    how.add_argument("--sql", action="store_true", help="print the query for BigQuery, and stop")
    how.add_argument("--plan", action="store_true", help="print what the query would read and cost, and stop")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    ours = parser()
    found = ours.parse_args(argv)
    dataset_project, dataset = options.dataset(ours, found)
    if found.users and found.user is None:
        ours.error("--users are those that are nearest to --user=ID")
    if found.k < 1:
        ours.error(f"--k={found.k}: at least 1")
    if dataset_project and found.project and found.project != dataset_project:
        ours.error(
            f"--project={found.project}: VECTOR_SEARCH runs in the project of its tables, {dataset_project}; leave out "
            "--project"
        )
    named = asking.towers(ours, found)
    labels, others = asking.labels(ours, found.labels or [])
    if others:
        ours.error(f"--labels={others[0]!r}: TOWER=SELECT…, a query for id, label and group_name")
    if labels and (found.sql or found.plan):
        ours.error(
            f"--labels are joined to an answer, which {'--sql' if found.sql else '--plan'} does not ask for; "
            "leave them out"
        )
    return boundary.exit_code(lambda: _run(found, named, labels, dataset_project, dataset))


def _run(
    found: argparse.Namespace,
    named: Sequence[str],
    labels: Mapping[str, str],
    dataset_project: str | None,
    dataset: str,
) -> None:
    from beam_pipeline import emulators
    from beam_pipeline.bigquery import history
    from beam_pipeline.retrieval import finding, sql

    with asking.connected(found, dataset_project, dataset) as (client, destination):
        towers = history.find_towers(client, destination, named)
        trainings = history.find_trainings(client, destination, towers.names)
        search = choose(found, destination, towers, trainings)
        if other := next((tower for tower in labels if tower in towers.names and tower != search.among), None):
            raise ConfigError(f"--labels={other}=…: the answer has ids of {search.among}; name labels for these")
        history.check_labels(client, labels, towers.names)
        if found.sql:
            print(f"{sql.search_sql(search)};")
            return
        vector = finding.find_vector(client, search)
        emulated = emulators.emulated()
        if found.plan:
            print("\n".join([*_title(search), *finding.plan(client, search, emulated=emulated)]))
            return
        neighbours = finding.find(client, search, vector, emulated=emulated)
        if search.among in labels:
            neighbours = finding.label(client, labels[search.among], neighbours)
    print(_as_json(search, neighbours) if found.json else "\n".join([*_title(search), *lines(neighbours)]))


def choose(found: argparse.Namespace, destination: Destination, towers: Towers, trainings: Sequence[Trained]) -> Search:
    """Returns the search that the flags mean.

    Args:
        found: the flags.
        destination: the tables.
        towers: which tower is which.
        trainings: in the tables, oldest first.

    Raises:
        TrainingMissingError: there is no such training, or it lacks a tower.
        ConfigError: there is no such tower, a date has several runs, or k is above the number of rows.
    """
    from beam_pipeline.bigquery import history
    from beam_pipeline.retrieval.sql import Search

    flag = "--item" if found.item is not None else "--user"
    tower = towers.items if flag == "--item" else towers.users
    among = towers.users if found.users else towers.items
    if tower is None or among is None:
        missing = "users" if towers.users is None else "items"
        raise ConfigError(
            f"{flag} needs a tower of {missing}, and the tables have {', '.join(towers.names)} alone; name the towers "
            "with --towers=USERS,ITEMS"
        )
    needed = {tower, among}
    if found.date or found.run_id:
        named, flag = (found.date.isoformat(), "--date") if found.date else (found.run_id, "--run_id")
        training = history.resolve(trainings, named, flag)
        if missing := ", ".join(sorted(needed - training.rows.keys())):
            raise TrainingMissingError(f"training {training} ({training.run_id}) has no tower {missing}; name another")
    else:
        whole = [training for training in trainings if needed <= training.rows.keys()]
        if not whole:
            raise TrainingMissingError(
                f"the tables hold no training of {' and '.join(sorted(needed))}; publish one with python -m "
                "beam_pipeline"
            )
        training = whole[-1]
    search = Search(
        destination=destination,
        training=training,
        tower=tower,
        id=found.item if found.item is not None else found.user,
        among=among,
        k=found.k,
        distance=found.distance or ("COSINE" if tower == among else "DOT_PRODUCT"),
        alone=sum(one.train_date == training.train_date for one in trainings) == 1,
    )
    most = training.rows[among] - search.without_itself
    if search.k > most:
        raise ConfigError(f"--k={search.k}: training {training} has {most:,} {among} ids to find; ask for fewer")
    return search


def _title(search: Search) -> list[str]:
    count = search.training.rows[search.among]
    return [
        f"training    {search.training} ({search.training.run_id})",
        f"search      the {search.k} of {count:,} {search.among} ids nearest to {search.tower} "
        f"{_printable(search.id)}, by {search.distance}",
    ]


def lines(neighbours: Sequence[Neighbour]) -> list[str]:
    """Returns the neighbours as the lines of a table, without columns that are empty."""
    cells = [(one.id, one.label or "", one.group_name or "") for one in neighbours]
    columns = [[_printable(cell) for cell in column] for column in zip(*cells, strict=True) if any(column)]
    columns = [[cell.ljust(max(map(len, column))) for cell in column] for column in columns]
    values = [f"{one.value:.4f}" for one in neighbours]
    width = max(map(len, values))
    return [
        "  ".join([f"{number:>4}", value.rjust(width), *row]).rstrip()
        for number, (value, *row) in enumerate(zip(values, *columns, strict=True), 1)
    ]


def _printable(text: str) -> str:
    # An id is whatever the training's data had: a terminal would obey its control characters.
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _as_json(search: Search, neighbours: Sequence[Neighbour]) -> str:
    training = search.training
    answer = {
        "train_date": training.train_date.isoformat(),
        "mlflow_run_id": training.run_id,
        "tower": search.tower,
        "id": search.id,
        "among": search.among,
        "distance_type": search.distance,
        "neighbours": [
            {"id": one.id, search.measure: one.value, "label": one.label, "group_name": one.group_name}
            for one in neighbours
        ],
    }
    return json.dumps(answer, indent=2, ensure_ascii=False)
