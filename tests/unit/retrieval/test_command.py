"""The command line of a search."""

import os
import subprocess
import sys
from datetime import date

import pytest

from beam_pipeline.bigquery.history import Towers, Trained
from beam_pipeline.bigquery.tables import Destination
from beam_pipeline.errors import ConfigError, TrainingMissingError
from beam_pipeline.retrieval.command import choose, lines, main, parser
from beam_pipeline.retrieval.finding import Neighbour

DESTINATION = Destination("p", "d", "EU", "two_tower")
BOTH = Towers("user", "item")


def trained(day, run, **rows):
    return Trained(date(2026, 3, day), run, f"weekly {run}", "two_tower", rows or {"user": 9, "item": 5})


A, B, HALF, B2 = trained(1, "a"), trained(8, "b"), trained(15, "half", item=5), trained(8, "b2")


def chosen(*flags, trainings=(A, B, HALF), towers=BOTH):
    return choose(parser().parse_args(flags), DESTINATION, towers, trainings)


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["--item=x"], ("item", "x", "item", "COSINE")),
        (["--user=x"], ("user", "x", "item", "DOT_PRODUCT")),
        (["--user=x", "--users"], ("user", "x", "user", "COSINE")),
        (["--user=x", "--distance=EUCLIDEAN"], ("user", "x", "item", "EUCLIDEAN")),
    ],
)
def test_what_is_searched(flags, wanted):
    search = chosen(*flags, "--k=3", "--date=2026-03-01")
    assert (search.tower, search.id, search.among, search.distance) == wanted
    assert (search.k, search.training, search.alone) == (3, A, True)


def test_the_latest_training_that_has_the_towers():
    assert chosen("--user=x", "--k=1").training == B
    assert chosen("--item=x", "--k=1").training == HALF
    assert chosen("--item=x", "--k=1", "--run_id=a").training == A
    # Of two runs of one date the one that was published last.
    search = chosen("--user=x", "--k=1", trainings=(A, B, B2))
    assert (search.training, search.alone) == (B2, False)


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        (
            ["--date=2026-04-01"],
            TrainingMissingError,
            "--date=2026-04-01: the tables hold no training of that date; there are",
        ),
        (["--run_id=c"], TrainingMissingError, "--run_id=c: the tables hold no such run; there are"),
        (["--date=2026-03-08"], ConfigError, "2026-03-08 has 2 runs, .*; name one by its run id with --date"),
        (
            ["--run_id=half"],
            TrainingMissingError,
            r"training 2026-03-15 weekly half \(half\) has no tower user; name another",
        ),
        (["--k=6"], ConfigError, "--k=6: training 2026-03-08 weekly b2 has 5 item ids to find; ask for fewer"),
        (["--k=9", "--users"], ConfigError, "--k=9: training 2026-03-08 weekly b2 has 8 user ids to find"),
    ],
)
def test_what_cannot_be_searched(flags, error, message):
    with pytest.raises(error, match=message):
        chosen("--user=x", *flags, trainings=(A, B, B2, HALF))


def test_a_tower_that_is_not_there():
    message = "--user needs a tower of users, and the tables have item alone; name the towers with --towers=USERS,ITEMS"
    with pytest.raises(ConfigError, match=message):
        chosen("--user=x", towers=Towers(None, "item"))
    with pytest.raises(TrainingMissingError, match="the tables hold no training of item and user"):
        chosen("--user=x", trainings=(HALF,))


def test_a_table_has_the_columns_that_are_filled():
    found = [Neighbour("a", 0.12345, "Blue", None), Neighbour("long id", 10.5, None, None)]
    assert lines(found) == ["   1   0.1235  a        Blue", "   2  10.5000  long id"]
    assert lines([Neighbour("a", -1.0, None, "jazz")]) == ["   1  -1.0000  a  jazz"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "one of the arguments --item --user is required"),
        (["--item=x", "--user=y"], "argument --user: not allowed with argument --item"),
        (["--item=x", "--users"], "--users are those that are nearest to --user=ID"),
        (["--item=x", "--k=0"], "--k=0: at least 1"),
        (["--item=x", "--date=March"], "argument --date: 'March' is not a date: YYYY-MM-DD"),
        (["--item=x", "--date=2026-03-01", "--run_id=r"], "argument --run_id: not allowed with argument --date"),
        (["--item=x", "--labels=genres"], "--labels='genres': TOWER=SELECT…"),
        (["--item=x", "--towers=a,a"], "--towers='a,a': USERS,ITEMS or one tower"),
        (["--item=x", "--sql", "--json"], "not allowed with argument"),
        (["--item=x", "--sql", "--labels=item=SELECT 1"], "--labels are joined to an answer, which --sql does not ask"),
        (["--item=x", "--plan", "--labels=item=SELECT 1"], "--labels are joined to an answer, which --plan does not"),
        (["--item=x", "--project=pa-1", "--dataset=pb-1.d"], "VECTOR_SEARCH runs in the project of its tables, pb-1"),
        (["--item=x", "--itme=y"], "unrecognized arguments: --itme=y"),
    ],
)
def test_malformed_flags(flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(flags)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_help_imports_nothing_that_takes_seconds():
    command = [sys.executable, "-X", "importtime", "-m", "beam_pipeline.search", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=dict(os.environ))
    assert "--distance" in done.stdout
    imported = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert not imported & {"apache_beam", "mlflow", "numpy", "pyarrow"}


def test_a_warehouse_that_is_not_there(capsys):
    assert main(["--warehouse=/nowhere", "--item=x"]) == 1
    assert capsys.readouterr().err == "error: there is no warehouse at /nowhere\n"
