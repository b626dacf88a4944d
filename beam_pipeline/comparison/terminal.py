"""What a person at the terminal sees of a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from beam_pipeline import metrics
from beam_pipeline.comparison import tables, work
from beam_pipeline.comparison.results import Result
from beam_pipeline.comparison.work import Comparison
from beam_pipeline.launch.console import Terminal
from beam_pipeline.launch.findings import Findings

SHOWN_MOVERS = 5
"""Ids that moved farthest at the terminal; the page has them all."""


class ComparisonTerminal(Terminal):
    """Prints to stdout; Beam's own lines go to stderr, where a supervising process finds them."""

    def nothing(self, reason: str) -> None:
        """Prints why there is nothing to do."""
        self._print(f"done        nothing to do: {reason}")

    def skipped(self, reason: str) -> None:
        """Prints what is left out of --all, and why."""
        self._print(f"left out    {reason}")

    def planned(self, comparison: Comparison, findings: Findings) -> None:
        """Prints what is going to be compared, and what was checked before."""
        for pair in comparison.pairs:
            self._print(f"comparing   {pair} ({pair.before.run_id} → {pair.after.run_id})")
        self._print(f"results     {tables.comparison_table(comparison.destination)}")
        for tower in comparison.ids:
            self._print(f"{tower + 's':<11} {tables.change_table(comparison.destination, tower)}")
        self.findings(findings)

    def statements(self, comparison: Comparison) -> None:
        """Prints the SQL that the job would run."""
        destination = comparison.destination
        for number, pair in enumerate(comparison.pairs):
            for tower in comparison.towers:
                select = tables.join_sql(destination, tower, pair, comparison.labels.get(tower))
                self._print(f"\n-- {tables.joined_table(destination, tower, 'LAUNCH', number)}\n{select};")
            script = tables.publish_script(destination, number, pair, "LAUNCH", comparison.ids, comparison.ids)
            self._print(f"\n{script}", end="")

    def measuring(self, comparison: Comparison) -> AbstractContextManager[None]:
        """Shows ids measured and ids per second while the job runs in this process."""
        total = sum(
            max(pair.before.rows[tower], pair.after.rows[tower])
            for pair in comparison.pairs
            for tower in comparison.towers
        )
        before = metrics.in_this_process(work.READ_ROWS)  # of an earlier job in this process

        def line(ids: int, seconds: float) -> str:
            return f"ids         {ids:,} of about {total:,} measured, {ids / seconds:,.0f} ids/s"

        return self._progress(lambda: metrics.in_this_process(work.READ_ROWS) - before, total, line)

    def results(self, found: Sequence[Result]) -> None:
        """Prints the results of the pairs, and of the last one which ids moved farthest."""
        last = found[-1].pair if found else None
        shown = None
        for result in found:
            if result.pair != shown:
                shown = result.pair
                values = result.values
                self._print(f"compared    {_name(values, 'previous_')} → {_name(values, '')}")
            for line in lines(result):
                self._print(line)
            if result.pair == last:
                for line in movers(result):
                    self._print(line)


def _name(values: Mapping[str, Any], prefix: str) -> str:
    return f"{values[f'{prefix}train_date']} {values[f'{prefix}mlflow_run_name'] or values[f'{prefix}mlflow_run_id']}"


def lines(result: Result) -> list[str]:
    """Returns a tower's numbers and its verdict."""
    values = result.values
    name = result.measure
    figures = [f"{values['ids_common']:,} of {values['ids_common'] + values['ids_removed']:,} common"]
    if values["ids_added"]:
        figures[0] += f", {values['ids_added']:,} added"
    if result.p99 is not None:
        usual = result.usual
        band = f" (usual {usual.low:.2f} to {usual.high:.2f})" if usual.low is not None else ""
        figures.append(
            f"{name.replace('_', ' ')} median {values[f'{name}_p50']:.2f}, 99th percentile {result.p99:.2f}{band}"
        )
    first = f"{values['tower'] + 's':<11} {'; '.join(figures)}"
    more = []
    if values["distance_p50"] is not None and name != "distance":
        more.append(f"distance median {values['distance_p50']:.2f} (unrelated {values['distance_unrelated']:.2f})")
    for kept, words in (("neighbours", "neighbours"), ("recommendations", "recommendations")):
        share = values[f"{kept}_kept"]
        # The line of the users has their recommendations.
        if share is not None and (kept == "neighbours" or values["neighbours_kept"] is None):
            error = values[f"{kept}_kept_error"]
            more.append(
                f"{share:.0%}{f' ± {error:.1%}' if error else ''} of {values[f'{kept}_k']} {words} kept "
                f"({values[f'{kept}_queries']:,} asked)"
            )
    result_lines = [first]
    if more:
        result_lines.append(f"{'':<11} {'; '.join(more)}")
    if values["note"]:
        result_lines.append(f"{'':<11} {values['note']}")
    result_lines.append(f"{'':<11} {result.verdict}")
    return result_lines


def movers(result: Result) -> list[str]:
    """Returns the ids that moved farthest, with their own usual value and their neighbours before and after."""
    found = []
    for mover in result.values["most_moved"][:SHOWN_MOVERS]:
        usual = result.of_movers.get(mover["id"])
        beside = f" (its own usual {usual[0]:.2f}, {usual[1]} pairs)" if usual else ""
        label = f" {mover['label']}" if mover["label"] else ""
        found.append(f"  {mover[result.measure]:.2f}  {mover['id']}{label}{beside}")
        for when in ("before", "after"):
            names = ", ".join(near["label"] or near["id"] for near in mover[f"nearest_{when}"])
            if names:
                found.append(f"        {when:<6}  {names}")
    return found
