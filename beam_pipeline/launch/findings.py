"""What was found before a job starts: the lines of a report, and whether one of them stops the job."""

from __future__ import annotations

from dataclasses import dataclass, field

from beam_pipeline.errors import PipelineError


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        check: what was looked at.
        status: "ok"; "note" for what a person should know; "stop" for what keeps the job from starting.
        text: what was found.
        error: for "stop": what the launcher raises.
    """

    check: str
    status: str
    text: str
    error: PipelineError | None = None


@dataclass
class Findings:
    """The report as it grows."""

    lines: list[Finding] = field(default_factory=list)

    def ok(self, check: str, text: str) -> None:
        """Adds a check that found nothing wrong."""
        self.lines.append(Finding(check, "ok", text))

    def note(self, check: str, text: str) -> None:
        """Adds what a person should know."""
        self.lines.append(Finding(check, "note", text))

    def stop(self, check: str, error: PipelineError) -> None:
        """Adds what keeps the job from starting."""
        self.lines.append(Finding(check, "stop", str(error), error))

    @property
    def error(self) -> PipelineError | None:
        """The first of what keeps the job from starting."""
        return next((line.error for line in self.lines if line.error), None)


def first_line(error: Exception) -> str:
    """Returns the first line of what an error says, or its name if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
