"""The command line of a comparison."""

import os
import subprocess
import sys

import pytest

from beam_pipeline.bigquery.history import Towers
from beam_pipeline.bigquery.tables import Destination
from beam_pipeline.comparison import command, tables
from beam_pipeline.comparison.command import parse
from beam_pipeline.errors import ConfigError


def test_defaults():
    config = parse(["--project=my-project", "--temp_location=gs://b/t"])
    assert (config.dataset, config.ids, config.k, config.queries, config.top) == ("raw_dev", None, 10, 2000, 25)
    assert config.beam_args == ("--temp_location=gs://b/t", "--project=my-project")


def test_a_suffix_names_tables_and_results():
    config = parse(["--table_suffix=_history"])
    destination = Destination("p", config.dataset, "EU", config.table_prefix, suffix=config.table_suffix)
    assert tables.comparison_table(destination) == "p.raw_dev.two_tower_embedding_history_comparison"
    assert tables.change_table(destination, "item") == "p.raw_dev.two_tower_item_embedding_history_change"
    plain = Destination("p", config.dataset, "EU", config.table_prefix)
    assert tables.comparison_table(plain) == "p.raw_dev.two_tower_embedding_comparison"
    assert tables.change_table(plain, "item") == "p.raw_dev.two_tower_item_embedding_change"


def test_labels_are_ours_if_they_are_sql_and_beams_if_not():
    config = parse(
        [
            "--labels",
            "airflow-version=v3-1",
            "--labels=item= select id, label, group_name FROM d.t;",
            '--labels={"a": "b"}',
        ]
    )
    assert config.labels == {"item": "select id, label, group_name FROM d.t"}
    assert config.beam_args == ("--labels=airflow-version=v3-1", '--labels={"a": "b"}')
    assert parse(["--labels=item=(SELECT 1)"]).labels == {"item": "(SELECT 1)"}
    assert parse(["--labels=item=selected"]).labels == {}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--form=2026-03-01"], "unknown flag --form=2026-03-01; did you mean --from?"),
        (["--all", "--from=2026-03-01"], "--all compares every pair; leave out --from and --to"),
        (["--k=0"], "--k=0: at least 1"),
        (["--queries=0"], "--queries=0: at least 1"),
        (["--top=-1"], "--top=-1: at least 0"),
        (["--towers=a,b,c"], "--towers='a,b,c': USERS,ITEMS or one tower"),
        (["--towers=a,a"], "--towers='a,a': USERS,ITEMS or one tower"),
        (["--kms_key=key"], "--kms_key='key': projects/P/locations"),
        (["--warehouse=w", "--env=prod"], "--warehouse is for the laptop: leave out --env=prod"),
        (["--warehouse=w", "--runner=DataflowRunner"], "--warehouse runs with DirectRunner only"),
        (["--runner=DataflowRunner", "--report=p.html"], "--report needs the results"),
        (["--runner=DataflowRunner", "--log_run"], "--log_run needs the results"),
        (["--labels=item=SELECT 1", "--labels=item=SELECT 2"], "--labels: tower 'item' has two queries"),
        (["--tracking_uri=https://m"], "--tracking_uri is of the server to which --log_run logs; add --log_run"),
        (["--tracking_audience=a"], "--tracking_audience is of the server to which --log_run logs"),
    ],
)
def test_malformed_flags(flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(flags)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_a_report_that_logs_nothing_needs_no_tracking_server(capsys):
    with pytest.raises(SystemExit):
        command.report(["--output=p.html", "--tracking_uri=https://m"])
    assert "--tracking_uri is of the server to which --log_run logs" in capsys.readouterr().err


def test_ids_are_of_towers_that_are_compared():
    both, items, users = Towers("user", "item"), Towers(None, "item"), Towers("user", None)
    assert command._ids(None, both) == command._ids("item", both) == ("item",)
    assert command._ids("both", both) == ("user", "item")
    assert command._ids("none", items) == command._ids(None, users) == ()
    for wanted, towers in (("user", items), ("both", items), ("item", users)):
        with pytest.raises(ConfigError, match=f"--ids={wanted}: only tower '{towers.names[0]}' is compared"):
            command._ids(wanted, towers)


@pytest.mark.parametrize("module", ["compare", "report"])
def test_help_imports_no_beam(module):
    line = [sys.executable, "-X", "importtime", "-m", f"beam_pipeline.{module}", "--help"]
    done = subprocess.run(line, capture_output=True, text=True, check=True, env=dict(os.environ))
    assert "--table_prefix" in done.stdout
    imported = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert not imported & {"tensorflow", "apache_beam", "mlflow", "matplotlib"}


def test_nothing_else_imports_the_comparison():
    """It is a pipeline of its own: the one that publishes works without it."""
    from pathlib import Path

    package = Path(__file__).parents[3] / "beam_pipeline"
    users = [
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if "comparison" not in path.relative_to(package).parts
        and "beam_pipeline.comparison" in path.read_text(encoding="utf-8")
    ]
    assert sorted(users) == ["compare.py", "report.py"]
