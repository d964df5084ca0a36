"""The errors that tbf shows to people.

Each message is one line that says what is wrong, where, the value seen and the cure. Programs print it without a
traceback and leave with `exit_code` (0 done, 130/143 stopped by a signal after a clean save).
"""

from __future__ import annotations

import difflib
import os
import sys
import traceback
from collections.abc import Callable, Iterable


class TbfError(Exception):
    """Base of everything tbf raises on purpose."""

    exit_code = 1
    on_every_rank = False
    """Whether all ranks of the job raise it, so that one of them can speak for all."""


def first_line(error: BaseException) -> str:
    """What somebody else's error says, for use inside a message; its class where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class ConfigError(TbfError):
    """Wrong usage, preset, override, ds_config or model shape."""

    exit_code = 2


class DataError(TbfError):
    """Text, tokenizer or shards that cannot be used."""

    exit_code = 3


class CheckpointError(TbfError):
    """A checkpoint, run folder or export that cannot be read or written."""

    exit_code = 4


class EngineError(TbfError):
    """DeepSpeed or the process group could not do its part."""

    exit_code = 5


class HardwareError(EngineError):
    """The machine lacks what was asked of it."""


class TrainingHalted(TbfError):
    """The guard stopped a run that was no longer learning."""

    exit_code = 6


def nearest(name: str, valid: Iterable[str]) -> str:
    """Returns a hint that names the valid key closest to `name`."""
    valid = sorted(valid)
    match = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"did you mean '{match[0]}'?" if match else f"valid: {', '.join(valid)}"


def run_program(main: Callable[[], int | None]) -> int:
    """Runs a program's `main` and turns a TbfError into one line on stderr plus its exit code.

    `TBF_TRACEBACK=1` shows the traceback too.
    """
    try:
        return main() or 0
    except TbfError as error:
        if os.environ.get("TBF_TRACEBACK") == "1":
            traceback.print_exc()
        if not error.on_every_rank or os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr, flush=True)
        return 130
    except BrokenPipeError:  # the reader of our output left, as in `tbf ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
