"""What a person at the terminal sees; plain lines where the output is not a terminal."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TextIO

from beam_pipeline import metrics
from beam_pipeline.bigquery import tables
from beam_pipeline.bigquery.publication import Publication
from beam_pipeline.launch.preflight import Findings
from beam_pipeline.reading.tally import Tally
from beam_pipeline.tracking.runs import Model
from beam_pipeline.training import Run

_EVERY_TERMINAL, _EVERY_LOG = 0.2, 10.0


def set_up_logging() -> None:
    """Sets up the root logger; for a command line alone, never for a program that imports the package."""
    logging.basicConfig()
    # At a terminal Beam's INFO lines would bury everything else.
    logging.getLogger().setLevel(logging.WARNING if sys.stderr.isatty() else logging.INFO)
    for chatty in ("google.auth", "urllib3", "alembic", "mlflow"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


class Terminal:
    """Prints to stdout; Beam's own lines go to stderr, where a supervising process finds them.

    With `as_json` stdout is the report's alone, and all else goes to stderr. `started` is when the command line began,
    on the monotonic clock; now, if it is not given.
    """

    def __init__(self, *, as_json: bool = False, started: float | None = None) -> None:
        self._as_json = as_json
        self._started = time.monotonic() if started is None else started

    def report(self, publication: Publication, findings: Findings) -> None:
        """Prints what is going to be historized, and what was checked before; as JSON with the SQL."""
        if self._as_json:
            print(json.dumps(_as_json(publication, findings), indent=2, ensure_ascii=False), flush=True)
            return
        destination = publication.destination
        for number, training in enumerate(publication.trainings):
            run = training.run
            if not number:
                self._print(f"experiment  {run.experiment_name}")
            self._run(run, training.model_uri)
            for tower in training.towers.values():
                matrix = tower.matrix
                self._print(
                    f"{tower.name:<11} {matrix.rows:,} rows × {matrix.dimension} {matrix.dtype} of {tower.layer} → "
                    f"{destination.table(tower.name)}",
                )
        width = max(len(line.check) for line in findings.lines)
        for line in findings.lines:
            self._print(f"{line.status:<4}  {line.check:<{width}}  {line.text}")
        self._out.flush()

    def sql(self, publication: Publication) -> None:
        """Prints the SQL that the job would run."""
        if not self._as_json:
            self._print(f"\n{_sql(publication)}", end="", flush=True)

    def submitted(self, result: Any, runner: str) -> None:
        """Prints where the job runs, which goes on without this process."""
        # Dataflow's result has a job; where --template_location asked for a description instead, it has none.
        job = f", job {result.job_id()}" if getattr(result, "has_job", False) else ""
        self._print(f"submitted   to {runner}{job}", flush=True)

    def progress(self, publication: Publication) -> AbstractContextManager[None]:
        """Shows rows done of total and rows per second while the job runs in this process."""
        total = sum(tower.matrix.rows for training in publication.trainings for tower in training.towers.values())
        before = metrics.in_this_process("read-rows")  # of an earlier job in this process

        def line(rows: int, seconds: float) -> str:
            return f"rows        {rows:,} of {total:,} ({rows / max(total, 1):.0%}), {rows / seconds:,.0f} rows/s"

        return self._progress(lambda: metrics.in_this_process("read-rows") - before, line)

    def copying(self, files: int, size: int, to: str, done: Callable[[], int]) -> AbstractContextManager[None]:
        """Shows bytes done of `size` while a model of so many files is copied."""
        self._print(f"copying     {files:,} files, {_megabytes(size)}, to {to}", flush=True)

        def line(copied: int, seconds: float) -> str:
            return (
                f"copied      {_megabytes(copied)} of {_megabytes(size)} ({copied / max(size, 1):.0%}), "
                f"{_megabytes(copied / seconds)}/s"
            )

        return self._progress(done, line)

    def found(self, model: Model) -> None:
        """Prints which model is taken, where that does not go without saying."""
        self._print(f"found       {model.name}", flush=True)

    def inspected(self, run: Run, folder: str, lines: Iterable[str]) -> None:
        """Prints what is in a run's model."""
        self._print(f"experiment  {run.experiment_name}")
        self._run(run, folder)
        for line in lines:
            self._print(line, flush=True)

    def discovered(self, towers: Mapping[str, str]) -> None:
        """Prints which layers are taken for the towers, none having been named."""
        told = " ".join(f"--tower={name}={layer}" for name, layer in towers.items())
        self._print(f"towers      found by the names of the model's only two: {told}", flush=True)

    def left_out(self, run: Run, reason: str) -> None:
        """Prints that a run of the experiment is left out, and why."""
        self._print(f"left out    {run.train_date} {run.run_name} ({run.run_id}): {reason}", flush=True)

    def chosen(self, count: int, published: int) -> None:
        """Prints how many runs of --all_runs are to be published."""
        self._print(f"runs        {count:,} to publish, {published:,} published already", flush=True)

    def nothing_to_do(self, published: int, without_model: int) -> None:
        """Prints that every run that has a model is published already."""
        others = f", and {without_model:,} have no model" if without_model else ""
        self._print(f"done        nothing to do: {published:,} runs are published already{others}", flush=True)

    def summary(self, publication: Publication, rows: Mapping[str, int]) -> None:
        """Prints what was published: rows per tower, partitions, seconds since the command line began."""
        days = sorted({training.run.train_date for training in publication.trainings})
        where = f"partition {days[0]}" if len(days) == 1 else f"{len(days):,} partitions {days[0]} to {days[-1]}"
        for tower, count in rows.items():
            self._print(f"published   {publication.destination.table(tower)}, {where}: {count:,} rows")
        first = metrics.first_in_this_process("read-bytes")
        read = f", the first vectors read after {first - self._started:.1f} s" if first else ""
        self._print(f"done        in {time.monotonic() - self._started:.1f} s{read}", flush=True)

    @contextmanager
    def _progress(self, count: Callable[[], int], line: Callable[[int, float], str]) -> Iterator[None]:
        done = threading.Event()
        thread = threading.Thread(target=self._show_progress, args=(count, line, done), daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _show_progress(
        self, count: Callable[[], int], line: Callable[[int, float], str], done: threading.Event
    ) -> None:
        """Prints `line(count, seconds)` whenever the count has changed, until `done`."""
        live = self._out.isatty()
        # Nothing is counted here while workers in other processes do the work.
        started, shown = time.monotonic(), 0
        while True:
            finished = done.wait(_EVERY_TERMINAL if live else _EVERY_LOG)
            now = count()
            if now == shown and not (finished and live and now):
                if finished:
                    return
                continue
            shown = now
            text = line(now, max(time.monotonic() - started, 1e-9))
            if live:
                self._print(f"\r\x1b[K{text}", end="\n" if finished else "", flush=True)
            else:
                self._print(text, flush=True)
            if finished:
                return

    def _run(self, run: Run, model: str) -> None:
        self._print(f"run         {run.run_name} ({run.run_id}), trained {run.train_date} UTC")
        self._print(f"model       {model}")

    @property
    def _out(self) -> TextIO:
        return sys.stderr if self._as_json else sys.stdout

    def _print(self, text: str, *, end: str = "\n", flush: bool = False) -> None:
        print(text, end=end, flush=flush, file=self._out)


def _sql(publication: Publication) -> str:
    """The publish scripts; launch id and tallies are known only when the job runs."""
    unknown = Tally(ids=0, bytes=0, norm_min=0.0, norm_mean=0.0, norm_max=0.0, zero_vectors=0)
    return "\n".join(
        f"-- run {training.run.run_id}; the numbers of the log's rows and the launch id are made by the job\n"
        + tables.publish_script(
            publication.destination,
            training,
            "LAUNCH",
            publication.if_partition_taken,
            dict.fromkeys(publication.towers, unknown),
            publication.job_name,
        )
        for training in publication.trainings
    )


def _as_json(publication: Publication, findings: Findings) -> dict[str, Any]:
    return {
        "go": findings.error is None,
        "trainings": [
            {
                "run_id": training.run.run_id,
                "run_name": training.run.run_name,
                "experiment_name": training.run.experiment_name,
                "train_date": str(training.run.train_date),
                "model_uri": training.model_uri,
                "towers": [
                    {
                        "tower": tower.name,
                        "layer": tower.layer,
                        "rows": tower.matrix.rows,
                        "dimension": tower.matrix.dimension,
                        "dtype": tower.matrix.dtype,
                        "table": publication.destination.table(tower.name),
                    }
                    for tower in training.towers.values()
                ],
            }
            for training in publication.trainings
        ],
        "findings": [{"check": line.check, "status": line.status, "text": line.text} for line in findings.lines],
        "sql": _sql(publication),
    }


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f} MB"
