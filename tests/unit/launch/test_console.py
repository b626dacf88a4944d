"""What is printed: a bar and colours at a terminal, plain lines elsewhere, and names as they are."""

import io

from beam_pipeline.errors import ConfigError
from beam_pipeline.launch import console
from beam_pipeline.launch.console import Terminal
from beam_pipeline.launch.findings import Findings


class Screen(io.StringIO):
    """An output that says that it is a terminal."""

    def isatty(self):
        return True


def findings():
    found = Findings()
    found.ok("dataset", "p.d in US, " + "a long line " * 20)
    found.stop("bucket [red]", ConfigError("gs://b does not exist"))
    return found


def copied(monkeypatch, output):
    monkeypatch.setattr("sys.stdout", output)
    monkeypatch.setattr(console, "_EVERY_TERMINAL", 0.01)
    terminal = Terminal()
    terminal.findings(findings())
    done = iter([0, 5_000_000])
    with terminal.copying(3, 10_000_000, "gs://b/[bold]copy", lambda: next(done, 10_000_000)):
        pass
    return output.getvalue()


def test_a_log_has_plain_lines(monkeypatch):
    monkeypatch.setattr(console, "_EVERY_LOG", 0.01)
    lines = copied(monkeypatch, io.StringIO()).splitlines()
    assert lines[0] == "ok    dataset       p.d in US, " + "a long line " * 20
    assert lines[1] == "stop  bucket [red]  gs://b does not exist"
    assert lines[2] == "copying     3 files, 10.0 MB, to gs://b/[bold]copy"
    assert "\x1b" not in "".join(lines)


def test_a_terminal_has_colours_and_a_bar(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    text = copied(monkeypatch, Screen())
    assert "\x1b[1;31mstop\x1b[0m" in text
    assert "bucket [red]" in text
    assert len(text.split("bucket")[0].splitlines()) > 2  # The long line was wrapped beside its label.
    assert "gs://b/[bold]copy" in text
