"""Measured error of every operation and layer against independent implementations: `python benchmarks/parity.py`.

Runs tests/parity and prints what they measured. Rows whose oracle isn't installed are listed as skipped.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("DS_ACCELERATOR", "cpu")
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402

COLUMNS = ("row", "what", "against", "tolerance", "error")


class Collector:
    """A pytest plugin that keeps what the tests recorded."""

    def __init__(self) -> None:
        self.rows: list[dict[str, object]] = []
        self.skipped: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped:
            self.skipped.append(f"{report.nodeid}: {report.longrepr[2] if report.longrepr else ''}")
        elif report.when == "call" and report.user_properties:
            self.rows.append({**dict(report.user_properties), "passed": report.passed})


def worst_per_line(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """Tests that measure the same thing with other chunk sizes or directions make one line, with the largest error."""
    lines: dict[tuple[object, ...], dict[str, object]] = {}
    for row in rows:
        key = tuple(row[column] for column in COLUMNS[:4])
        if key not in lines or row["error"] > lines[key]["error"]:
            lines[key] = {**row, "passed": row["passed"] and lines.get(key, row)["passed"]}
    return sorted(lines.values(), key=lambda line: line["row"])


def main() -> int:
    collector = Collector()
    status = pytest.main(
        [str(ROOT / "tests" / "parity"), "-q", "--no-header", "-p", "no:cacheprovider"], plugins=[collector]
    )
    lines = worst_per_line(collector.rows)
    widths = [max([len(str(line[c])) for line in lines] + [len(c)]) for c in COLUMNS[:3]]
    print("  ".join(c.ljust(w) for c, w in zip(COLUMNS, widths)), " tolerance     error")
    for line in lines:
        text = "  ".join(str(line[c]).ljust(w) for c, w in zip(COLUMNS, widths))
        print(text, f"{line['tolerance']:10.1e}{line['error']:10.2e}", "" if line["passed"] else "  FAILED")
    for reason in collector.skipped:
        print("skipped:", reason)
    machine = {"platform": platform.platform(), "torch": torch.__version__, "python": platform.python_version()}
    figures = {f"{line['row']}: {line['what']} vs {line['against']}": line["error"] for line in lines}
    print(json.dumps({"benchmark": "parity", "machine": machine, "rows": lines, "figures": figures}))
    return int(status)


if __name__ == "__main__":
    raise SystemExit(main())
