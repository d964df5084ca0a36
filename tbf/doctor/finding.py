"""What a check of `tbf doctor` says: green works, yellow works less well than it could, red stops or spoils a run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

GREEN, YELLOW, RED = "green", "yellow", "red"
_COLOURS = {GREEN: "\033[32m", YELLOW: "\033[33m", RED: "\033[31m"}


@dataclass(frozen=True)
class Finding:
    """One answer: `seen` is what is there, `cure` what to do about it, `detail` lines that don't fit."""

    name: str
    status: str
    seen: str
    cure: str = ""
    detail: str = ""

    def text(self, colour: bool = False) -> str:
        """A line for people, the cure and the detail below it."""
        status = f"{self.status:7}"
        if colour:
            status = f"{_COLOURS[self.status]}{status}\033[0m"
        lines = [f"{status}{self.name:15}{self.seen}"]
        if self.cure:
            lines.append(f"{'':22}-> {self.cure}")
        lines += [f"{'':22}{line}" for line in self.detail.splitlines()]
        return "\n".join(lines)


def green(name: str, seen: str, detail: str = "") -> Finding:
    return Finding(name, GREEN, seen, detail=detail)


def yellow(name: str, seen: str, cure: str, detail: str = "") -> Finding:
    return Finding(name, YELLOW, seen, cure, detail)


def red(name: str, seen: str, cure: str, detail: str = "") -> Finding:
    return Finding(name, RED, seen, cure, detail)


def count(findings: Iterable[Finding]) -> dict[str, int]:
    """How many there are of each status."""
    statuses = [finding.status for finding in findings]
    return {status: statuses.count(status) for status in (RED, YELLOW, GREEN)}


def to_dict(findings: Iterable[Finding]) -> dict[str, Any]:
    """All findings as JSON types."""
    findings = list(findings)
    return {"count": count(findings), "findings": [asdict(finding) for finding in findings]}
