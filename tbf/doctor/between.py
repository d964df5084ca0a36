"""Checks the network between the machines of a hostfile by using it: ports, network cards, speed and latency."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tbf.doctor.finding import Finding, green, red, yellow
from tbf.doctor.machine import Answer, Machine
from tbf.doctor.options import Options
from tbf.doctor.reach import command_on

SLOW, FAR = 1e8, 2e-3  # bytes per second and seconds: short of a gigabit's, and no longer one building
MOST_S = 240.0
_NAME_CARD = "name the card in .deepspeed_env: GLOO_SOCKET_IFNAME={card} and NCCL_SOCKET_IFNAME={card} (ip -br address)"


def network(machine: Machine, options: Options, hosts: Mapping[str, int]) -> Iterator[Finding]:
    """A short all-reduce of one process a machine, on the port where ranks would meet."""
    names = list(hosts)
    master = names[0].rpartition("@")[2]
    commands = [
        command_on(host, ["tbf.doctor.link", str(rank), str(len(names)), master, str(options.port)])
        for rank, host in enumerate(names)
    ]
    with ThreadPoolExecutor(len(commands)) as pool:
        answers = list(pool.map(lambda command: machine.run(command, MOST_S), commands))
    found = {host: _read(answer) for host, answer in zip(names, answers)}
    failed = [_failure(host, names, options.port, theirs) for host, theirs in found.items() if "failed" in theirs]
    yield failed[0] if failed else _speed(found, options.port)


def _read(answer: Answer) -> dict[str, Any]:
    last = (answer.output.strip().splitlines() or ["no answer"])[-1]
    try:
        found = json.loads(last)
        return found if {"card", "route"} <= found.keys() else {"failed": "", "why": last}
    except (ValueError, AttributeError):
        return {"failed": "", "why": last}


def _failure(host: str, names: list[str], port: int, found: Mapping[str, Any]) -> Finding:
    master, why, route = names[0], found.get("why", ""), found.get("route") or "eth0"
    if found["failed"] == "port":
        if host == master:
            cure = f"`ss -ltnp` names who does: end it, or take another port (--port {port + 1})"
            return red("network", f"{host} cannot listen on port {port} ({why})", cure)
        cure = f"open it to the others in {master}'s firewall, and look at what {master} resolves to on {host}"
        return red("network", f"{host} cannot reach port {port} of {master} ({why})", cure)
    if found["failed"] == "machines":
        missing = ", ".join(names[int(rank)] for rank in why.split(", "))
        return red(
            "network", f"nothing came from {missing} to port {port} of {master}", f"open it in {master}'s firewall"
        )
    if found["failed"] == "card":
        return red(
            "network", f"{host}'s own name means itself alone, or another machine's does", _NAME_CARD.format(card=route)
        )
    if found["failed"] == "ports":
        cure = f"open the ports above 1024 between all machines, or {_NAME_CARD.format(card=route)}"
        return red("network", f"{host} by {found['card']}: no connection to all others ({why})", cure)
    return red("network", f"{host}: {why}", "the clone must lie at the same path there, with its own `make setup`")


def _speed(found: Mapping[str, Mapping[str, Any]], port: int) -> Finding:
    speed, latency = min(f["bytes_per_s"] for f in found.values()), max(f["latency_s"] for f in found.values())
    gigabits, milliseconds = speed * 8 / 1e9, latency * 1e3
    cards = ", ".join(f"{host} by {theirs['card']}" for host, theirs in found.items())
    seen = (
        f"{cards}: {gigabits:.2f} Gbit/s each way in an all-reduce, a message takes {milliseconds:.2f} ms; port {port} "
    )
    seen += f"and those above 1024 are open (tbf plan --nodes {len(found)} --network {gigabits:.2g} "
    seen += f"--latency {milliseconds:.2g})"
    detours = [host for host, theirs in found.items() if theirs["route"] not in (theirs["card"], None)]
    if detours:
        route = found[detours[0]]["route"]
        return yellow("network", f"{seen}; the way from {detours[0]} leads over {route}", _NAME_CARD.format(card=route))
    if speed < SLOW or latency > FAR:
        return yellow("network", seen, "more micro-batches a step hide it (docs/scaling.md), under ZeRO-1")
    return green("network", seen)
