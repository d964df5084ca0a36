"""How the ranks of a job find each other, and see that they fit together, before the first collective.

Each rank leaves a note in the store of rank 0: where it is, its versions and settings, and what is wrong with it. All
read all notes, so one rank's failure ends every rank with the same line instead of leaving the others to wait.
"""

from __future__ import annotations

import datetime
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from tbf import errors
from tbf.errors import ConfigError, EngineError, TbfError, first_line
from tbf.train.environment import ProcessInfo
from tbf.train.launcher_watch import planned_hosts

JOIN_TIMEOUT_S = 600.0
"""That the slowest machine may take to compile its operators; TBF_JOIN_TIMEOUT overrides it."""
PATIENCE_S = 20.0
"""After which a rank that waits for others says so."""
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
    world_size: int = 1


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
    same = json.loads(json.dumps(facts, default=str))
    note = Note(process.rank, facts=same, problem=stated, world_size=process.world_size)
    try:
        if store.add(f"here{process.rank}", 1) > 1 and not _agent_store():
            raise EngineError(
                f"there is a rank {process.rank} at {address}:{port} already: an earlier run (`ss -ltnp` on {address} "
                f"names it; end it, or start with --master_port {port + 1}), or a machine with the same --node_rank"
            )
        store.set(f"note{process.rank}", json.dumps(vars(note)))
        notes = _notes(store, process, limit, f"{address}:{port}")
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
    serves = process.rank == 0 and not _agent_store()
    started = time.monotonic()
    while True:
        left = limit - (time.monotonic() - started)
        try:
            store = connect(address, port, serves, max(1.0, min(left, PATIENCE_S)))
            store.set_timeout(datetime.timedelta(seconds=limit))
            break
        except (RuntimeError, ValueError, TimeoutError) as error:
            why = first_line(error)[:200]
        if serves:
            raise EngineError(
                f"rank 0 cannot listen on port {port} ({why}); `ss -ltnp` names who does, perhaps an earlier "
                f"run: end it, or start with --master_port {port + 1}"
            )
        here = f"rank {process.rank} on {socket.gethostname()}"
        waited = time.monotonic() - started
        if waited >= limit:
            raise EngineError(
                f"{here} cannot reach rank 0 at {address}:{port} within {limit:.0f} s ({why}); look at rank 0's "
                f"output, then at the firewall and at what {address} resolves to here"
            )
        if waited < 2 * PATIENCE_S:
            _say(f"{here} has not reached rank 0 at {address}:{port} after {waited:.0f} s, and tries for {limit:.0f} s")
    return dist.PrefixStore(f"tbf{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def connect(address: str, port: int, serves: bool, seconds: float) -> dist.Store:
    """A store that this process serves or is a client of. Raises RuntimeError, ValueError or TimeoutError.

    In a thread, since a client waits without end for the answer of a program that is no store.
    """
    found: list[Any] = []

    def attempt() -> None:
        wait = datetime.timedelta(seconds=seconds)
        try:
            found.append(dist.TCPStore(address, port, is_master=serves, timeout=wait, wait_for_workers=False))
        except (RuntimeError, ValueError) as error:
            found.append(error)

    thread = threading.Thread(target=attempt, name="tbf-connect", daemon=True)
    thread.start()
    thread.join(seconds + 2.0)
    if not found:
        raise TimeoutError("what listens there does not answer as a store of torch does")
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def _agent_store() -> bool:
    """Whether torchrun's own process holds the store, through all the starts of its ranks."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _notes(store: dist.Store, process: ProcessInfo, limit: float, where: str) -> list[Note]:
    """The notes of all ranks; those of a few as soon as these show that the ranks count themselves differently."""
    started, said, found = time.monotonic(), False, {}
    while True:
        for rank in range(process.world_size):
            if rank not in found and store.check([f"note{rank}"]):
                found[rank] = Note(**json.loads(store.get(f"note{rank}")))
        notes = [found[rank] for rank in sorted(found)]
        if len(found) == process.world_size or any(note.world_size != process.world_size for note in notes):
            return notes
        waited = time.monotonic() - started
        if waited > limit:
            here = _few([f"{note.rank} on {note.host}" for note in notes])
            raise EngineError(
                f"only {len(found)} of {process.world_size} ranks joined at {where} within {limit:.0f} s: no sign of "
                f"rank {_missing(process, found)}; here are {here}. Look at the missing ones' output; if there is "
                "none, at their machines, the firewall and the network interface"
            )
        if process.rank == 0 and not said and waited > PATIENCE_S:
            said = True
            _say(
                f"no sign yet of rank {_missing(process, found)} after {waited:.0f} s; given up after {limit:.0f} s. "
                "Look at what their machines print, and at `tbf doctor --hostfile`"
            )
        time.sleep(0.1)


def _missing(process: ProcessInfo, found: Collection[int]) -> str:
    """Ranks, with their machines where the launcher names them and whether these names mean anything."""
    hosts, parts = planned_hosts(), []
    for rank in range(process.world_size):
        if rank not in found:
            host = hosts[rank] if len(hosts) == process.world_size else ""
            unknown = "" if _resolves(host) else ", a name that does not resolve here"
            parts.append(f"{rank} ({host}{unknown})" if host else str(rank))
    return _few(parts)


def _resolves(host: str) -> bool:
    try:
        socket.getaddrinfo(host.rpartition("@")[2], None)
    except OSError:
        return False
    return True


def _say(text: str) -> None:
    print(f"waiting: {text}", file=sys.stderr, flush=True)


def _verdict(notes: list[Note]) -> TbfError | None:
    for note in notes:
        if note.problem is not None:
            name, text = note.problem
            kind = getattr(errors, name, EngineError)
            return _shared(kind(f"{text} (on rank {note.rank}, {note.host})"))
    first = notes[0]
    for note in notes[1:]:
        if note.world_size != first.world_size:
            return _shared(
                ConfigError(
                    f"rank {note.rank} on {note.host} counts {note.world_size} ranks, rank {first.rank} on "
                    f"{first.host} {first.world_size}; start every machine with the same hostfile and slots"
                )
            )
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
