"""The command line: `beam-pipeline`, or `python -m beam_pipeline`; a subcommand, or the main job without one."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from beam_pipeline.command import run_process

_COMMANDS = {
    "compare": "beam_pipeline.compare",
    "emulators": "beam_pipeline.emulators",
    "report": "beam_pipeline.report",
    "rollback": "beam_pipeline.rollback",
    "search": "beam_pipeline.search",
    "tag": "beam_pipeline.tag",
}
"""Subcommand → its module, which is also run by `python -m`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else [*argv]
    if arguments and arguments[0] in _COMMANDS:
        return int(importlib.import_module(_COMMANDS[arguments[0]]).main(arguments[1:]))

    from beam_pipeline.launch.options import parse

    config = parse(arguments)
    from beam_pipeline.launch.launcher import launch  # Takes seconds: --help and misspelt flags are answered before.

    return launch(config)


def console_script() -> NoReturn:
    """Runs the command line as a process of its own."""
    run_process(main)


if __name__ == "__main__":
    console_script()
