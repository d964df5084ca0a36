"""What became of each kind of fault, as a table and as figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Tally:
    """One row of the table."""

    fault: str
    expected: str
    """What surviving means here."""
    tried: int = 0
    survived: int = 0
    corrupt: int = 0
    """Resumed runs, or files, that differ from those of an undisturbed run."""
    lost: int | None = None
    """Steps to take again at most; None where the fault loses no steps."""
    seconds: float | None = None
    """Longest time from the fault to the program's saying so."""
    problems: list[str] = field(default_factory=list)
    skipped: str = ""
    """Why it was not tried."""

    def record(
        self, problem: str = "", *, corrupt: bool = False, lost: int | None = None, seconds: float | None = None
    ) -> None:
        """One fault tried; it was survived unless there is a `problem`."""
        self.tried += 1
        self.survived += not problem
        self.corrupt += corrupt
        if problem:
            self.problems.append(problem)
        if lost is not None:
            self.lost = max(lost, self.lost or 0)
        if seconds is not None:
            self.seconds = max(seconds, self.seconds or 0.0)


def table(rows: Sequence[Tally]) -> str:
    """A Markdown table, with the problems below it."""
    lines = [
        "| fault | survived means | tried | survived | steps lost, at most | seconds to detect, at most |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        if row.skipped:
            lines.append(f"| {row.fault} | not tried: {row.skipped} | 0 | 0 | | |")
            continue
        lost = "" if row.lost is None else str(row.lost)
        seconds = "" if row.seconds is None else f"{row.seconds:.1f}" if row.seconds >= 0.05 else "< 0.1"
        lines.append(f"| {row.fault} | {row.expected} | {row.tried} | {row.survived} | {lost} | {seconds} |")
    problems = [f"{row.fault}: {problem}" for row in rows for problem in row.problems[:5]]
    return "\n".join([*lines, *(["", *problems] if problems else [])])


def figures(rows: Sequence[Tally]) -> dict[str, float]:
    return {
        "tried": sum(row.tried for row in rows),
        "survived": sum(row.survived for row in rows),
        "corrupt_resumes": sum(row.corrupt for row in rows),
        "steps_lost_at_most": max((row.lost for row in rows if row.lost is not None), default=0),
        "seconds_to_detect_at_most": round(max((row.seconds for row in rows if row.seconds is not None), default=0), 2),
        **{f"survived@{row.fault.replace(' ', '_')}": row.survived for row in rows if not row.skipped},
    }
