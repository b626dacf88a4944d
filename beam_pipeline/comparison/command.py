"""The command line of a comparison: flags, checks, the job, and what is said of its results."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from beam_pipeline import __version__
from beam_pipeline import command as boundary
from beam_pipeline.errors import ConfigError, PipelineError
from beam_pipeline.launch import asking, options

if TYPE_CHECKING:
    from google.cloud import bigquery

    from beam_pipeline.bigquery.history import Towers
    from beam_pipeline.bigquery.tables import Destination
    from beam_pipeline.comparison.results import Result
    from beam_pipeline.comparison.tables import Pair
    from beam_pipeline.comparison.work import Comparison

_LOCAL_RUNNERS = ("DirectRunner", "FnApiRunner")
_DOLLARS_PER_TIB_READ = 1.10
"""BigQuery's Storage Read API, US and EU (https://cloud.google.com/bigquery/pricing)."""


@dataclass(frozen=True)
class Config:
    """What was asked for. Each attribute is the flag of the same name; `beam_args` are Beam's own.

    `dataset` and `dataset_project` are the two parts of --dataset=PROJECT.DATASET.
    """

    env: str = "dev"
    project: str | None = None
    dataset: str = "raw_dev"
    dataset_project: str | None = None
    table_prefix: str = "two_tower"
    table_suffix: str = ""
    staging_dataset: str | None = None
    earlier: str | None = None
    later: str | None = None
    all: bool = False
    towers: tuple[str, ...] = ()
    ids: str = "item"
    k: int = 10
    queries: int = 2000
    top: int = 25
    score: str = "dot"
    labels: dict[str, str] = field(default_factory=dict)
    report: str | None = None
    log_run: bool = False
    fail_if_unusual: bool = False
    tracking_uri: str | None = None
    tracking_audience: str | None = None
    require_partition_filter: bool = False
    kms_key: str | None = None
    plan: bool = False
    warehouse: str | None = None
    runner: str = "DirectRunner"
    beam_args: tuple[str, ...] = ()

    @property
    def local(self) -> bool:
        """Whether the job runs in this process."""
        return self.runner in _LOCAL_RUNNERS


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
    """Returns the parser of our own flags."""
    result = options.base_parser(
        "compare",
        "Compares the embeddings of two trainings: how much the scores of each user and item changed, what was kept of "
        "neighbours and recommendations, and whether that is usual. Publishes the numbers in BigQuery.",
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
    what = result.add_argument_group("what is compared")
    what.add_argument(
        "--ids",
        default="item",
        choices=("item", "user", "both", "none"),
        help="towers of which a row per id is published (default: item)",
    )
    what.add_argument("--k", type=int, default=10, help="neighbours and recommendations (default: %(default)s)")
    what.add_argument(
        "--queries", type=int, default=2000, help="ids that are sampled for neighbours (default: %(default)s)"
    )
    what.add_argument("--top", type=int, default=25, help="ids that moved farthest, to show (default: %(default)s)")
    what.add_argument(
        "--score",
        default="dot",
        choices=("dot", "cosine"),
        help="how the model scores a user and an item (default: dot)",
    )
    asking.add_labels(what, "; key=value is Beam's own --labels")
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
    # Airflow and people give Dataflow's labels by the same flag, and those are never SQL.
    labels, of_beam = asking.labels(ours, found.labels or [])
    rest += [f"--labels={text}" for text in of_beam]
    if found.all and (found.earlier or found.later):
        ours.error("--all compares every pair; leave out --from and --to")
    for name, least in (("k", 1), ("queries", 1), ("top", 0)):
        if getattr(found, name) < least:
            ours.error(f"--{name}={getattr(found, name)}: at least {least}")
    dataset_project, dataset = options.dataset(ours, found)
    options.check_places(ours, found)
    config = Config(
        env=found.env or options.ENVS[0],
        project=found.project,
        dataset=dataset,
        dataset_project=dataset_project,
        table_prefix=found.table_prefix,
        table_suffix=found.table_suffix,
        staging_dataset=found.staging_dataset,
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
        tracking_uri=found.tracking_uri,
        tracking_audience=found.tracking_audience,
        require_partition_filter=found.require_partition_filter,
        kms_key=found.kms_key,
        plan=found.plan,
        warehouse=found.warehouse,
        runner=found.runner,
        beam_args=options.beam_args(ours, found, rest),
    )
    if config.warehouse and not config.local:
        ours.error(f"--warehouse runs with DirectRunner only, not with {config.runner}")
    if config.warehouse and config.env != "dev":
        ours.error(f"--warehouse is for the laptop: leave out --env={config.env}")
    if not config.local and (config.report or config.log_run):
        flag = "--report" if config.report else "--log_run"
        ours.error(
            f"{flag} needs the results, and this process does not wait for {config.runner}; leave it out and run "
            "python -m beam_pipeline.report afterwards"
        )
    return config


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line of a comparison; returns the exit code: 0, 1 with one line on stderr, or 3 if unusual."""
    config = parse(sys.argv[1:] if argv is None else argv)
    return boundary.exit_code(lambda: run(config), interrupted=f"interrupted; {_WHOLE}")


_WHOLE = "the tables hold this comparison whole or not at all, start the job again"


def run(config: Config) -> None:
    """Finds the pairs, checks everything, runs the job, and says what came out.

    Raises:
        PipelineError: whatever stopped it; nothing was published and nothing is left behind.
        UnusualError: everything is published, and unusual.
    """
    from apache_beam.options.pipeline_options import GoogleCloudOptions, PipelineOptions, StandardOptions

    from beam_pipeline import credentials, emulators
    from beam_pipeline.bigquery import history, publication, storage_read
    from beam_pipeline.comparison import page, publishing, results, work
    from beam_pipeline.comparison.terminal import ComparisonTerminal
    from beam_pipeline.launch import launcher, preflight
    from beam_pipeline.launch.console import set_up_logging
    from beam_pipeline.tracking import auth

    set_up_logging()
    terminal = ComparisonTerminal()
    if config.report:
        require_writable(config.report)
    if config.report or config.log_run:
        page.require()
    beam_options = PipelineOptions(list(config.beam_args))
    credentials.follow(beam_options)
    auth.authorize(config.tracking_uri, config.tracking_audience)
    with ExitStack() as stack:
        # DirectRunner itself is a switch, which on a machine with internet downloads another runner and runs there.
        beam_options.view_as(StandardOptions).runner = "FnApiRunner" if config.local else config.runner
        cloud = beam_options.view_as(GoogleCloudOptions)
        if config.warehouse:
            warehouse = stack.enter_context(emulators.Warehouse(config.warehouse))
            cloud.temp_location = warehouse.temp_location
        if emulators.emulated():
            emulators.connect()
        # --project stays as it was given: a Flex Template's launcher may not change it.
        cloud.project, project = preflight.find_projects(cloud.project, config.dataset_project)
        if not (cloud.temp_location or "").startswith("gs://"):
            raise ConfigError("files on the way need a bucket: --temp_location=gs://BUCKET/FOLDER")
        destination = _destination(config, project)
        client = publication.make_client(destination)
        towers = history.find_towers(client, destination, config.towers)
        wanted = _pairs(config, client, destination, towers, terminal)
        if not wanted:
            if not config.plan:
                launcher.submit_nothing(beam_options)
            return
        token = uuid.uuid4().hex[:12]
        name = cloud.job_name or _job_name(config, wanted)
        cloud.job_name = f"{name}-{token}" if config.local else name
        cloud.labels = [*_labels(config, wanted), *(cloud.labels or [])]
        cloud.dataflow_kms_key = cloud.dataflow_kms_key or config.kms_key
        comparison = work.Comparison(
            destination=destination,
            pairs=tuple(wanted),
            users=towers.users,
            items=towers.items,
            temp_location=cloud.temp_location,
            token=token,
            job_name=cloud.job_name,
            ids=_ids(config.ids, towers),
            k=config.k,
            queries=config.queries,
            top=config.top,
            cosine=config.score == "cosine",
            labels=config.labels,
            require_partition_filter=config.require_partition_filter,
            kms_key=config.kms_key,
            fail_if_unusual=config.fail_if_unusual and not config.local,
        )
        history.check_labels(client, comparison.labels, comparison.towers)
        findings = preflight.Findings()
        findings.ok("dataset", f"{destination.project}.{destination.dataset} in {destination.location}")
        preflight.examine_projects(findings, destination)
        preflight.examine_bucket(findings, comparison.bucket, destination, config.kms_key)
        reader = storage_read.make_client()
        for tower in comparison.towers:
            # A session costs nothing until it is read.
            fields = [f"{tower}_id"]
            storage_read.open_streams(
                reader,
                destination.job_project,
                destination.table(tower),
                fields,
                "train_date = DATE '0001-01-01'",
                most=1,
            )
        _estimate(findings, client, comparison)
        terminal.planned(comparison, findings)
        if config.plan:
            terminal.statements(comparison)
        if findings.error:
            raise findings.error
        if config.plan:
            return
        if config.warehouse:  # Nobody else is here, and nothing expires.
            publishing.discard(client, comparison, "")
        if not config.local:
            terminal.submitted(_submit(comparison, beam_options, name), config.runner)
            return
        _run_here(comparison, beam_options, client, terminal)
        own = {(pair.before.run_id, pair.after.run_id) for pair in wanted}

        def is_own(row: Mapping[str, Any]) -> bool:
            return (row["previous_mlflow_run_id"], row["mlflow_run_id"]) in own

        found = results.find_results(client, destination, wanted[-1].after.train_date, is_own)
        terminal.told([result for result in found if result.pair in own])
        _after(config, destination, found, own)
        if config.fail_if_unusual:
            known = results.percentiles(client, destination, wanted[-1].after.train_date)
            results.require_usual(known, wanted)


def _destination(config: Config, project: str) -> Destination:
    from beam_pipeline.launch import preflight

    return preflight.find_destination(
        project,
        config.dataset,
        config.table_prefix,
        suffix=config.table_suffix,
        billing_project=config.project,
        staging_dataset=config.staging_dataset,
    )


def _pairs(
    config: Config, client: bigquery.Client, destination: Destination, towers: Towers, terminal: Any
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


def _ids(wanted: str, towers: Towers) -> tuple[str, ...]:
    chosen = {"item": [towers.items], "user": [towers.users], "both": [towers.users, towers.items], "none": []}[wanted]
    return tuple(tower for tower in chosen if tower)


def _estimate(findings: Any, client: bigquery.Client, comparison: Comparison) -> None:
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


def _job_name(config: Config, wanted: Sequence[Pair]) -> str:
    """Returns a name that Dataflow takes, the same for every launch of a pair: it refuses a second active one."""
    subject = f"all-{config.dataset}" if config.all else f"{wanted[-1].after.run_id}-{wanted[-1].before.run_id}"
    return f"compare-{re.sub('[^a-z0-9]+', '-', subject.lower())}"[:100].rstrip("-")


def _labels(config: Config, wanted: Sequence[Pair]) -> list[str]:
    labels = {
        **({} if config.all else {"run_id": wanted[-1].after.run_id}),
        "experiment": wanted[-1].after.experiment_name,
        "dataset": config.dataset,
        "pipeline_version": __version__,
    }
    return [f"{key}={re.sub('[^a-z0-9_-]', '-', value.lower())[:63]}" for key, value in labels.items()]


def _submit(comparison: Comparison, beam_options: Any, name: str) -> Any:
    import apache_beam as beam

    from beam_pipeline.comparison.pipeline import build
    from beam_pipeline.launch import launcher

    pipeline = beam.Pipeline(options=beam_options)
    build(pipeline, comparison)
    return launcher.submit(pipeline, name)


def _run_here(comparison: Comparison, beam_options: Any, client: bigquery.Client, terminal: Any) -> None:
    """Runs the job in this process and waits for it; cleans up after it if it fails."""
    import apache_beam as beam

    from beam_pipeline.comparison import publishing
    from beam_pipeline.comparison.pipeline import build
    from beam_pipeline.launch import launcher

    try:
        pipeline = beam.Pipeline(options=beam_options)
        build(pipeline, comparison)
        with terminal.measuring(comparison):
            pipeline.run().wait_until_finish()
    except BaseException as error:
        try:
            publishing.discard(client, comparison)
        except Exception as left:  # What stopped the job is what has to be reported.
            logging.getLogger(__name__).warning("staging tables and files are left, they expire: %s", left)
        if isinstance(error, Exception):
            raise launcher.reason(error, _WHOLE) from error
        raise


def _after(config: Config, destination: Destination, found: Sequence[Result], own: set[tuple[str, str]]) -> None:
    """Writes the page and logs the run; what is published stays published if that fails."""
    if not config.report and not config.log_run:
        return
    from beam_pipeline.comparison import page

    html = page.render(found, destination)
    if config.report:
        write(config.report, html)
    if config.log_run:
        newest = next(result for result in reversed(found) if result.pair in own)
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
    """Runs the command line that makes a page of the result tables; returns the exit code."""
    ours = options.base_parser("report", "Makes a page of the comparisons that are in the result tables; runs no job.")
    options.add_destination(ours)
    ours.add_argument("--project", help="Google Cloud project")
    ours.add_argument("--to", dest="later", metavar="DATE|RUN_ID", help="the later training (default: the latest)")
    ours.add_argument("--output", metavar="FILE.html", required=True, help="the page")
    ours.add_argument("--warehouse", metavar="DIR", help="the folder of --warehouse that holds the tables")
    ours.add_argument("--log_run", action="store_true", help="log numbers and page to the later MLflow run as well")
    options.add_tracking(ours)
    found = ours.parse_args(argv)
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
        told = results.find_results(client, destination, last, lambda row: row["mlflow_run_id"] == found.later)
        html = page.render(told, destination)
        write(found.output, html)
        if found.log_run:
            log_run([result for result in told if result.pair == told[-1].pair], html, found.tracking_uri)
