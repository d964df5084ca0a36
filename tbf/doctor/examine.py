"""Runs all checks over a machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tbf.doctor import building, cards, host, network
from tbf.doctor.finding import Finding, yellow
from tbf.doctor.machine import Machine
from tbf.doctor.options import Options
from tbf.errors import ConfigError

Check = Callable[[Machine, Options], Iterator[Finding]]
CHECKS: tuple[Check, ...] = (
    *(building.versions, cards.driver, cards.torch_sees_cards, cards.kernels_for_cards, cards.cards),
    *(cards.nccl, cards.nvrtc, host.cores, host.memory, host.shared_memory, host.limits, host.disk, host.clock),
    *(building.compiler, building.cuda_toolkit, building.libaio, building.host_adam, building.build_locks),
    *(network.gloo, network.port, network.own_name, network.hosts, cards.ternary_kernels),
)


def examine(machine: Machine, options: Options) -> Iterator[Finding]:
    """Findings in the order of the checks, as they are made. A check that breaks is a finding too.

    Raises ConfigError for a hostfile that can't be read.
    """
    for check in CHECKS:
        try:
            yield from check(machine, options)
        except ConfigError:
            raise
        except Exception as error:  # one strange machine must not hide all the other answers
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            yield yellow(check.__name__.replace("_", " "), f"could not be checked ({reason})", "please report this")
