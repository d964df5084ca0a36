"""The page in a real browser: every chart shows its curves, and nothing is fetched."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tbf.report.charts import charts_of
from tbf.report.history import read_history
from tbf.report.page import render
from tests.report.made_up import write_results, write_run

image = pytest.importorskip("matplotlib.image")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed (Debian: apt install chromium)")

WIDTH, HEIGHT = 1240, 2600
MEASURE = """<script>document.body.insertAdjacentHTML("beforeend", "<pre id=boxes>" + JSON.stringify(
[...document.querySelectorAll("figure svg")].map(s => { const b = s.getBoundingClientRect();
return [b.x, b.y, b.width, b.height].map(Math.round); })) + "</pre>")</script>"""


def browse(folder: Path, page: Path, *options: str) -> str:
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-device-scale-factor=1",
        "--disable-background-networking", f"--user-data-dir={folder / 'profile'}", f"--window-size={WIDTH},{HEIGHT}",
    ]  # fmt: skip
    done = subprocess.run([*command, *options, page.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_chart_shows_its_curves(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", experts=4)
    write_results(run / "export")
    history = read_history(run)
    html = render(history, [])
    page, measured = tmp_path / "page.html", tmp_path / "measured.html"
    page.write_text(html, encoding="utf-8")
    without_policy = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html)  # it forbids the script
    measured.write_text(without_policy.replace("</body>", f"{MEASURE}</body>"), encoding="utf-8")
    browse(tmp_path, page, f"--screenshot={tmp_path / 'page.png'}")
    dom = browse(tmp_path, measured, "--dump-dom")
    boxes = json.loads(re.search(r'<pre id="boxes">(.*?)</pre>', dom)[1])
    pixels = np.round(image.imread(tmp_path / "page.png")[..., :3] * 255).astype(int)  # [height, width, 3]
    charts = charts_of(history)
    assert len(boxes) == len(charts) >= 8
    for chart, (x, y, width, height) in zip(charts, boxes):
        part = pixels[y : y + height, x : x + width]
        assert width > 300 and height > 150
        for line in chart.lines:
            color = [int(line.color[i : i + 2], 16) for i in (1, 3, 5)]
            drawn = (np.abs(part - color) < 40).all(-1)
            across = np.flatnonzero(drawn.any(0))
            assert drawn.sum() > 100, f"{chart.title}: {line.label} is not drawn"
            assert across[-1] - across[0] > 0.5 * width, f"{chart.title}: {line.label} does not cross the chart"
        dark = (part < 110).all(-1)  # axis labels
        assert dark.sum() > 100
