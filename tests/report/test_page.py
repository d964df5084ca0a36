from __future__ import annotations

import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from tbf import cli
from tbf.errors import CheckpointError, ConfigError
from tbf.report.charts import charts_of, draw, smooth
from tbf.report.history import read_history
from tbf.report.page import render, short
from tests.export.tiny_runs import tiny_tokenizer, write_export
from tests.report.made_up import STEPS, write_results, write_run

pytest.importorskip("matplotlib")


class Balanced(HTMLParser):
    """Raises on a tag that is closed out of order; keeps what would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in ("meta", "br"):
            self.open.pop()


def test_a_step_that_was_taken_twice_counts_once(tmp_path: Path) -> None:
    history = read_history(write_run(tmp_path / "run"))
    steps, losses = history.curve("loss")
    assert steps.tolist() == list(range(1, STEPS + 1))
    assert losses.max() < 9
    assert history.curve("val_loss")[0].tolist() == [50, 100, 150, 200]
    assert len(history.curve("mfu")[0]) == 0
    assert history.last("skipped") == 2


def test_charts_are_those_with_numbers(tmp_path: Path) -> None:
    plain = {chart.title for chart in charts_of(read_history(write_run(tmp_path / "plain")))}
    moe = {chart.title for chart in charts_of(read_history(write_run(tmp_path / "moe", experts=4)))}
    assert {"Loss", "Learning rate", "Gradient norm", "Throughput", "Memory"} <= plain
    assert moe - plain == {"Router load", "Router entropy"}


def test_smoothing_ignores_a_spike() -> None:
    values = np.ones(50)
    values[20] = 1000
    assert smooth(values, 5).tolist() == [1.0] * 50
    assert smooth(np.arange(10.0), 4).shape == (10,)


def test_the_page_says_what_is_known_and_fetches_nothing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run <1>")
    write_results(run / "export")
    page = render(read_history(run), [])
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert all(link.startswith("#") for link in parser.links)
    assert "<script" not in page and "@import" not in page and not re.search(r"url\((?!#)", page)
    for part in (
        "run &lt;1&gt;", "&lt;made&gt; &amp; up", "done", "2.524", "steps of 200", "410k", "Tesla P40", "2 starts",
        "pos&lt;b&gt;", "0.877 ± 0.012", "4.568", "32.1%", "text-novel", "steps skipped by the guard",
    ):  # fmt: skip
        assert part in page
    assert page.count("<figure>") == page.count("<svg") == len(charts_of(read_history(run)))


def test_the_same_run_gives_the_same_charts(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert [svg for _, svg in draw(read_history(run))] == [svg for _, svg in draw(read_history(run))]


def test_a_run_of_one_step(tmp_path: Path) -> None:
    page = render(read_history(write_run(tmp_path / "run", steps=1)), [])
    assert "training loss" in page


def test_the_verb_fills_masks_of_the_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    shutil.copytree(write_export(tmp_path / "export", tiny_tokenizer(), num_layers=1), run / "export")
    texts = ["--sample", "El [MASK] & el [MASK].", "--sample", "Hola, [MASK]."]
    assert cli.main(["report", str(run), *texts]) == 0
    page = (run / "report.html").read_text(encoding="utf-8")
    assert page.count('class="guess"') == 15
    assert "El [MASK] &amp; el [MASK]. (mask 2)" in page
    assert "report.html" in capsys.readouterr().out
    assert cli.main(["report", str(run), "--no-samples"]) == 0
    assert 'class="guess"' not in (run / "report.html").read_text(encoding="utf-8")
    assert not list(run.glob(".*partial*"))


def test_what_is_no_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="is no run folder"):
        read_history(tmp_path)
    run = write_run(tmp_path / "run", steps=1)
    (run / "metrics.csv").write_text("step,loss\n")
    with pytest.raises(CheckpointError, match="has no rows yet"):
        read_history(run)
    run = write_run(tmp_path / "other")
    (run / "config.yaml").write_text("model: 3")
    assert cli.main(["report", str(run)]) == 4
    out = tmp_path / "precious.html"
    out.write_text("precious")
    assert cli.main(["report", str(write_run(tmp_path / "good")), "--out", str(out)]) == 2
    assert out.read_text() == "precious"
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install 'tbf\[report\]'"):
        list(draw(read_history(tmp_path / "good")))


@pytest.mark.parametrize(("number", "text"), [(0.5, "0.5"), (1234.0, "1.23k"), (2.5e9, "2.5G"), (999_000, "999k")])
def test_short_numbers(number: float, text: str) -> None:
    assert short(number) == text
