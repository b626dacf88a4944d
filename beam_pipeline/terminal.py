"""What a person at the terminal sees; plain lines where the output is not a terminal."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from beam_pipeline import STARTED, metrics
from beam_pipeline.formats.artifact import Tower
from beam_pipeline.runs import Model, Run
from beam_pipeline.tables import Destination

_EVERY_TERMINAL, _EVERY_LOG = 0.2, 10.0


class Terminal:
    """Prints to stdout; Beam's own lines go to stderr, where a supervising process finds them."""

    def __init__(self) -> None:
        logging.basicConfig()
        # At a terminal Beam's INFO lines would bury everything else.
        logging.getLogger().setLevel(logging.WARNING if sys.stderr.isatty() else logging.INFO)
        for chatty in ("google.auth", "urllib3", "alembic", "mlflow"):
            logging.getLogger(chatty).setLevel(logging.WARNING)

    def found(self, run: Run, towers: Sequence[Tower], destination: Destination) -> None:
        """Prints what is going to be historized."""
        print(f"experiment  {run.experiment_name}")
        print(f"run         {run.run_name} ({run.run_id}), trained {run.train_date} UTC")
        for tower in towers:
            matrix = tower.matrix
            print(
                f"{tower.name:<11} {matrix.rows:,} rows × {matrix.dimension} {matrix.dtype} → "
                f"{destination.table(tower.name)}",
            )
        sys.stdout.flush()

    def submitted(self, result: Any, runner: str) -> None:
        """Prints where the job runs, which goes on without this process."""
        # Dataflow's result has a job; where --template_location asked for a description instead, it has none.
        job = f", job {result.job_id()}" if getattr(result, "has_job", False) else ""
        print(f"submitted   to {runner}{job}", flush=True)

    def model(self, model: Model) -> None:
        """Prints which model is taken, where that does not go without saying."""
        print(f"model       {model.name}")

    def progress(self, towers: Sequence[Tower]) -> AbstractContextManager[None]:
        """Shows rows done of total and rows per second while the job runs in this process."""
        total = sum(tower.matrix.rows for tower in towers)
        before = metrics.in_this_process("read-rows")  # of an earlier job in this process

        def line(rows: int, seconds: float) -> str:
            return f"rows        {rows:,} of {total:,} ({rows / max(total, 1):.0%}), {rows / seconds:,.0f} rows/s"

        return self._progress(lambda: metrics.in_this_process("read-rows") - before, line)

    def copying(self, files: int, size: int, to: str, done: Callable[[], int]) -> AbstractContextManager[None]:
        """Shows bytes done of `size` while a model of so many files is copied."""
        print(f"copying     {files:,} files, {_megabytes(size)}, to {to}", flush=True)

        def line(copied: int, seconds: float) -> str:
            return (
                f"copied      {_megabytes(copied)} of {_megabytes(size)} ({copied / max(size, 1):.0%}), "
                f"{_megabytes(copied / seconds)}/s"
            )

        return self._progress(done, line)

    def summary(self, run: Run, rows: Mapping[str, int], destination: Destination) -> None:
        """Prints what was published: rows per tower, partition, seconds since the process began."""
        for tower, count in rows.items():
            print(f"published   {destination.table(tower)}, partition {run.train_date}: {count:,} rows")
        first = metrics.first_in_this_process("read-bytes") - STARTED
        print(
            f"done        in {time.monotonic() - STARTED:.1f} s, the first vectors read after {first:.1f} s", flush=True
        )

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
        live = sys.stdout.isatty()
        started, shown = time.monotonic(), -1
        while True:
            finished = done.wait(_EVERY_TERMINAL if live else _EVERY_LOG)
            now = count()
            if now == shown and not (finished and live):
                if finished:
                    return
                continue
            shown = now
            text = line(now, max(time.monotonic() - started, 1e-9))
            if live:
                print(f"\r\x1b[K{text}", end="\n" if finished else "", flush=True)
            else:
                print(text, flush=True)
            if finished:
                return


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f} MB"
