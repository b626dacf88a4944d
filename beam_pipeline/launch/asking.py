"""What the commands that query the tables of a history share: their flags, and the connection to the tables."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from beam_pipeline.errors import ConfigError
from beam_pipeline.launch import options

if TYPE_CHECKING:
    from google.cloud import bigquery

    from beam_pipeline.bigquery.tables import Destination

_QUERY = re.compile(r"([a-z][a-z0-9_]{0,63})=\s*((?:(?:SELECT|WITH|FROM)\b|\().*)", re.IGNORECASE | re.DOTALL)


def add_towers(group: options.FlagGroup) -> None:
    """Adds the flag that says which tower is which."""
    group.add_argument(
        "--towers",
        metavar="USERS,ITEMS",
        help="which tower is which, where they are not called user and item; or one tower alone",
    )


def towers(ours: argparse.ArgumentParser, found: argparse.Namespace) -> tuple[str, ...]:
    """Returns the towers that were named, users first, or none; exits 2 if they are malformed."""
    names = tuple(found.towers.split(",")) if found.towers else ()
    if names and (len({*names}) != len(names) or len(names) > 2 or not all(map(options.is_tower, names))):
        ours.error(f"--towers={found.towers!r}: USERS,ITEMS or one tower, of lower-case letters, digits and _")
    return names


def add_labels(group: options.FlagGroup, more: str = "") -> None:
    """Adds the flag that gives labels to a tower's ids; `more` ends its help."""
    group.add_argument(
        "--labels",
        action="append",
        metavar="TOWER=SELECT…",
        help=f"a query for id, label and group_name of a tower's ids, repeatable{more}",
    )


def labels(ours: argparse.ArgumentParser, given: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Returns tower → query, and the texts that are not queries; exits 2 if a tower has two."""
    queries: dict[str, str] = {}
    rest = []
    for text in given:
        match = _QUERY.fullmatch(text)
        if not match:
            rest.append(text)
        elif match[1] in queries:
            ours.error(f"--labels: tower {match[1]!r} has two queries")
        else:
            queries[match[1]] = match[2].strip().rstrip(";")
    return queries, rest


@contextmanager
def connected(
    found: argparse.Namespace, dataset_project: str | None, dataset: str
) -> Iterator[tuple[bigquery.Client, Destination]]:
    """Yields a client and the tables that flags name, in a warehouse folder if they name one.

    Args:
        found: flags `project`, `table_prefix`, `table_suffix` and `warehouse`.
        dataset_project: of the dataset, if --dataset names it.
        dataset: the dataset.

    Raises:
        ConfigError: there is no such warehouse, or no project is known.
        DatasetMissingError: there is no such dataset.
    """
    from google.cloud import bigquery

    from beam_pipeline import emulators
    from beam_pipeline.bigquery import publication
    from beam_pipeline.launch import session

    with ExitStack() as stack:
        if found.warehouse:
            # A warehouse would create the folder: of a mistyped one it would say that there is no history.
            if not Path(found.warehouse).is_dir():
                raise ConfigError(f"there is no warehouse at {found.warehouse}")
            stack.enter_context(emulators.Warehouse(found.warehouse))
        emulators.connect_if_emulated()
        destination = session.find_destination(
            dataset_project or found.project or bigquery.Client().project,
            dataset,
            found.table_prefix,
            suffix=found.table_suffix,
            billing_project=found.project,
        )
        yield publication.make_client(destination), destination
