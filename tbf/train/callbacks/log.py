"""train.log: everything that tbf's loggers say, with times; warnings also on stderr."""

from __future__ import annotations

import logging
import socket
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tbf.train.callbacks.base import Callback, StepMetrics
from tbf.train.callbacks.text import eval_line, step_line

_ROOT = logging.getLogger("tbf")
logger = logging.getLogger(__name__)


class _LogFile(Callback):
    """Appends what the loggers say to a file, and shows warnings, between `_open` and `_close`."""

    monitor = True

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handlers: list[logging.Handler] = []
        self._level = logging.NOTSET

    def _open(self, to_person: logging.Handler | None, speaker: str = "") -> None:
        """`to_person` gets the warnings, in the name of `speaker`."""
        to_file = _ToFile(self.path, encoding="utf-8")
        to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self._handlers.append(to_file)
        if to_person is not None:
            to_person.setLevel(logging.WARNING)
            to_person.setFormatter(logging.Formatter(f"%(levelname)s{speaker}: %(message)s"))
            self._handlers.append(to_person)
        for handler in self._handlers:
            _ROOT.addHandler(handler)
        self._level = _ROOT.level
        _ROOT.setLevel(logging.INFO)

    def _close(self) -> None:
        for handler in self._handlers:
            _ROOT.removeHandler(handler)
            handler.close()
        self._handlers.clear()
        _ROOT.setLevel(self._level)


class TrainLog(_LogFile):
    """Appends to a log file from the start to the end of training."""

    def __init__(self, path: Path, log_every: int) -> None:
        super().__init__(path)
        self.log_every = log_every

    def on_start(self, trainer: Any) -> None:
        heard = any(type(handler) is logging.StreamHandler for handler in _ROOT.handlers)
        self._open(None if heard else _AboveTheBar())
        logger.info("start at step %d of %d on %d rank(s)", trainer.step, trainer.max_steps, trainer.world_size)

    def on_step(self, trainer: Any, metrics: StepMetrics) -> None:
        if metrics.step % self.log_every == 0 or metrics.step in (1, trainer.max_steps):
            logger.info(step_line(metrics, trainer.max_steps))

    def on_eval(self, trainer: Any, step: int, metrics: dict[str, float]) -> None:
        logger.info(eval_line(step, metrics))

    def on_end(self, trainer: Any, status: str) -> None:
        logger.info("%s at step %d", status, trainer.step)
        self._close()


class RankLog(_LogFile):
    """What the loggers of a rank other than 0 say, in a file of its own beside the run's; warnings also on stderr."""

    def on_start(self, trainer: Any) -> None:
        self.path.parent.mkdir(exist_ok=True)
        self._open(logging.StreamHandler(), f" (rank {trainer.rank})")
        logger.info("rank %d on %s starts at step %d", trainer.rank, socket.gethostname(), trainer.step)

    def on_end(self, trainer: Any, status: str) -> None:
        logger.info("%s at step %d%s", status, trainer.step, f": {trainer.reason}" if trainer.reason else "")
        self._close()


class _ToFile(logging.FileHandler):
    """Says once that it cannot write, in one line, where the standard one prints a traceback for each line lost."""

    told = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not self.told:
            self.told = True
            print(f"warning: cannot write {self.baseFilename}: {sys.exc_info()[1]}", file=sys.stderr)


class _AboveTheBar(logging.Handler):
    """Prints to stderr without tearing a progress bar apart."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)
