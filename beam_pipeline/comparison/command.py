"""The command line of a comparison: flags, checks, the job, and the report about its results."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from beam_pipeline import __version__
from beam_pipeline import command as boundary
from beam_pipeline.errors import ConfigError, PipelineError
from beam_pipeline.launch import asking, options

if TYPE_CHECKING:
    from apache_beam.options.pipeline_options import PipelineOptions
    from google.cloud import bigquery

    from beam_pipeline.bigquery.history import Towers
    from beam_pipeline.bigquery.tables import Destination
    from beam_pipeline.comparison.results import Result
    from beam_pipeline.comparison.tables import Pair
    from beam_pipeline.comparison.terminal import ComparisonTerminal
    from beam_pipeline.comparison.work import Comparison
    from beam_pipeline.launch.findings import Findings
    from beam_pipeline.launch.session import Session

_DOLLARS_PER_TIB_READ = 1.10
"""BigQuery's Storage Read API, US and EU (https://cloud.google.com/bigquery/pricing)."""


@dataclass(frozen=True)
class Config(options.JobConfig):
    """What was asked of a comparison. Each attribute is the flag of the same name."""

    earlier: str | None = None
    later: str | None = None
    all: bool = False
    towers: tuple[str, ...] = ()
    ids: str | None = None
    k: int = 10
    queries: int = 2000
    top: int = 25
    score: str = "dot"
    labels: Mapping[str, str] = field(default_factory=dict)
    report: str | None = None
    log_run: bool = False
    fail_if_unusual: bool = False
    plan: bool = False


_EPILOG = """\
All options of Apache Beam work too, as with python -m beam_pipeline.

examples:
  the two latest trainings, on a laptop:
    python -m beam_pipeline.compare --warehouse=./warehouse --report=changes.html
  two dates, on Dataflow:
    python -m beam_pipeline.compare --env=prod --from=2026-03-01 --to=2026-03-08 \\
      --runner=DataflowRunner --project=my-project --region=europe-west1 \\
      --temp_location=gs://my-bucket/tmp --setup_file=./setup.py
"""


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the comparison's flags."""
    result = options.base_parser(
        "compare",
        "Compares the embeddings of two trainings: how much the scores of each user and item changed, which neighbours "
        "and recommendations were kept, and whether that is usual. Publishes the numbers in BigQuery.",
        _EPILOG,
    )
    result.add_argument("--version", action="version", version=__version__)
    which = result.add_argument_group("which trainings")
    which.add_argument(
        "--from",
        dest="earlier",
        metavar="DATE|RUN_ID",
        help="the earlier training (default: the one before the later one)",
    )
    which.add_argument(
        "--to", dest="later", metavar="DATE|RUN_ID", help="the later training (default: the latest in the tables)"
    )
    which.add_argument(
        "--all", action="store_true", help="every pair of successive trainings that has no result yet, in one job"
    )
    asking.add_towers(which)
    options.add_destination(which)
    compared = result.add_argument_group("what is compared")
    compared.add_argument(
        "--ids",
        choices=("item", "user", "both", "none"),
        help="towers of which a row per id is published (default: item)",
    )
    compared.add_argument("--k", type=int, default=10, help="neighbours and recommendations (default: %(default)s)")
    compared.add_argument(
        "--queries", type=int, default=2000, help="ids that are sampled for neighbours (default: %(default)s)"
    )
    compared.add_argument("--top", type=int, default=25, help="ids that moved farthest, to show (default: %(default)s)")
    compared.add_argument(
        "--score",
        default="dot",
        choices=("dot", "cosine"),
        help="how the model scores a user and an item (default: dot)",
    )
    asking.add_labels(compared, "; key=value is Beam's own --labels")
    then = result.add_argument_group("where to")
    then.add_argument("--report", metavar="FILE.html", help="write a page about the comparison and those before")
    then.add_argument(
        "--log_run",
        action="store_true",
        help="log the numbers as metrics of the later MLflow run, the page as artifact",
    )
    options.add_tracking(then)
    then.add_argument(
        "--fail_if_unusual", action="store_true", help="exit 3 (on Dataflow: fail) after publishing, if it is unusual"
    )
    then.add_argument("--staging_dataset", help="DATASET or PROJECT.DATASET for staging tables, in the same location")
    then.add_argument(
        "--require_partition_filter",
        action="store_true",
        help="set when a table is created: queries must name a train_date",
    )
    then.add_argument("--kms_key", metavar="KEY", help="Cloud KMS key of every table and job")
    then.add_argument(
        "--warehouse", metavar="DIR", help="instead of Google Cloud: the emulators of python -m beam_pipeline, with DIR"
    )
    then.add_argument(
        "--plan", action="store_true", help="check everything, print bytes, cost and the SQL that would run, and stop"
    )
    result.add_argument("--runner", default="DirectRunner", help=argparse.SUPPRESS)
    result.add_argument("--project", help=argparse.SUPPRESS)
    options.add_impersonation(result)
    return result


def parse(argv: Sequence[str]) -> Config:
    """Returns the checked configuration.

    Raises:
        SystemExit: with code 2 and one line on stderr, for unknown, malformed or contradicting flags; 0 after --help.
    """
    ours = parser()
    found, rest = ours.parse_known_args(list(options.bare_switches(ours, argv)))
    options.refuse_unknown(ours, rest)
    # Airflow and people give Dataflow's labels by the same flag, and labels are never SQL.
    labels, of_beam = asking.labels(ours, found.labels or [])
    rest += [f"--labels={text}" for text in of_beam]
    if found.all and (found.earlier or found.later):
        ours.error("--all compares every pair; leave out --from and --to")
    for name, least in (("k", 1), ("queries", 1), ("top", 0)):
        if getattr(found, name) < least:
            ours.error(f"--{name}={getattr(found, name)}: at least {least}")
    config = Config(
        **options.job_values(ours, found, rest),
        earlier=found.earlier,
        later=found.later,
        all=found.all,
        towers=asking.towers(ours, found),
        ids=found.ids,
        k=found.k,
        queries=found.queries,
        top=found.top,
        score=found.score,
        labels=labels,
        report=found.report,
        log_run=found.log_run,
        fail_if_unusual=found.fail_if_unusual,
        plan=found.plan,
    )
    _refuse_idle_tracking(ours, found)
    if not config.waits and (config.report or config.log_run):
        flag = "--report" if config.report else "--log_run"
        ours.error(
            f"{flag} needs the results, and this process does not wait for {config.runner}; leave it out and run "
            "python -m beam_pipeline.report afterwards"
        )
    return config


def _refuse_idle_tracking(ours: argparse.ArgumentParser, found: argparse.Namespace) -> None:
    """Exits 2 if a tracking server is named that nobody asks: the tables say all that a comparison needs."""
    for flag in ("tracking_uri", "tracking_audience"):
        if getattr(found, flag) and not found.log_run:
            ours.error(f"--{flag} is of the server to which --log_run logs; add --log_run, or leave it out")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line of a comparison; returns the exit code: 0, 1 with one line on stderr, or 3 if unusual."""
    config = parse(sys.argv[1:] if argv is None else argv)
    return boundary.exit_code(lambda: run(config), interrupted=f"interrupted; {_WHOLE}")


_WHOLE = "the tables hold this comparison whole or not at all, start the job again"


def run(config: Config) -> None:
    """Finds the pairs, checks everything, runs the job, and prints the results.

    Raises:
        PipelineError: whatever stopped it; nothing was published and nothing is left behind.
        UnusualError: everything is published, and unusual.
    """
    from beam_pipeline import credentials
    from beam_pipeline.comparison import page, publishing, results
    from beam_pipeline.comparison.pipeline import build
    from beam_pipeline.comparison.terminal import ComparisonTerminal
    from beam_pipeline.launch import execution, session
    from beam_pipeline.launch.console import set_up_logging
    from beam_pipeline.tracking import auth

    set_up_logging()
    terminal = ComparisonTerminal(started=config.started)
    if config.report:
        require_writable(config.report)
    if config.report or config.log_run:
        page.require()
    given = execution.given_options(config)
    credentials.follow(given)
    auth.authorize(config.tracking_uri, config.tracking_audience)
    with session.open_session(config, given, create_dataset=False) as opened:
        client, destination = opened.client, opened.destination
        plan = _plan(config, opened, given, terminal)
        if plan is None:
            return
        comparison = plan.comparison
        terminal.planned(comparison, plan.findings)
        if config.plan:
            terminal.statements(comparison)
        if plan.findings.error:
            raise plan.findings.error
        if config.plan:
            return
        beam_options = execution.job_options(config, opened, comparison.job_name, plan.labels)
        if not config.waits:
            submitted = execution.submit(lambda pipeline: build(pipeline, comparison), beam_options)
            terminal.submitted(submitted, config.runner)
            return
        if config.warehouse:  # Nobody else is here, and nothing expires.
            publishing.discard(client, comparison, "")
        execution.run(
            lambda pipeline: build(pipeline, comparison),
            beam_options,
            progress=terminal.measuring(comparison),
            clean_up=lambda: publishing.discard(client, comparison),
            cancel=not config.local,
            whole=_WHOLE,
        )
        wanted = {(pair.before.run_id, pair.after.run_id) for pair in comparison.pairs}

        def is_wanted(row: Mapping[str, Any]) -> bool:
            return (row["previous_mlflow_run_id"], row["mlflow_run_id"]) in wanted

        last = comparison.pairs[-1].after.train_date
        found = results.find_results(client, destination, last, is_wanted)
        terminal.results([result for result in found if result.pair in wanted])
        _after(config, destination, found, wanted)
        if config.fail_if_unusual:
            known = results.percentiles(client, destination, last)
            results.require_usual(known, comparison.pairs)


@dataclass(frozen=True)
class _Plan:
    """What a comparison is going to do, once everything was checked."""

    comparison: Comparison
    findings: Findings
    labels: tuple[str, ...]


def _plan(config: Config, opened: Session, given: PipelineOptions, terminal: ComparisonTerminal) -> _Plan | None:
    """Returns the plan for the pairs that are to be compared; None if there is none, which is printed."""
    from beam_pipeline.bigquery import history
    from beam_pipeline.comparison import work
    from beam_pipeline.launch import bucket, execution, preflight
    from beam_pipeline.launch.findings import Findings

    client, destination = opened.client, opened.destination
    towers = history.find_towers(client, destination, config.towers)
    wanted = _pairs(config, client, destination, towers, terminal)
    name = execution.job_name(config, opened.token, given, _subject(config, wanted))
    labels = _labels(config, wanted)
    if not wanted:
        if not config.plan:
            execution.submit_nothing(execution.job_options(config, opened, name, labels))
        return None
    comparison = work.Comparison(
        destination=destination,
        pairs=tuple(wanted),
        users=towers.users,
        items=towers.items,
        temp_location=opened.temp_location,
        launch_prefix=opened.token,
        job_name=name,
        ids=_ids(config.ids, towers),
        k=config.k,
        queries=config.queries,
        top=config.top,
        cosine=config.score == "cosine",
        labels=config.labels,
        require_partition_filter=config.require_partition_filter,
        kms_key=config.kms_key,
        # Where this process waits, it fails itself, once it has printed the results and written the page.
        fail_if_unusual=config.fail_if_unusual and not config.waits,
    )
    history.check_labels(client, comparison.labels, comparison.towers)
    findings = Findings()
    findings.ok("dataset", f"{destination.project}.{destination.dataset} in {destination.location}")
    preflight.examine_projects(findings, destination)
    bucket.examine(findings, comparison.bucket, destination, config.kms_key)
    _require_readable(comparison)
    _estimate(findings, client, comparison)
    return _Plan(comparison, findings, labels)


def _require_readable(comparison: Comparison) -> None:
    """Raises what the job would, if this account may not read the tables: opening a session costs nothing."""
    from beam_pipeline.bigquery import storage_read

    reader, destination = storage_read.make_client(), comparison.destination
    for tower in comparison.towers:
        nothing = "train_date = DATE '0001-01-01'"
        fields = [f"{tower}_id"]
        storage_read.open_streams(reader, destination.job_project, destination.table(tower), fields, nothing, most=1)


def _pairs(
    config: Config, client: bigquery.Client, destination: Destination, towers: Towers, terminal: ComparisonTerminal
) -> list[Pair]:
    from beam_pipeline.bigquery import history
    from beam_pipeline.comparison import pairs

    trainings = history.find_trainings(client, destination, towers.names)
    if config.all:
        done = pairs.compared(client, destination)
        wanted = pairs.consecutive(trainings, towers.names, done, terminal.skipped)
        if not wanted:
            terminal.nothing("every pair of successive trainings has a result")
        return wanted
    pair = pairs.choose(trainings, towers.names, config.earlier, config.later)
    if pair is None:
        terminal.nothing(f"there is no training before {config.later or trainings[-1]}; nothing to compare")
    return [pair] if pair else []


def _ids(wanted: str | None, towers: Towers) -> tuple[str, ...]:
    """Returns the towers of which a row per id is published: of items, if there are any, unless others were named.

    Raises:
        ConfigError: a tower that was named is not compared.
    """
    by_word = {"item": [towers.items], "user": [towers.users], "both": [towers.users, towers.items], "none": []}
    chosen = by_word[wanted or "item"]
    if wanted and None in chosen:
        raise ConfigError(f"--ids={wanted}: only tower {towers.names[0]!r} is compared; leave it out or name another")
    return tuple(tower for tower in chosen if tower)


def _estimate(findings: Findings, client: bigquery.Client, comparison: Comparison) -> None:
    from google.cloud import bigquery

    from beam_pipeline.bigquery import history
    from beam_pipeline.comparison import tables

    size = 0
    for pair in comparison.pairs:
        for tower in comparison.towers:
            sql = tables.join_sql(comparison.destination, tower, pair, comparison.labels.get(tower))
            size += client.query(sql, job_config=bigquery.QueryJobConfig(dry_run=True)).total_bytes_processed or 0
    ids = sum(max(pair.before.rows[t], pair.after.rows[t]) for pair in comparison.pairs for t in comparison.towers)
    if not size:
        findings.note("size", f"at least {ids:,} ids; emulators do not say how many bytes a query reads")
        return
    findings.ok("size", f"at least {ids:,} ids, {size / 1e9:,.2f} GB of both trainings to join")
    tib = size / (1 << 40)
    findings.ok(
        "cost",
        f"joining reads {size / 1e9:,.2f} GB: about ${tib * history.DOLLARS_PER_TIB:.2f} at "
        f"${history.DOLLARS_PER_TIB}/TiB; reading what was joined, items twice: "
        f"at most ${2 * tib * _DOLLARS_PER_TIB_READ:.2f} at "
        f"${_DOLLARS_PER_TIB_READ:.2f}/TiB",
    )


def _subject(config: Config, wanted: Sequence[Pair]) -> str:
    """Returns what names the job: the same for every launch of a pair."""
    if config.all or not wanted:
        return f"compare-all-{config.dataset}"
    return f"compare-{wanted[-1].after.run_id}-{wanted[-1].before.run_id}"


def _labels(config: Config, wanted: Sequence[Pair]) -> tuple[str, ...]:
    """Returns labels that say what a Dataflow job compares."""
    from beam_pipeline.launch import execution

    later = wanted[-1].after if wanted else None
    run_id = later.run_id if later and not config.all else None
    return execution.job_labels(config, run_id, later.experiment_name if later else None)


def _after(config: Config, destination: Destination, found: Sequence[Result], wanted: set[tuple[str, str]]) -> None:
    """Writes the page and logs the run; what is published stays published if that fails."""
    if not config.report and not config.log_run:
        return
    from beam_pipeline.comparison import page

    html = page.render(found, destination)
    if config.report:
        write(config.report, html)
    if config.log_run:
        newest = next(result for result in reversed(found) if result.pair in wanted)
        try:
            log_run([result for result in found if result.pair == newest.pair], html, config.tracking_uri)
        except PipelineError as error:
            print(f"warning: published, but not logged to the run: {error}", file=sys.stderr)


LOGGED = (
    "score_change_p50",
    "score_change_p99",
    "distance_p50",
    "distance_p99",
    "unusual_share",
    "neighbours_kept",
    "recommendations_kept",
    "score_correlation",
    "norm_ratio",
    "effective_rank_after",
    "mean_cosine_after",
    "ids_added",
    "ids_removed",
)
"""Columns that become metrics of the run, as embedding.TOWER.COLUMN."""


def log_run(found: Sequence[Result], html: str, tracking_uri: str | None) -> None:
    """Logs the numbers of a pair to its later run, and the page."""
    from beam_pipeline.tracking import runs

    values = {
        f"embedding.{result.values['tower']}.{name}": float(result.values[name])
        for result in found
        for name in LOGGED
        if result.values[name] is not None
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "embedding_comparison.html")
        file.write_text(html, encoding="utf-8")
        runs.log_comparison(
            found[-1].values["mlflow_run_id"], values, [str(file)], "embedding_comparison", tracking_uri
        )


def require_writable(path: str) -> None:
    """Raises ConfigError if a page cannot be written there; leaves nothing behind."""
    try:
        if os.path.isdir(path):
            raise IsADirectoryError(21, "it is a folder")
        if os.path.exists(path):
            with open(path, "a"):
                return
        with tempfile.TemporaryFile(dir=os.path.dirname(path) or "."):
            return
    except OSError as error:
        raise ConfigError(f"the page {path} cannot be written: {error.strerror}; name another file") from error


def write(path: str, html: str) -> None:
    """Writes a page, whole or not at all."""
    try:
        # In the same folder, so that renaming it is atomic; a temporary file can be read by its owner alone.
        with tempfile.NamedTemporaryFile("w", dir=os.path.dirname(path) or ".", delete=False, encoding="utf-8") as file:
            file.write(html)
        os.chmod(file.name, 0o666 & ~_umask())
        os.replace(file.name, path)
    except OSError as error:
        raise ConfigError(f"the page {path} cannot be written: {error.strerror}; name another file") from error
    print(f"page        {path}", flush=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def report(argv: Sequence[str] | None = None) -> int:
    """Runs the command line that renders a page from the result tables; returns the exit code."""
    ours = options.base_parser(
        "report", "Renders a page about the comparisons that are in the result tables; runs no job."
    )
    options.add_destination(ours)
    ours.add_argument("--project", help="Google Cloud project")
    ours.add_argument("--to", dest="later", metavar="DATE|RUN_ID", help="the later training (default: the latest)")
    ours.add_argument("--output", metavar="FILE.html", required=True, help="the page")
    ours.add_argument("--warehouse", metavar="DIR", help="the folder of --warehouse that holds the tables")
    ours.add_argument("--log_run", action="store_true", help="log numbers and page to the later MLflow run as well")
    options.add_tracking(ours)
    found = ours.parse_args(argv)
    _refuse_idle_tracking(ours, found)
    dataset_project, dataset = options.dataset(ours, found)
    return boundary.exit_code(lambda: _report(found, dataset_project, dataset))


def _report(found: argparse.Namespace, dataset_project: str | None, dataset: str) -> None:
    from beam_pipeline.comparison import page, results
    from beam_pipeline.tracking import auth

    require_writable(found.output)
    page.require()
    auth.authorize(found.tracking_uri, found.tracking_audience)
    with asking.connected(found, dataset_project, dataset) as (client, destination):
        last = results.date_of(client, destination, found.later) if found.later else None
        published = results.find_results(client, destination, last, lambda row: row["mlflow_run_id"] == found.later)
        html = page.render(published, destination)
        write(found.output, html)
        if found.log_run:
            log_run([result for result in published if result.pair == published[-1].pair], html, found.tracking_uri)
