"""`tbf doctor`: what this machine has, what it lacks, and the cure for each."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from tbf.commands import add_verb
from tbf.errors import ConfigError, HardwareError

EXAMPLES = """\
  tbf doctor
  tbf doctor --build --nvme /mnt/nvme
  tbf doctor --hostfile hostfile --data /data/es
"""


def register(verbs: Any) -> None:
    parser = add_verb(
        verbs, "doctor", run, summary="say whether this machine can train, and what to do where it cannot",
        about="Green works, yellow works less well than it could, red stops or spoils a run. Leaves 5 if anything "
        "is red.",
        examples=EXAMPLES,
    )  # fmt: skip
    add = parser.add_argument
    add("--build", action="store_true", help="compile the host optimizer in a scratch folder (one to three minutes)")
    add("--nvme", type=Path, metavar="DIR", help="the folder for NVMe offload: measure it, and check what it needs")
    add(
        "--hostfile",
        type=Path,
        metavar="FILE",
        help="ask every machine of it over ssh, and measure the network between",
    )
    add("--data", type=Path, metavar="DIR", help="prepared data that every machine of the hostfile must have alike")
    add("--port", type=int, default=29500, metavar="N", help="where ranks meet (default: %(default)s)")
    add("--no-kernels", action="store_true", help="skip the table of ternary kernels")
    add("--json", action="store_true", help="one JSON object instead of lines")


def run(arguments: argparse.Namespace) -> int:
    if not 0 < arguments.port < 65536:
        raise ConfigError(f"--port {arguments.port}: between 1 and 65535, e.g. 29500")
    from tbf.doctor.finding import RED, count, to_dict
    from tbf.doctor.network import read_hostfile
    from tbf.doctor.options import Options
    from tbf.train.environment import ProcessInfo, set_threads, tune_allocator

    if arguments.data and not arguments.hostfile:
        raise ConfigError(
            "--data compares the machines of a hostfile; give --hostfile FILE, or use `tbf data inspect DIR --verify`"
        )
    if arguments.hostfile:
        read_hostfile(arguments.hostfile)  # a typing error shows now, not after all the other checks
    options = Options(
        arguments.nvme, arguments.hostfile, arguments.build, not arguments.no_kernels, arguments.port, arguments.data
    )
    set_threads(ProcessInfo(0, 0, 1, 1, "python"))  # as in training, before torch is imported
    tune_allocator()
    from tbf.doctor.examine import examine
    from tbf.doctor.local import LocalMachine

    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    findings = []
    for finding in examine(LocalMachine(), options):
        findings.append(finding)
        if not arguments.json:
            print(finding.text(colour), flush=True)
    counts = count(findings)
    if arguments.json:
        print(json.dumps(to_dict(findings), indent=2, ensure_ascii=False))
    else:
        print("\n" + ", ".join(f"{number} {status}" for status, number in counts.items()))
    return HardwareError.exit_code if counts[RED] else 0
