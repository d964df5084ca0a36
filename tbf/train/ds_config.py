"""Reads a ds_config, fills its "auto" values from the run configuration and refuses contradictions.

The ds_config owns everything DeepSpeed owns; "auto" (the convention users of Hugging Face know) takes the preset's
value, an explicit value wins over the preset, and two explicit values that contradict each other are an error.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tbf.config import RunConfig
from tbf.errors import ConfigError
from tbf.planning.engine_state import Engine
from tbf.train.ds_keys import ZERO_3, ZERO_BELOW_3, check_checkpointing_keys, check_keys

GRANULARITIES = ("none", "layer", "loop")

_HALF_PRECISION = ("fp16", "bf16", "bfloat16", "amp", "torch_autocast")


@dataclass(frozen=True)
class ActivationCheckpointing:
    """What the ds_config's `activation_checkpointing` block asks for."""

    granularity: str = "none"
    on_host: bool = False
    """Whether kept activations wait in host RAM."""


@dataclass(frozen=True)
class EngineConfig:
    """A resolved ds_config and the parts of it that the trainer acts on."""

    config: dict[str, Any]
    stage: int
    offload_optimizer: bool
    checkpointing: ActivationCheckpointing

    @property
    def needs_cpu_adam(self) -> bool:
        params = self.config["optimizer"]["params"]
        return self.offload_optimizer and not params.get("torch_adam", False)

    def as_planned(self) -> Engine:
        """What the planner reads from it. Raises ConfigError for options that contradict each other."""
        engine = Engine.from_config(self.config, self.checkpointing.granularity, self.checkpointing.on_host)
        stated = set(self.config["zero_optimization"]) & (ZERO_3 if self.stage == 3 else ZERO_BELOW_3)
        return replace(engine, stage_keys=tuple(sorted(stated)))


def load_ds_config(
    path: str | Path, run: RunConfig, world_size: int, explicit: Collection[str] = ()
) -> tuple[EngineConfig, RunConfig]:
    """Resolves the ds_config at `path` for this run and number of ranks.

    Returns it with the run configuration that now holds the values in force. `explicit` names the train keys that the
    user set on the command line: where one differs from an explicit value of the ds_config, ConfigError.
    """
    raw, where = _read(Path(path)), str(path)
    _refuse_half_precision(raw, where)
    check_keys({key: value for key, value in raw.items() if key not in _HALF_PRECISION}, where)
    run = _with_explicit_values(raw, run, where, explicit)
    train = run.train
    config = {
        **raw,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation_steps,
        "gradient_clipping": train.gradient_clipping,
        "optimizer": _optimizer(raw, run),
    }
    total = train.micro_batch_size * train.gradient_accumulation_steps * world_size
    if raw.get("train_batch_size", "auto") not in ("auto", total):
        raise ConfigError(
            f"{where}: train_batch_size {raw['train_batch_size']} contradicts micro batch {train.micro_batch_size} x "
            f'accumulation {train.gradient_accumulation_steps} x {world_size} ranks = {total}; make it "auto"'
        )
    config["train_batch_size"] = total
    zero = raw.get("zero_optimization", {})
    if zero.get("stage", 0) not in (1, 2, 3):
        raise ConfigError(
            f"{where}: zero_optimization.stage is {zero.get('stage', 0)!r}; use 1, 2 or 3 (stage 0 applies non-finite "
            "updates in FP32)"
        )
    config["activation_checkpointing"], checkpointing = _checkpointing(raw.get("activation_checkpointing"), where)
    return EngineConfig(_without_auto(config, where), zero["stage"], _offloads_optimizer(raw), checkpointing), run


def _with_explicit_values(raw: dict[str, Any], run: RunConfig, where: str, explicit: Collection[str]) -> RunConfig:
    """Every value that the ds_config states takes the place of the preset's."""
    optimizer = raw.get("optimizer", {})
    if optimizer.get("type", "AdamW") != "AdamW":
        raise ConfigError(f"{where}: optimizer.type is {optimizer['type']!r}; tbf trains with AdamW")
    params = optimizer.get("params", {})
    stated = {
        "micro_batch_size": ("train_micro_batch_size_per_gpu", raw.get("train_micro_batch_size_per_gpu", "auto")),
        "gradient_accumulation_steps": (
            "gradient_accumulation_steps",
            raw.get("gradient_accumulation_steps", "auto"),
        ),
        "gradient_clipping": ("gradient_clipping", raw.get("gradient_clipping", "auto")),
        "learning_rate": ("optimizer.params.lr", params.get("lr", "auto")),
        "weight_decay": ("optimizer.params.weight_decay", params.get("weight_decay", "auto")),
        "adam_eps": ("optimizer.params.eps", params.get("eps", "auto")),
    }
    betas = params.get("betas", "auto")
    if betas != "auto":
        if not isinstance(betas, list) or len(betas) != 2:
            raise ConfigError(f"{where}: optimizer.params.betas is {betas!r}; give two numbers, e.g. [0.9, 0.98]")
        stated |= {f"beta{i + 1}": (f"optimizer.params.betas[{i}]", value) for i, value in enumerate(betas)}
    changes = {}
    for name, (key, value) in stated.items():
        if value == "auto":
            continue
        ours = getattr(run.train, name)
        kind, types = ("whole number", int) if isinstance(ours, int) else ("number", int | float)
        if isinstance(value, bool) or not isinstance(value, types):
            raise ConfigError(f'{where}: {key} is {value!r}; give a {kind}, or "auto"')
        if name in explicit and value != ours:
            raise ConfigError(
                f'{where}: {key} is {value}, but train.{name}={ours} was set; make the first "auto" or drop the second'
            )
        changes[name] = value
    return run.replace(train=changes)


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        shipped = ", ".join(sorted(str(p) for p in Path("ds_configs").glob("*.json"))) or "none in ./ds_configs"
        raise ConfigError(f"no ds_config at {path}; shipped ones: {shipped}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read ds_config {path}: {error}") from None
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds a JSON {type(raw).__name__}; expected an object of DeepSpeed settings")
    return raw


def _optimizer(raw: dict[str, Any], run: RunConfig) -> dict[str, Any]:
    """AdamW with the run's numbers; on the card torch's, since DeepSpeed's would have to be compiled by nvcc."""
    train, params = run.train, raw.get("optimizer", {}).get("params", {})
    resolved = {
        **params,
        "lr": train.learning_rate,
        "betas": [train.beta1, train.beta2],
        "eps": train.adam_eps,
        "weight_decay": train.weight_decay,
    }
    if not _offloads_optimizer(raw):
        resolved.setdefault("torch_adam", True)
    return {"type": "AdamW", "params": resolved}


def _offloads_optimizer(raw: dict[str, Any]) -> bool:
    return (raw.get("zero_optimization", {}).get("offload_optimizer") or {}).get("device", "none") != "none"


def _refuse_half_precision(raw: dict[str, Any], where: str) -> None:
    for key in _HALF_PRECISION:
        block = raw.get(key)
        if block is not None and (not isinstance(block, dict) or block.get("enabled", True)):
            raise ConfigError(
                f"{where}: '{key}' is on; tbf trains in FP32 with ternary INT8 products: remove the block"
            )


def _checkpointing(block: dict[str, Any] | None, where: str) -> tuple[dict[str, Any], ActivationCheckpointing]:
    """The block switches checkpointing on; tbf applies it itself, since DeepSpeed's own is reentrant and would fire a
    looped layer's gradient hook once per visit (ZeRO-2 aborts on that, ZeRO-3 computes wrong gradients silently).
    """
    if block is None:
        return {}, ActivationCheckpointing()
    check_checkpointing_keys(block, where)
    granularity = block.get("granularity", "layer")
    if granularity not in GRANULARITIES:
        raise ConfigError(
            f"{where}: activation_checkpointing.granularity is {granularity!r}; choose {', '.join(GRANULARITIES)}"
        )
    return block, ActivationCheckpointing(granularity, block.get("cpu_checkpointing", False))


def _without_auto(config: dict[str, Any], where: str, path: str = "") -> dict[str, Any]:
    """A remaining "auto" names a key for which the preset has no value."""
    for key, value in config.items():
        if value == "auto":
            raise ConfigError(f"{where}: '{path}{key}' is \"auto\", but the preset has no value for it; write a number")
        if isinstance(value, dict):
            _without_auto(value, where, f"{path}{key}.")
    return config
