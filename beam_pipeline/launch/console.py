"""What a person at the terminal sees; plain lines where the output is not a terminal."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from beam_pipeline import metrics
from beam_pipeline.bigquery.publication import Publication
from beam_pipeline.launch.findings import Findings
from beam_pipeline.launch.plan import Plan, as_json, as_sql
from beam_pipeline.launch.selection import LeftOut
from beam_pipeline.tracking.models import Model
from beam_pipeline.training import Run

_EVERY_TERMINAL, _EVERY_LOG = 0.2, 10.0
_COLOURS = {"ok": "green", "note": "yellow", "stop": "bold red"}


def set_up_logging() -> None:
    """Sets up the root logger; only for a command line, never for a program that imports the package."""
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
        from rich.console import Console  # Workers import this module, and do not have it.

        # What is printed is a name or a number as it is, never rich's markup.
        self._console = Console(stderr=as_json, markup=False, emoji=False, highlight=False)

    def report(self, plan: Plan, *, with_sql: bool) -> None:
        """Prints what is going to be published, what was checked before, and the SQL if it was asked for."""
        if self._as_json:
            print(json.dumps(as_json(plan), indent=2, ensure_ascii=False), flush=True)
            return
        publication = plan.publication
        self._print(f"experiment  {publication.trainings[0].run.experiment_name}")
        for training in publication.trainings:
            self._run(training.run, training.model_uri)
            for name, tower in training.towers.items():
                matrix = tower.matrix
                rows = "computed" if tower.is_computed else f"{matrix.rows:,} rows"
                self._print(
                    f"{name:<11} {rows} × {matrix.dimension} {matrix.dtype} of {tower.layer} → "
                    f"{publication.destination.table(name)}",
                )
        self.findings(plan.findings)
        if with_sql:
            self._print(f"\n{as_sql(publication)}", end="")

    def findings(self, findings: Findings) -> None:
        """Prints what was checked, a line each; as a table in colours at a terminal."""
        if not self._console.is_terminal:
            width = max(len(line.check) for line in findings.lines)
            for line in findings.lines:
                self._print(f"{line.status:<4}  {line.check:<{width}}  {line.text}")
            return
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2, 0, 0))
        for line in findings.lines:
            table.add_row(Text(line.status, _COLOURS[line.status]), Text(line.check), Text(line.text))
        self._console.print(table)

    def submitted(self, result: Any, runner: str) -> None:
        """Prints where the job runs, which continues without this process."""
        # Dataflow's result has a job; where --template_location asked for a description instead, it has none.
        job = f", job {result.job_id()}" if getattr(result, "has_job", False) else ""
        self._print(f"submitted   to {runner}{job}")

    def progress(self, publication: Publication) -> AbstractContextManager[None]:
        """Shows how many of all rows are done, and rows per second, while the job runs in this process."""
        total = sum(tower.matrix.rows for training in publication.trainings for tower in training.towers.values())
        before = metrics.in_this_process("read-rows")  # of an earlier job in this process

        def line(rows: int, seconds: float) -> str:
            return f"rows        {rows:,} of {total:,} ({rows / max(total, 1):.0%}), {rows / seconds:,.0f} rows/s"

        return self._progress(lambda: metrics.in_this_process("read-rows") - before, total, line)

    def copying(self, files: int, size: int, to: str, done: Callable[[], int]) -> AbstractContextManager[None]:
        """Shows how many of `size` bytes are done while a model of so many files is copied."""
        self._print(f"copying     {files:,} files, {_megabytes(size)}, to {to}")

        def line(copied: int, seconds: float) -> str:
            return (
                f"copied      {_megabytes(copied)} of {_megabytes(size)} ({copied / max(size, 1):.0%}), "
                f"{_megabytes(copied / seconds)}/s"
            )

        return self._progress(done, size, line)

    def found(self, model: Model) -> None:
        """Prints which model is taken, unless that is obvious."""
        if model.notable:
            self._print(f"found       {model.name}")

    def inspected(self, run: Run, folder: str, lines: Iterable[str]) -> None:
        """Prints what is in a run's model."""
        self._print(f"experiment  {run.experiment_name}")
        self._run(run, folder)
        for line in lines:
            self._print(line)

    def discovered(self, towers: Mapping[str, str] | None) -> None:
        """Prints which layers are taken for the towers, if none was named."""
        if towers:
            flags = " ".join(f"--tower={name}={layer}" for name, layer in towers.items())
            self._print(f"towers      found by the names of the model's only two: {flags}")

    def left_out(self, runs: Sequence[LeftOut]) -> None:
        """Prints which runs of the experiment are left out, and why."""
        for each in runs:
            run = each.run
            self._print(f"left out    {run.train_date} {run.run_name} ({run.run_id}): {each.reason}")

    def chosen(self, count: int, published: int) -> None:
        """Prints how many runs of --all_runs are to be published."""
        self._print(f"runs        {count:,} to publish, {published:,} published already")

    def nothing_to_do(self, published: int, without_model: int) -> None:
        """Prints that every run that has a model is published already."""
        others = f", and {without_model:,} have no model" if without_model else ""
        self._print(f"done        nothing to do: {published:,} runs are published already{others}")

    def summary(self, publication: Publication, rows: Mapping[str, int]) -> None:
        """Prints what was published: rows per tower, partitions, seconds since the command line began."""
        days = sorted({training.run.train_date for training in publication.trainings})
        where = f"partition {days[0]}" if len(days) == 1 else f"{len(days):,} partitions {days[0]} to {days[-1]}"
        for tower, count in rows.items():
            self._print(f"published   {publication.destination.table(tower)}, {where}: {count:,} rows")
        first = metrics.first_in_this_process("read-bytes")
        read = f", the first vectors read after {first - self._started:.1f} s" if first else ""
        self._print(f"done        in {time.monotonic() - self._started:.1f} s{read}")

    @contextmanager
    def _progress(self, count: Callable[[], int], total: int, line: Callable[[int, float], str]) -> Iterator[None]:
        """Shows `line(count, seconds)` while something is done: beside a bar at a terminal, now and then in a log."""
        done = threading.Event()
        show = self._show_bar if self._console.is_terminal else self._show_lines
        thread = threading.Thread(target=show, args=(count, total, line, done), daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _show_bar(
        self, count: Callable[[], int], total: int, line: Callable[[int, float], str], done: threading.Event
    ) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        started, text = time.monotonic(), TextColumn("{task.description}", markup=False)
        with Progress(text, BarColumn(bar_width=20), console=self._console, auto_refresh=False) as progress:
            task, shown, finished = progress.add_task("", total=max(total, 1), visible=False), 0, False
            while not finished:
                finished = done.wait(_EVERY_TERMINAL)
                now = count()
                # Nothing is counted here while workers in other processes do the work, and then nothing is shown.
                if now != shown:
                    shown = now
                    description = line(now, max(time.monotonic() - started, 1e-9))
                    progress.update(task, completed=now, description=description, visible=True, refresh=True)

    def _show_lines(
        self, count: Callable[[], int], _total: int, line: Callable[[int, float], str], done: threading.Event
    ) -> None:
        started, shown, finished = time.monotonic(), 0, False
        while not finished:
            finished = done.wait(_EVERY_LOG)
            now = count()
            if now != shown:
                shown = now
                self._print(line(now, max(time.monotonic() - started, 1e-9)))

    def _run(self, run: Run, model: str) -> None:
        self._print(f"run         {run.run_name} ({run.run_id}), trained {run.train_date} UTC")
        self._print(f"model       {model}")

    def _print(self, text: str, *, end: str = "\n") -> None:
        # A line is never cut or wrapped: it is searched for, and copied.
        self._console.print(text, end=end, soft_wrap=True)


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f} MB"
