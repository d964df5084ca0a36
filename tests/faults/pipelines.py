"""kill -9 in what is not training: exports, the preparation of data, tokenizers."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from pathlib import Path

from tests.faults import disk
from tests.faults.processes import Board, Child
from tests.faults.tally import Tally

Work = Callable[[Path], object]
Contents = Callable[[Path], dict[str, bytes]]


def kill_work(
    folder: Path,
    fault: str,
    expected: str,
    work: Work,
    contents: Contents,
    *,
    twice: bool = False,
    may_find: Callable[[Path], str] | None = None,
    times: int | None = None,
    draw: random.Random,
) -> Tally:
    """Kills `work(place)` at every change it makes (or at `times` of them), then does it again.

    The same contents must come out as without a kill. `twice` does the work once before each kill; `may_find` returns
    what is wrong with what the kill left, or "".
    """

    def done_before(place: Path) -> None:
        assert not twice or _child(work, place, lambda: None).wait() == 0

    tally = Tally(fault, expected)
    board, counted = Board(), folder / "counted" / "out"
    counted.parent.mkdir(parents=True)
    done_before(counted)
    watched = lambda: disk.watch(counted.parent, lambda count: board.set(changes=count + 1))  # noqa: E731
    assert _child(work, counted, watched).wait() == 0
    reference = contents(counted)
    numbers = range(board.changes)
    for number in numbers if times is None else sorted(draw.sample(numbers, min(times, len(numbers)))):
        place = folder / f"kill-{number}" / "out"
        place.parent.mkdir()
        done_before(place)
        act = disk.die_at(number)
        child = _child(work, place, lambda place=place, act=act: disk.watch(place.parent, act))
        if child.wait() != -signal.SIGKILL:
            tally.record(f"change {number} was not reached: {child.text()[-300:]}")
            continue
        wrong = may_find(place) if may_find else ""
        again = _child(work, place, lambda: None)
        if again.wait() != 0:
            tally.record(wrong or f"the second try failed: {again.text()[-300:]}")
            continue
        same = contents(place) == reference
        problem = (
            "" if same else f"other contents after a kill at change {number}: {_strange(contents(place), reference)}"
        )
        tally.record(wrong or problem, corrupt=not same)
    return tally


def _child(work: Work, place: Path, before: Callable[[], object]) -> Child:
    def main() -> int:
        from tbf.errors import run_program

        def attempt() -> None:
            before()
            work(place)

        return run_program(attempt)

    return Child(main, place.with_suffix(".log"))


def _strange(ours: dict[str, bytes], theirs: dict[str, bytes]) -> list[str]:
    return [name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)]


def files_below(folder: Path) -> dict[str, bytes]:
    """Every file's content by its path, but for locks."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith(".lock")
    }


def kill_exports(folder: Path, run_dir: Path, draw: random.Random, times: int | None) -> Tally:
    from tbf.export.plain import EXPORT_NAME, export_run, load_pretrained

    def export(place: Path) -> None:
        export_run(run_dir, place, verify=False, force=True)

    def contents(place: Path) -> dict[str, bytes]:
        kept = {name: data for name, data in files_below(place.parent).items() if name.startswith((".", "out/"))}
        return {name: data for name, data in kept.items() if not name.endswith(EXPORT_NAME)}  # it names the time

    def old_or_new(place: Path) -> str:
        child = _child(load_pretrained, place, lambda: None)
        return f"the export that was there is gone: {child.text()}" if child.wait() else ""

    return kill_work(
        folder, "kill -9 at every change of an export", "the old export or the new one is there; the next try succeeds",
        export, contents, twice=True, may_find=old_or_new, times=times, draw=draw,
    )  # fmt: skip


def kill_preparation(folder: Path, run_dir: Path, draw: random.Random, times: int | None) -> Tally:
    from tbf.data.cleaning import CleanOptions
    from tbf.data.plan import PrepareOptions
    from tbf.data.sharding import prepare
    from tbf.data.tokenizer import SpanishSPMTokenizer

    tokenizer = SpanishSPMTokenizer.from_pretrained(run_dir / "tokenizer")  # trained elsewhere: training starts threads
    options = PrepareOptions(clean=CleanOptions(min_chars=1), shard_bytes=100_000, progress=False)
    return kill_work(
        folder, "kill -9 at every change of data preparation", "the next try makes what is missing, the same bytes",
        lambda place: prepare("sample", tokenizer, place, options), files_below, times=times, draw=draw,
    )  # fmt: skip


def kill_tokenizer(folder: Path, draw: random.Random, moments: int) -> Tally:
    """At every change, and at random moments of the computation before them."""
    from tbf.data.plan import PrepareOptions
    from tbf.data.prepare import _tokenizer_in, parse_sources

    def train(place: Path) -> None:
        _tokenizer_in(place, parse_sources("sample"), 600, PrepareOptions(progress=False))

    tally = kill_work(
        folder, "kill -9 while a tokenizer is trained", "the next try trains the same one", train, files_below,
        draw=draw,
    )  # fmt: skip
    reference = files_below(folder / "counted" / "out")
    for number in range(moments):
        place = folder / f"moment-{number}" / "out"
        place.parent.mkdir()
        child = _child(train, place, lambda: None)
        child.wait(draw.uniform(0.0, 0.5))
        child.end()
        again = _child(train, place, lambda: None)
        same = again.wait() == 0 and files_below(place) == reference
        tally.record("" if same else f"another tokenizer: {again.text()[-300:]}", corrupt=not same)
    return tally
