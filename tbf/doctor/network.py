"""Checks of what joins ranks: gloo, ports, names, and the machines of a hostfile."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

from tbf.doctor.between import network
from tbf.doctor.finding import RED, Finding, green, red, yellow
from tbf.doctor.machine import Answer, Machine
from tbf.doctor.options import Options
from tbf.doctor.reach import command_on
from tbf.errors import ConfigError

MOST_SKEW = 2.0  # seconds between clocks, beyond what the connection took


def gloo(machine: Machine, options: Options) -> Iterator[Finding]:
    """Collectives on the CPU, which every run uses beside NCCL."""
    try:
        machine.gloo()
    except (RuntimeError, OSError, ValueError) as error:
        first = (str(error).splitlines() or ["no message"])[0]
        yield red("gloo", first, "set GLOO_SOCKET_IFNAME to a network interface of this machine (ip -br address)")
    else:
        yield green("gloo", "a group of one process reduces")


def port(machine: Machine, options: Options) -> Iterator[Finding]:
    """The port on which ranks meet."""
    if machine.port_taken(options.port):
        yield yellow(
            "port", f"{options.port} is taken, perhaps by an earlier run (ss -ltnp names it)",
            f"end that, or start with --master_port {options.port + 1}",
        )  # fmt: skip
    else:
        yield green("port", f"{options.port} is free")


def own_name(machine: Machine, options: Options) -> Iterator[Finding]:
    """Between machines, a name that means 127.0.0.1 makes gloo and NCCL call themselves."""
    address = machine.own_address()
    if address is None:
        yield yellow("own name", "does not resolve", "add it to /etc/hosts with this machine's network address")
    elif options.hostfile and address.startswith("127."):
        yield yellow(
            "own name", f"resolves to {address}, which other machines cannot reach",
            "give it the network address in /etc/hosts, or set NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME",
        )  # fmt: skip
    else:
        yield green("own name", f"resolves to {address if address.startswith('127.') else 'a network address'}")


def hosts(machine: Machine, options: Options) -> Iterator[Finding]:
    """Each machine of the hostfile: reachable without a password, same versions, enough cards, same time, same data.
    Where all are fit, the network between them."""
    if options.hostfile is None:
        return
    if machine.which("pdsh") is None:
        yield yellow("pdsh", "missing", "apt install pdsh, or start each machine with --no_ssh (launch/multi_node.md)")
    names, fit, data = read_hostfile(options.hostfile), True, {}
    for host, slots in names.items():
        asked = time.time()
        folder = [str(options.data)] if options.data else []
        answer = machine.run(command_on(host, ["tbf.doctor.versions", *folder]), timeout=60)
        finding = _judge(host, slots, answer, machine.versions(), asked, time.time())
        if finding.status != RED and options.data:
            data[host] = json.loads(_last(answer)).get("data", {})
        fit = fit and finding.status != RED
        yield finding
    if data:
        yield _same_data(data)
    if fit and len(names) > 1:
        yield from network(machine, options, names)


def read_hostfile(path: Path) -> dict[str, int]:
    """Slots by host. Raises ConfigError that names the line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--hostfile {path}: cannot be read ({error})") from None
    found: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        match = re.fullmatch(r"(\w[\w.:@-]*)\s+slots=(\d+)", text)
        if match and match.group(1) not in found:
            found[match.group(1)] = int(match.group(2))
        elif text:
            why = "stands there twice" if match else "is not 'NAME slots=CARDS'"
            raise ConfigError(f"--hostfile {path}, line {number}: '{text}' {why}")
    if not found:
        raise ConfigError(f"--hostfile {path}: names no machine; one line each: NAME slots=CARDS")
    return found


def _same_data(found: dict[str, dict[str, str]]) -> Finding:
    """The prepared folder of every machine beside the first one's."""
    first, mine = next(iter(found.items()))
    cure = "tbf data prepare on one machine, and copy its folder to the others (rsync -a)"
    for host, theirs in found.items():
        if "error" in theirs:
            return red("data", f"{host}: {theirs['error']}", cure)
        unlike = [name for name in mine if theirs.get(name) != mine[name]]
        if unlike:
            name = unlike[0]
            return red("data", f"{host} has another {name} ({theirs.get(name)}) than {first} ({mine[name]})", cure)
    return green("data", f"the same on {len(found)} machine(s): {', '.join(f'{k} {v}' for k, v in mine.items())}")


def _last(answer: Answer) -> str:
    return (answer.output.strip().splitlines() or ["no answer"])[-1]


def _judge(
    host: str, slots: int, answer: Answer, mine: dict[str, str | None], asked: float, answered: float
) -> Finding:
    last = _last(answer)
    if answer.code in (124, 255):
        return red(
            "host", f"{host}: cannot be reached ({'no answer in time' if answer.code == 124 else last})",
            f"`ssh -o BatchMode=yes {host} true` must work: copy the key (ssh-copy-id) and accept the host's once",
        )  # fmt: skip
    try:
        theirs = json.loads(last)
        versions, cards, now = theirs["versions"], int(theirs["cards"]), float(theirs["time"])
    except (ValueError, KeyError, TypeError):
        cure = "the clone must lie at the same path there, with its own `make setup`"
        return red("host", f"{host}: {last}", cure)
    unlike = [
        f"{name} {versions.get(name)} (here {version})"
        for name, version in mine.items()
        if versions.get(name) != version
    ]
    if unlike:
        return red("host", f"{host}: {', '.join(unlike)}", "install the same versions everywhere (make setup)")
    if 0 < cards < slots:
        return red("host", f"{host}: {slots} slots, but {cards} card(s)", "write the number of cards into the hostfile")
    skew = max(asked - now, now - answered, 0.0)
    if skew > MOST_SKEW:
        return yellow("host", f"{host}: its clock is {skew:.0f} s off", "timedatectl set-ntp true, on every machine")
    return green("host", f"{host}: reachable, same versions, {cards} card(s) for {slots} slot(s)")
