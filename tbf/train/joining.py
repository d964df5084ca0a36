"""How the ranks of a job find each other, and see that they fit together, before the first collective.

Each rank leaves a note in the store of rank 0: where it is, its versions and settings, and what is wrong with it. All
read all notes, so one rank's failure ends every rank with the same line instead of leaving the others to wait.
"""

from __future__ import annotations

import datetime
import json
import os
import socket
import time
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from tbf import errors
from tbf.errors import ConfigError, EngineError, TbfError, first_line
from tbf.train.environment import ProcessInfo

JOIN_TIMEOUT_S = 600.0
"""That the slowest machine may take to compile its operators; TBF_JOIN_TIMEOUT overrides it."""
_CURE = {
    "versions": "install the same versions on every machine (make setup)",
    "settings": "start every rank with the same preset, ds_config and options",
}


@dataclass(frozen=True)
class Note:
    """What a rank tells the others. `facts`: groups of values that must be equal everywhere, by a key of _CURE."""

    rank: int
    host: str = field(default_factory=socket.gethostname)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    problem: tuple[str, str] | None = None
    """Class and text of the TbfError that stops this rank."""


def join(process: ProcessInfo, facts: dict[str, dict[str, Any]], problem: TbfError | None) -> dist.Store:
    """Returns the store through which the process group starts, once all ranks are there and agree.

    Raises the first rank's problem on every rank, ConfigError when ranks differ, EngineError when some never came.
    """
    if process.world_size == 1:  # needs no port, which another run of this machine may have
        if problem is not None:
            raise problem
        return dist.HashStore()
    limit = float(os.environ.get("TBF_JOIN_TIMEOUT", JOIN_TIMEOUT_S))
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = _open(process, address, port, limit)
    stated = None if problem is None else (type(problem).__name__, str(problem))
    note = Note(process.rank, facts=json.loads(json.dumps(facts, default=str)), problem=stated)
    try:
        store.set(f"note{process.rank}", json.dumps(vars(note)))
        notes = _notes(store, process.world_size, limit, f"{address}:{port}")
        verdict = _verdict(notes)
        if verdict is not None:
            _leave_together(store, process)
            raise verdict
    except RuntimeError as error:  # of the store
        why = first_line(error)[:200]
        raise EngineError(
            f"rank {process.rank} lost {address}:{port} while the ranks were joining ({why}); rank 0's own "
            "output says why"
        ) from None
    return store


def _open(process: ProcessInfo, address: str, port: int, limit: float) -> dist.Store:
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's own process holds the store
    serves = process.rank == 0 and not agent
    timeout = datetime.timedelta(seconds=limit)
    try:
        store = dist.TCPStore(address, port, is_master=serves, timeout=timeout, wait_for_workers=False)
    except (RuntimeError, ValueError) as error:
        why = first_line(error)[:200]
        if serves:
            raise EngineError(
                f"rank 0 cannot listen on port {port} ({why}); `ss -ltnp` names who does, perhaps an earlier "
                f"run: end it, or start with --master_port {port + 1}"
            ) from None
        raise EngineError(
            f"rank {process.rank} on {socket.gethostname()} cannot reach rank 0 at {address}:{port} within "
            f"{limit:.0f} s ({why}); look at rank 0's output, then at the firewall and at what {address} "
            "resolves to here"
        ) from None
    return dist.PrefixStore(f"tbf{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _notes(store: dist.Store, world_size: int, limit: float, where: str) -> list[Note]:
    deadline = time.monotonic() + limit
    while missing := [rank for rank in range(world_size) if not store.check([f"note{rank}"])]:
        if time.monotonic() > deadline:
            here = [Note(**json.loads(store.get(f"note{rank}"))) for rank in range(world_size) if rank not in missing]
            raise EngineError(
                f"only {len(here)} of {world_size} ranks joined at {where} within {limit:.0f} s: no sign of rank "
                f"{_few(missing)}; here are {_few([f'{note.rank} on {note.host}' for note in here])}. Look at the "
                "missing ones' output; if there is none, at their machines, the firewall and the network interface"
            )
        time.sleep(0.1)
    return [Note(**json.loads(store.get(f"note{rank}"))) for rank in range(world_size)]


def _verdict(notes: list[Note]) -> TbfError | None:
    for note in notes:
        if note.problem is not None:
            name, text = note.problem
            kind = getattr(errors, name, EngineError)
            return _shared(kind(f"{text} (on rank {note.rank}, {note.host})"))
    first = notes[0]
    for note in notes[1:]:
        for group, cure in _CURE.items():
            mine, theirs = first.facts.get(group, {}), note.facts.get(group, {})
            unlike = [key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key)]
            if unlike:
                shown = ", ".join(f"{key} {theirs.get(key)} there, {mine.get(key)} here" for key in sorted(unlike)[:3])
                more = f" and {len(unlike) - 3} more" if len(unlike) > 3 else ""
                return _shared(
                    ConfigError(
                        f"rank {note.rank} on {note.host} differs from rank 0 on {first.host} in its {group}: "
                        f"{shown}{more}; {cure}"
                    )
                )
    return None


def _shared(error: TbfError) -> TbfError:
    error.on_every_rank = True
    return error


def _leave_together(store: dist.Store, process: ProcessInfo) -> None:
    """Keeps the store until all have read the verdict; a rank that dies meanwhile costs five seconds."""
    store.set(f"read{process.rank}", "")
    deadline = time.monotonic() + 5.0
    if process.rank == 0:
        while time.monotonic() < deadline and not store.check([f"read{r}" for r in range(process.world_size)]):
            time.sleep(0.05)


def _few(items: list[Any]) -> str:
    return ", ".join(map(str, items[:8])) + (f" and {len(items) - 8} more" if len(items) > 8 else "")
