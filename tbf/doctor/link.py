"""One machine's end of a short measurement between machines; prints what it found as one JSON line. Runs over ssh.

python -m tbf.doctor.link RANK MACHINES MASTER PORT
"""

from __future__ import annotations

import datetime
import ipaddress
import json
import logging
import os
import socket
import statistics
import sys
import time
from typing import Any

import psutil
import torch
import torch.distributed as dist

from tbf.errors import first_line
from tbf.train.joining import connect

WAIT_S = 60.0
"""That the slowest machine may take to load torch."""
ELEMENTS, MOST_S = 8_000_000, 3.0
"""Of the all-reduce that is timed, in FP32, and seconds after which it is not repeated."""
SHORT = 20
_WAIT = datetime.timedelta(seconds=WAIT_S)


def main() -> None:
    rank, machines, port = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[4])
    found = measure(rank, machines, sys.argv[3], port)
    print(json.dumps(found), flush=True)
    os._exit(0)  # gloo's threads may still wait for a machine that gave up


def measure(rank: int, machines: int, master: str, port: int) -> dict[str, Any]:
    """Network cards, and either speeds or the first thing that failed: `port`, `machines`, `card` or `ports`."""
    found: dict[str, Any] = {"card": own_card(), "route": card_of(source_address(master))}
    try:
        store = connect(master, port, rank == 0, WAIT_S)
    except (RuntimeError, ValueError, TimeoutError) as error:
        return {**found, "failed": "port", "why": first_line(error)}
    store.set(f"card{rank}", "unfit" if found["card"] is None else "fit")
    missing = wait(store, [f"card{other}" for other in range(machines)])
    if missing:
        return {**found, "failed": "machines", "why": ", ".join(key.removeprefix("card") for key in missing)}
    if any(store.get(f"card{other}") == b"unfit" for other in range(machines)):
        found["failed"] = "card"
    else:
        try:
            found |= speeds(store, rank, machines)
        except (RuntimeError, ValueError, OSError) as error:
            found |= {"failed": "ports", "why": first_line(error)}
    store.set(f"done{rank}", "")
    if rank == 0:
        wait(store, [f"done{other}" for other in range(machines)])
    return found


def speeds(store: dist.Store, rank: int, machines: int) -> dict[str, float]:
    """Bytes per second that pass each way, and seconds of a message."""
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=machines, timeout=_WAIT)
    values, small, hops = torch.ones(ELEMENTS), torch.ones(1), 2 * (machines - 1)
    short = [timed(small) for _ in range(SHORT + 5)][5:]
    seconds = [timed(values)]
    again = torch.tensor([float(sum(seconds) < MOST_S / 3)])
    dist.all_reduce(again, dist.ReduceOp.MIN)
    if again.item():
        seconds = [timed(values) for _ in range(3)]
    sent = 4 * ELEMENTS * hops / machines
    return {"bytes_per_s": sent / statistics.median(seconds), "latency_s": statistics.median(short) / hops}


def timed(values: torch.Tensor) -> float:
    started = time.perf_counter()
    dist.all_reduce(values)
    return time.perf_counter() - started


def wait(store: dist.Store, keys: list[str]) -> list[str]:
    """Those that did not come in time."""
    deadline = time.monotonic() + WAIT_S
    while missing := [key for key in keys if not store.check([key])]:
        if time.monotonic() > deadline:
            return missing
        time.sleep(0.05)
    return []


def own_card() -> str | None:
    """The network card that gloo takes: the one named to it, else that of the machine's own name; None: it would call
    itself."""
    if named := os.environ.get("GLOO_SOCKET_IFNAME"):
        return named
    try:
        return card_of(socket.gethostbyname(socket.gethostname()))
    except OSError:
        return None


def source_address(master: str) -> str:
    """From which address this machine speaks to another one; sends nothing."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((master, 9))
            return probe.getsockname()[0]
    except OSError:
        return ""


def card_of(address: str) -> str | None:
    """The network card with this address, None for a loopback's or nobody's."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address == address for a in addresses) and not ipaddress.ip_address(address).is_loopback:
            return name
    return None


if __name__ == "__main__":
    main()
