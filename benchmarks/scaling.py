"""Tokens per second on 1 to 128 P40s over slow networks, as the planner has them: docs/scaling.md.

python benchmarks/scaling.py [--quick]

Two cards a node. Efficiency is the share of as many single cards' speed. Beside it stands the accumulation that 80 %
take, and the tokens of its global batch.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from tbf.config import load_run_config
from tbf.planning.machine import choose_machine
from tbf.planning.plan import GIGABIT, Plan, Planner
from tbf.train.ds_config import load_ds_config

ROOT = Path(__file__).resolve().parent.parent
PRESETS = ("frankenstein_2048", "frankenstein_2048_moe")
CARDS = (1, 2, 8, 32, 128)
NETWORKS = (1, 10, 25)
ACCUMULATION = 16
GOOD = 0.8
_MOST = 4096


class Scaling:
    """Plans one preset on many numbers of cards; its model is traced once."""

    def __init__(self, preset: str, ds_config: Path) -> None:
        self.preset, self.ds_config = preset, ds_config
        self.planner = Planner(choose_machine("p40"), say=lambda text: print(text, file=sys.stderr, flush=True))

    def plan(self, cards: int, gigabits: float, accumulation: int) -> Plan:
        here = self.planner.machine
        gpus = min(cards, 2)
        self.planner.machine = dataclasses.replace(
            here, gpus=gpus, nodes=max(1, cards // gpus), network=gigabits * GIGABIT
        )
        overrides = [f"train.gradient_accumulation_steps={accumulation}"]
        explicit = {"gradient_accumulation_steps"}
        resolved, run = load_ds_config(self.ds_config, load_run_config(self.preset, overrides), cards, explicit)
        run = run.replace(model={"vocab_size": run.data.wanted_vocab_size})
        return self.planner.plan(run, resolved.as_planned())

    def speed(self, cards: int, gigabits: float, accumulation: int) -> float:
        """Tokens per second."""
        plan = self.plan(cards, gigabits, accumulation)
        return plan.tokens_per_step / plan.time.total

    def row(self, cards: int, gigabits: float) -> dict[str, Any]:
        alone = self.speed(1, gigabits, ACCUMULATION)
        plan = self.plan(cards, gigabits, ACCUMULATION)
        speed = plan.tokens_per_step / plan.time.total
        enough = next(
            (a for a in self._accumulations() if self.speed(cards, gigabits, a) >= GOOD * cards * alone), None
        )
        return {
            "preset": self.preset,
            "cards": cards,
            "gbit": gigabits,
            "tokens_per_s": speed,
            "efficiency": speed / (cards * alone),
            "step_s": plan.time.total,
            "network_s": plan.time.network,
            "accumulation_for_80": enough,
            "batch_for_80": enough and plan.tokens_per_step // ACCUMULATION * enough,
            "fits": plan.fits,
        }

    @staticmethod
    def _accumulations() -> list[int]:
        return [2**power for power in range(_MOST.bit_length())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one preset, three sizes, one network")
    parser.add_argument("--ds_config", type=Path, default=ROOT / "ds_configs" / "p40_multinode.json")
    arguments = parser.parse_args()
    presets, cards, networks = (PRESETS[:1], (1, 2, 8), (10,)) if arguments.quick else (PRESETS, CARDS, NETWORKS)
    rows = []
    for preset in presets:
        scaling = Scaling(preset, arguments.ds_config)
        print(f"\n{preset}, {arguments.ds_config.name}, {ACCUMULATION} micro-batches a step\n")
        print("| cards | network | tokens/s | efficiency | step | of it network | accumulation for 80 % | its batch |")
        print("|---|---|---|---|---|---|---|---|")
        for count in cards:
            for gigabits in networks[:1] if count <= 2 else networks:
                row = scaling.row(count, gigabits)
                rows.append(row)
                network = "-" if count <= 2 else f"{gigabits} GbE"
                batch = f"{row['batch_for_80'] / 1e6:.2f} M tokens" if row["batch_for_80"] else "never"
                speed, step = f"{row['tokens_per_s']:,.0f} | {row['efficiency']:.0%}", f"{row['step_s']:.1f} s"
                needed = row["accumulation_for_80"] or "-"
                print(f"| {count} | {network} | {speed} | {step} | {row['network_s']:.1f} s | {needed} | {batch} |")
    figures = {f"efficiency@{r['preset']}x{r['cards']}@{r['gbit']}gbit": round(r["efficiency"], 3) for r in rows}
    print(json.dumps({"benchmark": "scaling", "machine": {"planned": "p40"}, "rows": rows, "figures": figures}))


if __name__ == "__main__":
    main()
