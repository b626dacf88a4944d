"""The command line: our flags and Beam's, checked once; everything after works on a frozen `Config`."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from beam_pipeline import __version__
from beam_pipeline.formats.artifact import DEFAULT_TOWERS

IF_TAKEN = ("fail", "replace", "keep")

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_TOWER = re.compile(r"[a-z][a-z0-9_]{0,63}")
_PROJECT = r"(?:[a-z0-9.-]{1,100}:)?[a-z][a-z0-9-]{1,62}"
_DATASET = re.compile(rf"(?:({_PROJECT})\.)?([A-Za-z0-9_]{{1,1024}})")
_LOCAL_RUNNERS = ("DirectRunner", "FnApiRunner")


@dataclass(frozen=True)
class Config:
    """What was asked for. Each attribute is the flag of the same name; `beam_args` are Beam's own."""

    run_id: str | None = None
    experiment_name: str | None = None
    run_name: str | None = None
    tracking_uri: str | None = None
    artifact_path: str = "model"
    towers: Mapping[str, str] = field(default_factory=lambda: dict(DEFAULT_TOWERS))
    env: str = "dev"
    project: str | None = None
    dataset: str = "raw_dev"
    table_prefix: str = "two_tower"
    if_partition_taken: str = "fail"
    partition_expiration_days: int | None = None
    allow_dimension_change: bool = False
    include_oov: bool = False
    writer: str = "columnar"
    warehouse: str | None = None
    runner: str = "DirectRunner"
    beam_args: tuple[str, ...] = ()

    @property
    def local(self) -> bool:
        """Whether the job runs in this process."""
        return self.runner in _LOCAL_RUNNERS


_EPILOG = """\
All options of Apache Beam work too, among them --runner, --project, --region, --temp_location, --job_name and
--setup_file. DirectRunner, the default, always means Beam's in-process FnApiRunner.

examples:
  on a laptop, with no cloud at all:
    python -m beam_pipeline --experiment_name=two_tower --warehouse=./warehouse
    python -m beam_pipeline.emulators ./warehouse        # then query it
  on Dataflow:
    python -m beam_pipeline --run_id=4e6f… --env=prod --if_partition_taken=replace \\
      --runner=DataflowRunner --project=my-project --region=europe-west1 \\
      --temp_location=gs://my-bucket/tmp --setup_file=./setup.py
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Prints one line, not the whole usage: it is read in a log at night. Exits 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def parser() -> argparse.ArgumentParser:
    """Returns the parser of our own flags."""
    result = _Parser(
        prog="python -m beam_pipeline",
        description="Reads the user and item embeddings of a two-tower model from its MLflow run and publishes them, "
        "both at once and never twice, as one partition of two BigQuery tables.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    result.add_argument("--version", action="version", version=__version__)
    model = result.add_argument_group("which model (one of the two)")
    model.add_argument("--run_id", help="MLflow run")
    model.add_argument("--experiment_name", help="MLflow experiment: its latest FINISHED run")
    model.add_argument("--run_name", help="with --experiment_name: the latest FINISHED run of that name")
    model.add_argument("--tracking_uri", help="MLflow tracking server or store (default: MLFLOW_TRACKING_URI)")
    model.add_argument(
        "--artifact_path",
        default="model",
        help="model folder or .keras file inside the run's artifacts (default: %(default)s)",
    )
    model.add_argument(
        "--tower",
        action="append",
        metavar="NAME=LAYER",
        help="a tower and the attribute path of the layer that holds its lookup and its embedding, or of an embedding "
        "that a lookup feeds; repeat for each "
        f"(default: {' '.join(f'{name}={layer}' for name, layer in DEFAULT_TOWERS.items())})",
    )
    model.add_argument(
        "--include_oov", action="store_true", help="also write the rows of out-of-vocabulary and mask tokens"
    )
    target = result.add_argument_group("where to")
    target.add_argument("--env", default="dev", choices=("dev", "stg", "prod"), help="dataset raw_ENV (default: dev)")
    target.add_argument("--dataset", help="DATASET or PROJECT.DATASET instead of raw_ENV; its location is used")
    target.add_argument(
        "--table_prefix", default="two_tower", help="tables are PREFIX_TOWER_embedding (default: %(default)s)"
    )
    target.add_argument(
        "--if_partition_taken",
        default="fail",
        choices=IF_TAKEN,
        help="the run's date already holds rows of another run: fail before anything is written, replace them, or "
        "keep both (default: fail)",
    )
    target.add_argument(
        "--partition_expiration_days",
        type=int,
        metavar="DAYS",
        help="set when a table is made (default: kept forever, whatever the dataset's default)",
    )
    target.add_argument(
        "--allow_dimension_change",
        action="store_true",
        help="publish vectors of another length than the table's latest partition (VECTOR_SEARCH needs one length)",
    )
    target.add_argument(
        "--writer",
        default="columnar",
        choices=("columnar", "rows"),
        help="columnar: batches straight to Avro blocks; rows: Beam's stock WriteToBigQuery, ten times slower, same "
        "tables (default: columnar)",
    )
    target.add_argument(
        "--warehouse",
        metavar="DIR",
        help="instead of Google Cloud: BigQuery and Cloud Storage emulators that run with the job and keep their data "
        "in DIR",
    )
    result.add_argument("--runner", default="DirectRunner", help=argparse.SUPPRESS)
    result.add_argument("--project", help=argparse.SUPPRESS)
    return result


def parse(argv: Sequence[str]) -> Config:
    """Returns the checked configuration.

    Raises:
        SystemExit: with code 2 and one line on stderr, for unknown, malformed or contradicting flags; 0 after --help.
    """
    ours = parser()
    found, rest = ours.parse_known_args(list(argv))
    _refuse_unknown(ours, rest)
    if not found.run_id and not found.experiment_name:
        ours.error("name the model: --run_id=ID, or --experiment_name=NAME for its latest FINISHED run")
    if found.run_id and (found.experiment_name or found.run_name):
        ours.error("--run_id names one run; leave out --experiment_name and --run_name")
    towers = _towers(ours, found.tower)
    if not _NAME.fullmatch(found.table_prefix):
        ours.error(f"--table_prefix={found.table_prefix!r}: only letters, digits and _")
    if found.partition_expiration_days is not None and found.partition_expiration_days < 1:
        ours.error(f"--partition_expiration_days={found.partition_expiration_days}: at least 1")
    if found.project and not re.fullmatch(_PROJECT, found.project):
        ours.error(f"--project={found.project!r} is no project id")
    project, dataset = found.project, f"raw_{found.env}"
    if found.dataset:
        match = _DATASET.fullmatch(found.dataset)
        if not match:
            ours.error(f"--dataset={found.dataset!r}: DATASET or PROJECT.DATASET, of letters, digits and _")
        else:
            project, dataset = match[1] or project, match[2]
    config = Config(
        run_id=found.run_id,
        experiment_name=found.experiment_name,
        run_name=found.run_name,
        tracking_uri=found.tracking_uri,
        artifact_path=found.artifact_path.strip("/"),
        towers=towers,
        env=found.env,
        project=project,
        dataset=dataset,
        table_prefix=found.table_prefix,
        if_partition_taken=found.if_partition_taken,
        partition_expiration_days=found.partition_expiration_days,
        allow_dimension_change=found.allow_dimension_change,
        include_oov=found.include_oov,
        writer=found.writer,
        warehouse=found.warehouse,
        runner=found.runner,
        beam_args=(*rest, *([f"--project={found.project}"] if found.project else [])),
    )
    if config.warehouse and not config.local:
        ours.error(f"--warehouse runs with DirectRunner only, not with {config.runner}")
    if config.warehouse and config.env != "dev":
        ours.error(f"--warehouse is for the laptop: leave out --env={config.env}")
    return config


def _towers(ours: argparse.ArgumentParser, given: list[str] | None) -> dict[str, str]:
    if not given:
        return dict(DEFAULT_TOWERS)
    towers: dict[str, str] = {}
    for text in given:
        name, _, layer = text.partition("=")
        if not layer or not _TOWER.fullmatch(name):
            ours.error(f"--tower={text!r}: NAME=LAYER, with a NAME of lower-case letters, digits and _")
        if name in towers:
            ours.error(f"--tower={text!r}: tower {name!r} is named twice")
        towers[name] = layer
    return towers


def _refuse_unknown(ours: argparse.ArgumentParser, rest: list[str]) -> None:
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
        ours.error(f"unknown flag {unknown[0]}" + (f"; did you mean {near[0]}?" if near else "; see --help"))
