"""The command line: our flags and Beam's, checked once; everything after works on a frozen `Config`."""

from __future__ import annotations

import argparse
import difflib
import json
import re
import shutil
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import date
from typing import Any, NoReturn

from beam_pipeline import __version__, command
from beam_pipeline.computing import is_query

DEFAULT_TOWERS = {"user": "user_layer", "item": "item_layer"}

ENVS = ("dev", "stg", "prod")

IF_TAKEN = ("fail", "replace", "keep")

DISTANCES = ("COSINE", "DOT_PRODUCT", "EUCLIDEAN")
"""How near two vectors are, as VECTOR_SEARCH calls it."""

# Names become parts of table names and of SQL: what is allowed here needs no quoting there.
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_SUFFIX = re.compile(r"[A-Za-z0-9_]{0,128}")
_TOWER = re.compile(r"[a-z][a-z0-9_]{0,63}")
_PROJECT = r"(?:[a-z0-9.-]{1,100}:)?[a-z][a-z0-9-]{0,61}[a-z0-9]"
_DATASET = re.compile(rf"(?:({_PROJECT})\.)?([A-Za-z0-9_]{{1,1024}})")
_ACCOUNT = re.compile(r"[^@\s,'\"\[\]()]+@[^@\s,'\"\[\]()]+")
_KMS_KEY = re.compile(r"projects/[^/]+/locations/[^/]+/keyRings/[^/]+/cryptoKeys/[^/]+")
_PAIRS = re.compile(r",(?=[a-z][a-z0-9_]*=)")
"""Between `NAME=VALUE` pairs: a comma may be a part of a value."""
# Two names for one runner here: launch/execution.py says why.
_LOCAL_RUNNERS = ("DirectRunner", "FnApiRunner")
_PORTABLE_RUNNERS = ("PrismRunner", "FlinkRunner", "PortableRunner")


FlagGroup = argparse._ActionsContainer
"""A parser, or a group of its flags: what has `add_argument`."""


@dataclass(frozen=True)
class JobConfig:
    """What is asked of every job: where its tables are, where it runs, as whom. Each attribute is a flag.

    `dataset` and `dataset_project` are the two parts of --dataset=PROJECT.DATASET; `beam_args` are Beam's own flags.
    `started` is when the command line began, on the monotonic clock.
    """

    tracking_uri: str | None = None
    tracking_audience: str | None = None
    env: str = "dev"
    project: str | None = None
    dataset: str = "raw_dev"
    dataset_project: str | None = None
    table_prefix: str = "two_tower"
    table_suffix: str = ""
    staging_dataset: str | None = None
    require_partition_filter: bool = False
    kms_key: str | None = None
    warehouse: str | None = None
    runner: str = "DirectRunner"
    beam_args: tuple[str, ...] = ()
    started: float = field(default_factory=time.monotonic, compare=False)

    @property
    def local(self) -> bool:
        """Whether the job runs in this process."""
        return self.runner in _LOCAL_RUNNERS

    @property
    def waits(self) -> bool:
        """Whether this process stays until the job has ended; Dataflow's jobs continue without it."""
        return self.local or self.runner in _PORTABLE_RUNNERS


@dataclass(frozen=True)
class NamedFile:
    """A file that holds ids or vectors, as it is given with a flag: `PATH`, or `PATH#NAME,NAME`.

    Attributes:
        path: inside the run's artifacts, or `gs://`.
        names: of columns or arrays in it.
    """

    path: str
    names: tuple[str, ...] = ()


ROW_NUMBERS = NamedFile("rows")
"""Stands for a file of ids where a row's number is its id."""


@dataclass(frozen=True)
class Config(JobConfig):
    """What was asked of the main job. Each attribute is the flag of the same name.

    `towers` has a layer for each tower, or the file of its vectors. `discover` says that none was named: they are the
    default ones, and a model may show others.
    """

    run_id: str | None = None
    experiment_name: str | None = None
    run_name: str | None = None
    model_uri: str | None = None
    all_runs: bool = False
    since: date | None = None
    until: date | None = None
    artifact_path: str | None = None
    towers: Mapping[str, str] = field(default_factory=lambda: dict(DEFAULT_TOWERS))
    discover: bool = False
    ids: Mapping[str, NamedFile] = field(default_factory=dict)
    first_row: Mapping[str, int] = field(default_factory=dict)
    vectors: Mapping[str, NamedFile] = field(default_factory=dict)
    if_partition_taken: str = "fail"
    partition_expiration_days: int | None = None
    allow_dimension_change: bool = False
    vector_index: str | None = None
    latest_tables: bool = False
    include_oov: bool = False
    embedding_rows: bool = False
    compute: tuple[str, ...] = ()
    features: Mapping[str, str] = field(default_factory=dict)
    writer: str = "columnar"
    tag_run: bool = False
    inspect: bool = False
    plan: str | None = None
    shared_files: bool = False

    @property
    def layers(self) -> Mapping[str, str]:
        """The towers that are in a model, tower → layer."""
        return {name: layer for name, layer in self.towers.items() if name not in self.vectors}

    @property
    def reads_local_files(self) -> bool:
        """Whether a local folder of this machine is the same folder where the job runs."""
        return self.local or self.shared_files

    @property
    def sharing(self) -> str:
        """What an error about a local folder adds to its remedies, where the runner can have workers that read it."""
        return ", --shared_files if the workers can read it" if self.waits else ""


_USAGE = "%(prog)s (--run_id ID | --experiment_name NAME | --model_uri URI) [option ...]"

_EPILOG = """\
examples:
  on a laptop, with no cloud at all:
    beam-pipeline --experiment_name=two_tower --warehouse=./warehouse
    beam-pipeline emulators ./warehouse        # then query it
  on Dataflow:
    beam-pipeline --run_id=4e6f… --env=prod --if_partition_taken=replace \\
      --runner=DataflowRunner --project=my-project --region=europe-west1 \\
      --temp_location=gs://my-bucket/tmp --setup_file=./setup.py

other commands, each with a --help of its own:
  beam-pipeline compare      what changed between two trainings
  beam-pipeline report       a page about the comparisons in the result tables
  beam-pipeline rollback     put an earlier training into the latest tables again
  beam-pipeline search       nearest items, recommendations, similar users in one training
  beam-pipeline tag          tag an MLflow run with what was published of it
  beam-pipeline emulators    serve the folder of --warehouse, to query it

Without the script: python -m beam_pipeline, python -m beam_pipeline.compare, and so on.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Prints one line, not the whole usage: it is read in a log at night. Exits 2."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def base_parser(
    name: str, description: str, epilog: str | None = None, usage: str | None = None
) -> argparse.ArgumentParser:
    """Returns a parser whose errors are one line, and which takes no abbreviated flags.

    Args:
        name: of the subcommand; empty for the main command.
        description: one paragraph, wrapped to the width of the terminal.
        epilog: printed after the flags, as it is.
        usage: instead of a list of all flags; `%(prog)s` is the program.
    """
    return _Parser(
        prog=command.program(name),
        usage=usage and _wrapped(usage % {"prog": command.program(name)}, " " * len("usage: ")),
        description=_wrapped(description),
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # An abbreviation may be a flag of Beam's, or become one of ours.
        allow_abbrev=False,
    )


def _wrapped(text: str, indent: str = "") -> str:
    """Wraps text to the width of the terminal, as argparse does with the help of flags.

    It would do so with a description too, but then it would also join the lines of the examples.
    """
    width = max(shutil.get_terminal_size().columns - 2, 40) - len(indent)
    return textwrap.fill(text, width, subsequent_indent=indent)


def add_tracking(group: FlagGroup) -> None:
    """Adds the flags that say where MLflow is."""
    group.add_argument("--tracking_uri", help="MLflow tracking server or store (default: MLFLOW_TRACKING_URI)")
    group.add_argument(
        "--tracking_audience",
        metavar="AUDIENCE",
        help="the tracking server is behind Google IAP (AUDIENCE is its client id) or on Cloud Run (its URL): send it "
        "an identity token",
    )


def add_destination(group: FlagGroup) -> None:
    """Adds the flags that say where the tables are."""
    # No default of its own: only an --env that was given contradicts --dataset.
    group.add_argument("--env", choices=ENVS, help=f"dataset raw_ENV (default: {ENVS[0]})")
    group.add_argument("--dataset", help="DATASET or PROJECT.DATASET instead of raw_ENV; its location is used")
    group.add_argument(
        "--table_prefix", default="two_tower", help="tables are PREFIX_TOWER_embeddingSUFFIX (default: %(default)s)"
    )
    group.add_argument(
        "--table_suffix",
        default="",
        metavar="SUFFIX",
        help="end of the tables' names, for a history that has such names already: _history for "
        "two_tower_user_embedding_history (default: none)",
    )


def add_impersonation(group: FlagGroup) -> None:
    """Adds Beam's flag that says as whom to act."""
    group.add_argument(
        "--impersonate_service_account",
        action="append",
        metavar="ACCOUNT",
        help="make every request of this process to Google Cloud as that service account; a chain is "
        "ACCOUNT,...,ACCOUNT, the account to act as last",
    )


def _beam_args(ours: argparse.ArgumentParser, found: argparse.Namespace, rest: Sequence[str]) -> tuple[str, ...]:
    """Returns the command line for Beam; exits 2 if accounts to impersonate are malformed.

    Beam would take the last alone of accounts whose flag is repeated, as a list in Airflow repeats it.
    """
    given = ",".join(found.impersonate_service_account or [])
    accounts = [account.strip() for account in given.split(",") if account.strip()]
    for account in accounts:
        if not _ACCOUNT.fullmatch(account):
            ours.error(
                f"--impersonate_service_account={account!r} is not an account: NAME@PROJECT.iam.gserviceaccount.com, "
                "in a chain separated by commas, the account to act as last"
            )
    if accounts and found.warehouse:
        ours.error("--warehouse makes no requests to Google Cloud; leave out --impersonate_service_account")
    return (
        *rest,
        *([f"--project={found.project}"] if found.project else []),
        *([f"--impersonate_service_account={','.join(accounts)}"] if accounts else []),
    )


def dataset(ours: argparse.ArgumentParser, found: argparse.Namespace) -> tuple[str | None, str]:
    """Returns the dataset's project, None if --dataset names none, and the dataset; exits 2 if they are malformed."""
    if found.project and not re.fullmatch(_PROJECT, found.project):
        ours.error(f"--project={found.project!r} is not a project id")
    if not _NAME.fullmatch(found.table_prefix):
        ours.error(f"--table_prefix={found.table_prefix!r}: only letters, digits and _")
    if not _SUFFIX.fullmatch(found.table_suffix):
        ours.error(f"--table_suffix={found.table_suffix!r}: only letters, digits and _")
    if found.dataset and found.env:
        ours.error(f"--env={found.env} is dataset raw_{found.env} and --dataset={found.dataset} another; leave out one")
    if not found.dataset:
        return None, f"raw_{found.env or ENVS[0]}"
    match = _DATASET.fullmatch(found.dataset)
    if not match:
        ours.error(f"--dataset={found.dataset!r}: DATASET or PROJECT.DATASET, of letters, digits and _")
    return match[1], match[2]


def job_values(ours: argparse.ArgumentParser, found: argparse.Namespace, rest: Sequence[str]) -> dict[str, Any]:
    """Returns the values of a `JobConfig`, each by its name; exits 2 if they are malformed or contradict each other.

    Args:
        ours: the parser, for errors.
        found: what it found; a flag that it does not have is left at its default.
        rest: what is Beam's.
    """
    dataset_project, dataset_name = dataset(ours, found)
    values = {name: value for name, value in vars(found).items() if name in _JOB_FLAGS}
    values |= {
        "env": found.env or ENVS[0],
        "dataset": dataset_name,
        "dataset_project": dataset_project,
        "beam_args": _beam_args(ours, found, rest),
    }
    config = JobConfig(**values)
    if config.staging_dataset and not _DATASET.fullmatch(config.staging_dataset):
        ours.error(f"--staging_dataset={config.staging_dataset!r}: DATASET or PROJECT.DATASET")
    if config.kms_key and not _KMS_KEY.fullmatch(config.kms_key):
        ours.error(f"--kms_key={config.kms_key!r}: projects/P/locations/L/keyRings/R/cryptoKeys/K")
    if config.warehouse and not config.local:
        ours.error(f"--warehouse runs with DirectRunner only, not with {config.runner}")
    if config.warehouse and config.env != ENVS[0]:
        ours.error(f"--warehouse is for the laptop: leave out --env={config.env}")
    if config.warehouse and any(text.partition("=")[0] == "--temp_location" for text in rest):
        ours.error("--warehouse has a bucket of its own; leave out --temp_location")
    return values


_JOB_FLAGS = {each.name for each in fields(JobConfig)} - {"beam_args", "started"}


def is_tower(name: str) -> bool:
    """Returns whether a tower can have that name."""
    return _TOWER.fullmatch(name) is not None


def parser() -> argparse.ArgumentParser:
    """Returns the parser of our own flags."""
    result = base_parser(
        "",
        "Reads the user and item embeddings of a two-tower model from its MLflow run and publishes them, "
        "both at once and never twice, as one partition of two BigQuery tables. A vector is the one that the model "
        "serves for the id; where a tower continues after its embedding (Dense, concatenation, ...), nothing is "
        "published unless --embedding_rows asks for the embedding's rows.",
        _EPILOG,
        _USAGE,
    )
    result.add_argument("--version", action="version", version=__version__)
    model = result.add_argument_group("model", "one of --run_id, --experiment_name and --model_uri")
    model.add_argument("--run_id", metavar="ID", help="MLflow run")
    model.add_argument(
        "--experiment_name", metavar="NAME", help="MLflow experiment: its latest FINISHED run that has the model"
    )
    model.add_argument(
        "--run_name", metavar="NAME", help="with --experiment_name: the latest FINISHED run of that name"
    )
    model.add_argument(
        "--model_uri",
        metavar="URI",
        help="MLflow model: runs:/ID/PATH, models:/NAME/VERSION, models:/NAME@ALIAS or models:/m-ID",
    )
    model.add_argument(
        "--all_runs",
        action="store_true",
        help="with --experiment_name: every FINISHED run (of --run_name), each into its own partition, in one job; "
        "runs that are published already are left out",
    )
    model.add_argument("--since", metavar="DATE", type=to_date, help="with --all_runs: trained on DATE (UTC) or later")
    model.add_argument(
        "--until", metavar="DATE", type=to_date, help="with --all_runs: trained on DATE (UTC) or earlier"
    )
    add_tracking(model)
    model.add_argument(
        "--artifact_path",
        help="the model's folder inside the run's artifacts, or the name it was logged by (default: model, or the "
        "run's only model)",
    )
    towers = result.add_argument_group("towers")
    towers.add_argument(
        "--tower",
        action="append",
        metavar="NAME=LAYER",
        help="a tower and the attribute path of the layer that holds its lookup and its embedding, of an embedding "
        "that a lookup feeds, or of a search index; repeat for each, or separate them by commas; PATH:LAYER for a "
        "tower that is in a model of its own, of which PATH is the --artifact_path, PATH: for its only tower "
        f"(default: {' '.join(f'{name}={layer}' for name, layer in DEFAULT_TOWERS.items())})",
    )
    towers.add_argument(
        "--ids",
        action="append",
        metavar="NAME=PATH",
        help="the ids of a tower whose embedding has no lookup, in a file inside the run's artifacts or at gs://: text "
        "(an id a line), a JSON array, .npy or .npz, in the order of the rows; or a JSON object of id and row, .csv or "
        ".parquet with columns id and row (PATH#ID,ROW names them otherwise). NAME=rows: the number of a row is its "
        "id. Repeat for each tower, or separate them by commas",
    )
    towers.add_argument(
        "--first_row",
        action="append",
        metavar="NAME=ROW",
        help="with --ids in the order of the rows: the row of the first id, if rows before it stand for unknown ids "
        "(default: 0)",
    )
    towers.add_argument(
        "--vectors",
        action="append",
        metavar="NAME=PATH",
        help="instead of --tower: the vectors of a tower as the trainer logged them, in a file inside the run's "
        "artifacts or at gs://: .parquet with columns id and vector (PATH#ID,VECTOR names them otherwise; also a "
        "folder of such files, or a pattern), .npz with ids and vectors (PATH#IDS,VECTORS), .npy or .safetensors "
        "(PATH#TENSOR) with --ids. The towers are then those that --tower and --vectors name",
    )
    towers.add_argument(
        "--include_oov", action="store_true", help="also write the rows of out-of-vocabulary and mask tokens"
    )
    towers.add_argument(
        "--embedding_rows",
        action="store_true",
        help="publish the rows of an embedding even where the tower continues after it, so that they are not the "
        "vectors that the model serves; the log's column vector_source says so",
    )
    towers.add_argument(
        "--compute",
        action="append",
        metavar="NAME",
        help="compute the vectors of this tower, repeatable: TensorFlow (the extra `compute`) calls the part of the "
        "model that --tower names, on the workers. It runs the operations of the model's graph, and the vectors have "
        "no checksum; the log's column vector_source is computed",
    )
    towers.add_argument(
        "--features",
        action="append",
        metavar="NAME=SOURCE",
        help="where a computed tower's ids (column NAME_id) and other inputs come from, columns named like the inputs: "
        "a query in BigQuery, or Parquet files (gs://BUCKET/PATH/*.parquet); repeatable, or a JSON object "
        "(default: the ids of the tower's lookup)",
    )
    target = result.add_argument_group("destination")
    add_destination(target)
    target.add_argument(
        "--project", help="Google Cloud project of the job, and of the dataset unless --dataset names another"
    )
    target.add_argument("--staging_dataset", help="DATASET or PROJECT.DATASET for staging tables, in the same location")
    target.add_argument(
        "--warehouse",
        metavar="DIR",
        help="instead of Google Cloud: BigQuery and Cloud Storage emulators that run with the job and keep their data "
        "in DIR",
    )
    target.add_argument(
        "--partition_expiration_days",
        type=int,
        metavar="DAYS",
        help="set when a table is created (default: kept forever, whatever the dataset's default)",
    )
    target.add_argument(
        "--require_partition_filter",
        action="store_true",
        help="set when a table is created: queries must name a train_date",
    )
    target.add_argument(
        "--kms_key",
        metavar="KEY",
        help="Cloud KMS key, projects/P/locations/L/keyRings/R/cryptoKeys/K, of every table, load and copy job, in the "
        "dataset's location, and of the Dataflow job, unless --dataflow_kms_key names one in its region, as it has to "
        "where the dataset is in a multi-region; files in the bucket have the bucket's own default key",
    )
    target.add_argument(
        "--vector_index",
        choices=DISTANCES,
        help="create a vector index of each tower's table unless it has one, by this distance: VECTOR_SEARCH uses it "
        "within a training (default: none)",
    )
    target.add_argument(
        "--latest_tables",
        action="store_true",
        help="also keep each tower's newest training in a table of its own, PREFIX_TOWER_embedding_latestSUFFIX, "
        "replaced in the same transaction; an older run never replaces a newer one",
    )
    safety = result.add_argument_group("safety")
    safety.add_argument(
        "--if_partition_taken",
        default="fail",
        choices=IF_TAKEN,
        help="the run's date already holds rows of another run: fail before anything is written, replace them, or "
        "keep both (default: fail)",
    )
    safety.add_argument(
        "--allow_dimension_change",
        action="store_true",
        help="publish vectors of another length than the table's latest partition (VECTOR_SEARCH needs one length)",
    )
    modes = result.add_argument_group("modes")
    modes.add_argument(
        "--plan",
        nargs="?",
        const="text",
        choices=("text", "json"),
        help="check everything, print the report and the SQL that would run, and stop; exit 0 only if the job "
        "could run",
    )
    modes.add_argument(
        "--inspect",
        action="store_true",
        help="print the towers of the model, with examples of their ids, and stop; needs no destination",
    )
    modes.add_argument(
        "--tag_run",
        action="store_true",
        help="tag the MLflow run with table, partition and rows, where this process waits for the job; elsewhere "
        "python -m beam_pipeline.tag does it afterwards",
    )
    modes.add_argument(
        "--writer",
        default="columnar",
        choices=("columnar", "rows"),
        help="columnar: batches straight to Avro blocks; rows: Beam's built-in WriteToBigQuery, ten times slower, same "
        "tables (default: columnar)",
    )
    beam = result.add_argument_group(
        "Beam",
        _wrapped(
            "All options of Apache Beam work too, among them --region, --temp_location, --job_name and --setup_file.",
            "  ",
        ),
    )
    beam.add_argument(
        "--runner",
        default="DirectRunner",
        help="DirectRunner, the default, runs the job in this process, always with Beam's in-process FnApiRunner; "
        "DataflowRunner, PrismRunner, FlinkRunner and PortableRunner run it elsewhere",
    )
    add_impersonation(beam)
    beam.add_argument(
        "--shared_files",
        action="store_true",
        help="with PrismRunner, FlinkRunner or PortableRunner: the workers run on this machine, or mount its folders, "
        "so that they can read a model in a local folder",
    )
    return result


def parse(argv: Sequence[str]) -> Config:
    """Returns the checked configuration.

    Raises:
        SystemExit: with code 2 and one line on stderr, for unknown, malformed or contradicting flags; 0 after --help.
    """
    ours = parser()
    found, rest = ours.parse_known_args(list(bare_switches(ours, argv)))
    refuse_unknown(ours, rest)
    # Not argparse's exclusive groups: their messages name no remedy.
    if not found.run_id and not found.experiment_name and not found.model_uri:
        ours.error(
            "name the model: --run_id=ID, --experiment_name=NAME for its latest FINISHED run, or --model_uri=URI"
        )
    if found.model_uri and (found.run_id or found.experiment_name or found.run_name or found.artifact_path is not None):
        ours.error("--model_uri names one model; leave out --run_id, --experiment_name, --run_name and --artifact_path")
    if found.run_id and (found.experiment_name or found.run_name):
        ours.error("--run_id names one run; leave out --experiment_name and --run_name")
    if found.all_runs and not found.experiment_name:
        ours.error("--all_runs needs an experiment: name it with --experiment_name")
    if (found.since or found.until) and not found.all_runs:
        ours.error("--since and --until choose among --all_runs")
    if found.since and found.until and found.since > found.until:
        ours.error(f"--since={found.since} is after --until={found.until}")
    towers = _towers(ours, found.tower, found.vectors)
    sources = _sources(ours, found, towers)
    if found.partition_expiration_days is not None and found.partition_expiration_days < 1:
        ours.error(f"--partition_expiration_days={found.partition_expiration_days}: at least 1")
    if found.vector_index and found.allow_dimension_change:
        ours.error(
            f"--vector_index={found.vector_index} needs vectors of one length, and --allow_dimension_change allows "
            "several; leave out one"
        )
    compute = _compute(ours, found, towers)
    for name in compute:
        for flag in ("ids", "vectors"):
            if name in sources[flag]:
                ours.error(f"--compute={name} and --{flag}={name}=… are two sources for one tower; leave out one")
    config = Config(
        **job_values(ours, found, rest),
        run_id=found.run_id,
        experiment_name=found.experiment_name,
        run_name=found.run_name,
        model_uri=found.model_uri,
        all_runs=found.all_runs,
        since=found.since,
        until=found.until,
        artifact_path=found.artifact_path and found.artifact_path.strip("/"),
        towers=towers,
        discover=not found.tower and not found.vectors,
        **sources,
        if_partition_taken=found.if_partition_taken,
        partition_expiration_days=found.partition_expiration_days,
        allow_dimension_change=found.allow_dimension_change,
        vector_index=found.vector_index,
        latest_tables=found.latest_tables,
        include_oov=found.include_oov,
        embedding_rows=found.embedding_rows,
        compute=compute,
        features=_features(ours, found.features, compute),
        writer=found.writer,
        tag_run=found.tag_run,
        inspect=found.inspect,
        plan=found.plan,
        shared_files=found.shared_files,
    )
    if config.shared_files and config.runner not in _PORTABLE_RUNNERS:
        ours.error(f"--shared_files is for {', '.join(_PORTABLE_RUNNERS)}; leave it out with {config.runner}")
    for name, source in config.features.items():
        if not (config.reads_local_files or is_query(source) or "://" in source):
            ours.error(
                f"--features={name}={source!r}: {config.runner} cannot read files of this machine; put them on "
                f"gs://{config.sharing}, or use --runner=DirectRunner"
            )
    if config.plan and config.inspect:
        ours.error("--inspect stops before anything that --plan shows; leave out one")
    if config.tag_run and not config.waits:
        ours.error(
            f"--tag_run needs a published job, and this process does not wait for {config.runner}; leave it out and "
            f"run {command.program('tag')} afterwards"
        )
    _refuse_idle(ours, config)
    return config


def _refuse_idle(ours: argparse.ArgumentParser, config: Config) -> None:
    """Exits 2 for flags that would do nothing beside the others.

    --plan and --inspect are for the command of a job as it is, so what they stop before is no error.
    """
    if config.inspect and config.all_runs:
        ours.error("--inspect shows the model of one run; leave out --all_runs")
    embeddings = [name for name in config.layers if name not in config.compute]
    if config.embedding_rows and not embeddings:
        ours.error(
            "--embedding_rows is for towers that end in an embedding of a model, and there is none; leave it out"
        )
    if config.include_oov and all(name in config.ids for name in embeddings):
        ours.error("--include_oov is for towers with a lookup in a model, and there is none; leave it out")
    if all(":" in layer for layer in config.layers.values()):
        if config.artifact_path is not None:
            ours.error(
                "--artifact_path is for towers in one model, and each has a PATH or file of its own; leave it out"
            )
        if config.model_uri:
            ours.error(
                "--model_uri names one model, and each tower has a PATH or file of its own; name the run with --run_id"
            )


def to_date(text: str) -> date:
    """Returns the date of a flag's value, for argparse."""
    try:
        return date.fromisoformat(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a date: YYYY-MM-DD") from error


def bare_switches(ours: argparse.ArgumentParser, argv: Sequence[str]) -> Iterator[str]:
    """Yields `--switch=true` as `--switch` and leaves `--switch=false` out: a template has values only."""
    switches = {flag for action in ours._actions if action.nargs == 0 for flag in action.option_strings}
    for text in argv:
        flag, _, value = text.partition("=")
        if flag not in switches or value.lower() not in ("true", "false"):
            yield text
        elif value.lower() == "true":
            yield flag


def _towers(ours: argparse.ArgumentParser, given: list[str] | None, vectors: list[str] | None = None) -> dict[str, str]:
    """Returns tower → layer, or the file of its vectors."""
    if not given and not vectors:
        return dict(DEFAULT_TOWERS)
    towers: dict[str, str] = {}
    # A template takes a parameter once.
    for flag, pairs in (("--tower", ",".join(given or ()).split(",")), ("--vectors", _pairs(vectors))):
        for text in pairs if given or flag == "--vectors" else ():
            name, _, layer = text.partition("=")
            if not layer or layer.startswith(":") or not _TOWER.fullmatch(name):
                value = "LAYER" if flag == "--tower" else "PATH"
                ours.error(f"{flag}={text!r}: NAME={value}, with a NAME of lower-case letters, digits and _")
            if name in towers:
                ours.error(f"{flag}={text!r}: tower {name!r} is named twice; a tower has one source")
            towers[name] = layer
    return towers


def _compute(ours: argparse.ArgumentParser, found: argparse.Namespace, towers: Mapping[str, str]) -> tuple[str, ...]:
    names = [name.strip() for name in ",".join(found.compute or []).split(",") if name.strip()]
    for name in names:
        if name not in towers:
            ours.error(f"--compute={name}: there is no such tower; towers are {', '.join(towers)}")
    if names and found.include_oov:
        ours.error("--include_oov adds rows of an embedding, and --compute computes ids alone; leave out one")
    return tuple(dict.fromkeys(names))


def _features(ours: argparse.ArgumentParser, given: list[str] | None, compute: Sequence[str]) -> dict[str, str]:
    features: dict[str, str] = {}
    for name, source in _named_sources(ours, given or []):
        if name in features:
            ours.error(f"--features: tower {name!r} has two sources; its ids come from one")
        if name not in compute:
            ours.error(f"--features={name}=…: features are for a tower that is computed; add --compute={name}")
        if not is_query(source) and not source.endswith(".parquet"):
            ours.error(f"--features={name}={source!r}: a query or Parquet files (….parquet, with * and ?)")
        features[name] = source
    return features


def _named_sources(ours: argparse.ArgumentParser, given: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yields (tower, source) of `tower=source` and of JSON objects: a template takes a parameter once."""
    for text in given:
        if text.lstrip().startswith("{"):
            try:
                named = list(json.loads(text).items())
            except ValueError:
                ours.error(f"--features={text!r} is not a JSON object")
        else:
            name, _, source = text.partition("=")
            named = [(name, source)]
        for name, source in named:
            if not isinstance(source, str) or not source.strip() or not is_tower(name.strip()):
                ours.error(f"--features={text!r}: NAME=SOURCE, with the NAME of a tower")
            # A query becomes a part of a statement, in which a semicolon would end it.
            yield name.strip(), source.strip().rstrip(";").rstrip()


def _pairs(given: list[str] | None) -> list[str]:
    return _PAIRS.split(",".join(given)) if given else []


def _sources(ours: argparse.ArgumentParser, found: argparse.Namespace, towers: Mapping[str, str]) -> dict[str, Any]:
    """Returns --ids, --first_row and --vectors by tower."""
    sources: dict[str, dict[str, Any]] = {"ids": {}, "first_row": {}, "vectors": {}}
    for flag, values in sources.items():
        for text in _pairs(getattr(found, flag)):
            name, _, value = text.partition("=")
            if name not in towers or not value:
                ours.error(f"--{flag}={text!r}: NAME={'ROW' if flag == 'first_row' else 'PATH'} of one of the towers, "
                           f"which are {', '.join(towers)}")  # fmt: skip
            if name in values:
                ours.error(f"--{flag}={text!r}: tower {name!r} is named twice")
            if flag != "first_row":
                values[name] = _named_file(ours, found, f"--{flag}={text!r}", value)
            elif name not in sources["ids"]:
                ours.error(f"--first_row={text!r}: needs --ids of the same tower, and there are none for {name!r}")
            elif not value.isdecimal() or len(value) > 18:  # 18 digits always fit into the int64 of a row number.
                ours.error(f"--first_row={text!r}: the number of a row, 0 or more")
            else:
                values[name] = int(value)
    return sources


def _named_file(ours: argparse.ArgumentParser, found: argparse.Namespace, flag: str, value: str) -> NamedFile:
    path, _, names = value.partition("#")
    if path == ROW_NUMBERS.path and flag.startswith("--ids"):
        return ROW_NUMBERS
    inside = path.removeprefix("gs://")
    # A path that leaves the artifacts would name a file of whatever machine has them.
    if not inside or inside.startswith("/") or "://" in inside or ".." in inside.split("/"):
        ours.error(f"{flag}: a path inside the run's artifacts, or gs://BUCKET/PATH")
    if path.startswith("gs://") and found.all_runs:
        ours.error(f"{flag}: each of --all_runs has a file of its own; name it by its path inside the run's artifacts")
    return NamedFile(path.rstrip("/"), tuple(names.split(",")) if names else ())


def refuse_unknown(ours: argparse.ArgumentParser, rest: list[str]) -> None:
    """Exits 2 if Beam does not know a flag either: Beam itself would only warn, and run without it."""
    if not rest:
        return
    # Beam has no public way to ask which flags it knows; this is how PipelineOptions.get_all_options does it.
    from apache_beam.options.pipeline_options import PipelineOptions, _BeamArgumentParser

    beam = _BeamArgumentParser(allow_abbrev=False)
    for options in {str(cls): cls for cls in PipelineOptions.__subclasses__()}.values():
        options._add_argparse_args(beam)
    _, unknown = beam.parse_known_args(rest)
    if unknown:
        flags = [flag for action in [*ours._actions, *beam._actions] for flag in action.option_strings]
        near = difflib.get_close_matches(unknown[0].split("=")[0], flags, n=1)
        ours.error(f"unknown flag {unknown[0]}" + (f"; did you mean {near[0]}?" if near else ""))
