"""The plan as a page of text."""

from __future__ import annotations

from collections import Counter

from tbf.config import RunConfig
from tbf.hardware.devices import CONTEXT_BYTES
from tbf.planning.changes import Change, write_up
from tbf.planning.engine_state import Engine
from tbf.planning.plan import FRAGMENTATION, Plan, Verdict, memory_by_place
from tbf.planning.search import NO_CURE

_WHEN = {"pass": "in each pass", "handed": "at most, as gradients are completed",
         "reduce": "while gradients are reduced", "step": "in the optimizer step",
         "start": "while starting"}  # fmt: skip


def report(plan: Plan, tokens: float | None = None) -> str:
    """Everything that the plan says, with a verdict per resource; `tokens`: the length of a training to time."""
    machine, engine, shape = plan.machine, plan.engine, plan.shape
    nodes = f" on {machine.nodes} nodes" if machine.nodes > 1 else ""
    lines = [
        f"{plan.preset} on {machine.ranks} x {machine.device.name}{nodes}: ZeRO-{engine.stage}, optimizer "
        f"{_where(engine.offload_optimizer)}"
        + (f", parameters {_where(engine.offload_param)}" if engine.stage == 3 else "")
        + f", checkpointing {engine.granularity}" + (" to the host" if engine.cpu_checkpointing else ""),
        f"  {shape.rows} rows x {shape.tokens} tokens x {engine.accumulation} micro-batches x {machine.ranks} rank(s) "
        f"= {plan.tokens_per_step:,} tokens a step",
        "",
        "parameters",
        *_parameters(plan),
        "",
        *_memory(plan),
        "",
        *_traffic(plan),
        "",
        *_time(plan, tokens),
        "",
        *(_verdict(verdict) for verdict in plan.verdicts),
    ]  # fmt: skip
    return "\n".join(lines)


def _where(place: str) -> str:
    return {"none": "on the device", "cpu": "in host memory", "nvme": "on NVMe"}[place]


def _parameters(plan: Plan) -> list[str]:
    total = plan.facts.total
    parts = sorted(plan.parameters.items(), key=lambda item: -item[1])
    return [
        *(f"  {part:32}{count / 1e6:>12,.2f} M{count / total:8.1%}" for part, count in parts),
        f"  {'total':32}{total / 1e6:>12,.2f} M",
    ]


def _memory(plan: Plan) -> list[str]:
    on_cuda, pass_ = plan.machine.device.on_cuda, plan.activations
    held: Counter[tuple[str, str, str]] = Counter()
    for item in plan.items:
        held[item.place, item.name, item.when] += item.bytes
    held["device", f"activations, {pass_.source}: most at {pass_.peak_at}", "pass"] = pass_.own
    held["device", "gradients that wait for the other loops", "pass"] = pass_.waiting_gradients
    held["device", "ternary forms of the weights", "always"] = pass_.ternary_caches
    if on_cuda:
        lost = int(FRAGMENTATION * pass_.own)
        held["device", f"fragmentation, {FRAGMENTATION:.0%} of the activations", "pass"] = lost
    held["host", "activations kept by cpu_checkpointing", "pass"] = pass_.host
    for name, size in plan.beside.items():
        held["host", name, "always"] = size
    if on_cuda:
        held["device", "CUDA context and libraries", "always"] = CONTEXT_BYTES
    most = memory_by_place(plan.items, pass_, on_cuda)
    most["host"] += sum(plan.beside.values())
    titles = {"device": "GPU memory of each card", "host": "host memory of each rank", "nvme": "NVMe of each rank"}
    if not on_cuda:
        titles = {"device": "memory of each rank: what a card would hold", "host": "and what its host would hold"}
    lines = []
    for place, title in titles.items():
        rows = [(name, when, size) for (at, name, when), size in held.items() if at == place and size]
        lines += [f"{title}, GB"] if rows else []
        lines += [f"  {name:74}{size / 1e9:>9.2f}  {_WHEN.get(when, '')}".rstrip() for name, when, size in rows]
        if rows and (on_cuda or place == "host"):
            lines.append(f"  {'at the worst moment' if on_cuda else 'both at the worst moment':74}"
                         f"{most[place] / 1e9:>9.2f}")  # fmt: skip
    logits = f"{pass_.logits / 1e9:.2f} GB of logits; {pass_.kept / 1e9:.2f} GB kept for the backward"
    return [*lines, f"  (of the activations: {logits})"]


def _traffic(plan: Plan) -> list[str]:
    traffic = plan.traffic
    return [
        f"traffic of each rank and step, GB: to the host {traffic.to_host / 1e9:.2f}, to the card "
        f"{traffic.to_device / 1e9:.2f}, network {traffic.network / 1e9:.2f}, NVMe {traffic.nvme / 1e9:.2f}",
        f"disk: {plan.checkpoint_bytes / 1e9:.1f} GB a checkpoint, {plan.disk_bytes / 1e9:.1f} GB with those kept and "
        "the data",
    ]


def _time(plan: Plan, tokens: float | None) -> list[str]:
    parts = sorted(vars(plan.time).items(), key=lambda item: -item[1])
    listed = ", ".join(f"{name} {seconds:.3g}" for name, seconds in parts if seconds > 0)
    line = (
        f"time of a step: {plan.time.total:.3g} s ({listed}); {plan.flops_per_token / 1e9:.2f} GFLOP a token; "
        f"{plan.tokens_per_step / plan.time.total:,.0f} tokens/s, {plan.tokens_per_day / 1e6:,.1f} M tokens a day"
    )
    if tokens:
        line += f"; {tokens:.3g} tokens take {tokens / plan.tokens_per_day:,.1f} days"
    return [line]


def _verdict(verdict: Verdict) -> str:
    state = "fits" if verdict.fits else "DOES NOT FIT"
    line = f"{verdict.resource}: {state}, {verdict.needed / 1e9:.2f} of {verdict.available / 1e9:.2f} GB"
    return f"{line}; {verdict.cure}" if verdict.cure else line


def suggestion(old: tuple[RunConfig, Engine], plan: Plan, found: tuple[Change, Plan] | None) -> str:
    """The fastest settings that fit, and the lines to change."""
    if found is None:
        return f"suggestion: {NO_CURE}"
    change, best = found
    gain = f", {plan.time.total / best.time.total:.2f} x as fast" if plan.fits else ""
    lines = [f"suggestion: {change.summary}: {best.time.total:.3g} s a step{gain}"]
    lines += [f"  {line}" for line in write_up(old, (change.run, change.engine))]
    lines += [f"  {_verdict(verdict)}" for verdict in best.verdicts]
    return "\n".join(lines)
