"""Writes docs/options.md, all flags of all commands, from their parsers: `python docs/write_options.py`."""

from __future__ import annotations

import argparse
from pathlib import Path

from beam_pipeline import rollback
from beam_pipeline.comparison import command as comparison
from beam_pipeline.launch import options
from beam_pipeline.retrieval import command as search

PAGE = Path(__file__).with_name("options.md")

_HEAD = """\
# Options

<!-- Written by docs/write_options.py from the parsers; not edited by hand. -->

For whoever starts a job or a search: every flag. For the two pipelines all options of Apache Beam work too, such as
`--region`, `--temp_location`, `--job_name` and `--setup_file`; an unknown flag is an error (exit 2). A switch may
have a value, as in `--include_oov=true`. Most flags are also parameters of the [Flex Templates](dataflow.md).
"""


def page() -> str:
    """Returns the page."""
    commands = {
        "python -m beam_pipeline": options.parser(),
        "python -m beam_pipeline.compare": comparison.parser(),
        "python -m beam_pipeline.search": search.parser(),
        "python -m beam_pipeline.rollback": rollback.parser(),
    }
    return _HEAD + "".join(f"\n## `{name}`\n{_groups(parser)}" for name, parser in commands.items())


def _groups(parser: argparse.ArgumentParser) -> str:
    _, ungrouped, *groups = parser._action_groups  # argparse has no public way to ask for them; the first is positional
    ungrouped.title = "other"
    tables = []
    for group in [*groups, ungrouped]:
        shown = [
            action for action in group._group_actions if action.help != argparse.SUPPRESS and action.dest != "help"
        ]
        title = group.title or ""
        rows = "".join(_row(parser, action) for action in shown)
        tables.append(f"\n### {title[:1].upper()}{title[1:]}\n\n| flag | meaning |\n|---|---|\n{rows}")
    return "".join(tables)


def _row(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    value = "|".join(map(str, action.choices)) if action.choices else action.metavar or action.dest.upper()
    suffix = "" if action.nargs == 0 else f"[={value}]" if action.nargs == "?" else f"={value}"
    meaning = parser._get_formatter()._expand_help(action)  # with defaults filled in, as --help prints it
    cells = (f"`{action.option_strings[-1]}{suffix}`", meaning)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
