"""One run's configuration: model + data + train sections, from a YAML preset plus `--set section.key=value`.

The preset owns the model, the data, the schedule and the run length; the ds_config owns what DeepSpeed owns. Numbers
that both need (micro batch, accumulation, clipping, AdamW's) live here and reach the ds_config through its "auto".
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml

from tbf.errors import ConfigError, nearest
from tbf.model.config import UltraConfig

Section = TypeVar("Section")
FREE_DATA = frozenset({"tokenizer", "vocab_size", "cache_dir", "num_workers", "disk_budget_gb"})
"""Keys of the data section that a resumed run may change: what they decide, if anything, is in the shards."""


@dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how rows and masks are made of it."""

    source: str = "sample"
    """`sample`, `hf:NAME[:split[:column]]`, a file, folder or glob of parquet, jsonl or txt, a mixture of these
    (`a=0.7,b=0.3`), or a folder made by `tbf data prepare`, which also settles the next four."""
    column: str = "text"
    """Parquet column or JSON key that holds the text."""
    documents: str = "file"
    """What a document of a .txt file is: `file`, `line`, or `block` (ended by a blank line)."""
    min_chars: int = 1
    """Shorter documents are dropped."""
    min_spanish: float = 0.0
    """Documents that look less Spanish are dropped; 0: off, 0.65 keeps Spanish and little else."""
    tokenizer: str = ""
    """Folder or .model file; empty: one is trained on the source at first use."""
    vocab_size: int = 0
    """Of a tokenizer trained at first use; 0: 4,096 for the embedded sample, 50,000 otherwise."""
    seq_len: int = 512
    """Tokens a row; documents are packed into rows and never see each other."""
    mask_rate: float = 0.3
    """Share of a row's ordinary tokens that are hidden."""
    mask_rate_end: float = 0.0
    """Reached by a straight line over the decay phase of the learning rate; 0: `mask_rate` throughout. Evaluation
    always hides `mask_rate`."""
    whole_words: bool = False
    """Hide words with all of their tokens."""
    mask_token_share: float = 0.8
    """Of the masked positions: replaced by [MASK]. The rest of 1 after `random_token_share` is kept as it is."""
    random_token_share: float = 0.1
    validation_share: float = 0.05
    """Share of the documents, by hash, held out for evaluation."""
    cache_dir: str = ""
    """Shards and trained tokenizers; empty: ~/.cache/tbf."""
    num_workers: int = 1
    """Processes that tokenise, and that prepare rows ahead of the training thread (0: none)."""
    disk_budget_gb: float = 300.0

    def __post_init__(self) -> None:
        _require(self.seq_len >= 8, "data.seq_len", self.seq_len, "at least 8 tokens")
        _require(0.0 < self.mask_rate < 1.0, "data.mask_rate", self.mask_rate, "between 0 and 1, e.g. 0.3")
        _require(0.0 <= self.mask_rate_end < 1.0, "data.mask_rate_end", self.mask_rate_end, "0 (off) to 1, e.g. 0.15")
        _require(self.documents in ("file", "line", "block"), "data.documents", self.documents, "file, line or block")
        _require(bool(self.column), "data.column", self.column, "the name of a column or key, e.g. text")
        _require(self.min_chars >= 1, "data.min_chars", self.min_chars, "at least 1")
        _require(0.0 <= self.min_spanish <= 1.0, "data.min_spanish", self.min_spanish, "0 (off) to 1, e.g. 0.65")
        shares = self.mask_token_share + self.random_token_share
        _require(
            min(self.mask_token_share, self.random_token_share) >= 0 and shares <= 1 + 1e-9,
            "data.mask_token_share + data.random_token_share",
            shares,
            "at most 1, e.g. 0.8 and 0.1",
        )
        _require(0.0 < self.validation_share < 0.5, "data.validation_share", self.validation_share, "e.g. 0.05")
        _require(self.num_workers >= 0, "data.num_workers", self.num_workers, "0 or more")
        _require(self.vocab_size >= 0, "data.vocab_size", self.vocab_size, "0 (automatic) or the number of tokens")
        _require(bool(self.source), "data.source", self.source, "sample, hf:NAME or a path")

    @property
    def wanted_vocab_size(self) -> int:
        return self.vocab_size or (4096 if self.source == "sample" else 50_000)


@dataclass(frozen=True)
class TrainConfig:
    """Schedule, optimizer and bookkeeping of a run."""

    seed: int = 0
    max_steps: int = 1000
    micro_batch_size: int = 8
    """Rows per rank and micro-step; reaches the ds_config's `train_micro_batch_size_per_gpu: "auto"`."""
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-3
    """Peak; warm-up, stable and decay phases follow (WSD)."""
    warmup_steps: int = 50
    decay_share: float = 0.3
    """Last share of the run in which the rate falls by 1 - sqrt (ModernBERT, 2412.13663)."""
    min_lr_ratio: float = 0.01
    weight_decay: float = 0.1
    two_stage_weight_decay: bool = False
    """BitNet's recipe (2402.17764): no weight decay in the second half of the run."""
    stochastic_loops: bool = False
    """After the warm-up, a tenth of the steps makes one loop less than model.num_loops, and a tenth one more."""
    beta1: float = 0.9
    beta2: float = 0.98
    adam_eps: float = 1e-8
    gradient_clipping: float = 1.0
    eval_every: int = 100
    eval_rows: int = 64
    save_every: int = 500
    save_in_background: bool = False
    """Training waits for a copy in host memory only, as large as what the node's ranks save; see docs/trust.md."""
    keep_last: int = 2
    keep_best: int = 1
    log_every: int = 10
    spike_sigmas: float = 8.0
    """A loss, or logarithm of a gradient norm, this many robust standard deviations above the median of the last
    `spike_window` steps is not applied. 0: only what is not finite."""
    spike_window: int = 128
    max_bad_steps: int = 3
    """Skipped steps among the last `bad_window` after which the run goes back to its last healthy checkpoint, and on
    from there with the rows that come next."""
    bad_window: int = 50
    max_rollbacks: int = 3
    """Returns without getting past the failure after which the run halts with an emergency dump (exit 6)."""
    rollback_lr_factor: float = 1.0
    """Multiplies the learning rate at each return, for the rest of the run; e.g. 0.5."""
    thermal_soft_c: float = 82.0
    """Degrees Celsius of a rank's card (by NVML) above which it pauses between steps until it is cooler. A P40 slows
    itself down in the nineties."""
    thermal_hard_c: float = 90.0
    """Degrees above which the run saves and stops."""
    stall_timeout_s: float = 300.0
    """Seconds without a sign of a rank's process, or without progress of any rank, after which the run is ended and
    the rank named (exit 5). Longer than the longest save. 0: never."""
    rehearse: bool = True
    """Take one step at the largest shape before the first, and drop it: memory that does not suffice shows at once."""
    export_at_end: bool = True
    tensorboard: bool = True
    wandb: bool = False
    wandb_project: str = "tbf"

    def __post_init__(self) -> None:
        for name in (
            "max_steps",
            "micro_batch_size",
            "gradient_accumulation_steps",
            "eval_every",
            "eval_rows",
            "save_every",
            "log_every",
            "max_bad_steps",
            "bad_window",
        ):
            _require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "at least 1")
        _require(self.learning_rate > 0, "train.learning_rate", self.learning_rate, "above 0, e.g. 1e-3")
        _require(self.gradient_clipping > 0, "train.gradient_clipping", self.gradient_clipping, "above 0, e.g. 1.0")
        _require(self.spike_sigmas >= 0, "train.spike_sigmas", self.spike_sigmas, "0 (off) or e.g. 8")
        _require(
            0 < self.thermal_soft_c < self.thermal_hard_c, "train.thermal_soft_c", self.thermal_soft_c,
            f"above 0 and below train.thermal_hard_c ({self.thermal_hard_c:g})",
        )  # fmt: skip
        _require(self.stall_timeout_s >= 0, "train.stall_timeout_s", self.stall_timeout_s, "0 (never) or seconds")
        _require(self.spike_window >= 4, "train.spike_window", self.spike_window, "at least 4, e.g. 128")
        _require(self.max_rollbacks >= 0, "train.max_rollbacks", self.max_rollbacks, "0 or more")
        _require(0.0 < self.rollback_lr_factor <= 1.0, "train.rollback_lr_factor", self.rollback_lr_factor, "in (0, 1]")
        _require(self.warmup_steps >= 0, "train.warmup_steps", self.warmup_steps, "0 or more")
        _require(0.0 <= self.decay_share <= 1.0, "train.decay_share", self.decay_share, "between 0 and 1, e.g. 0.3")
        _require(0.0 <= self.min_lr_ratio <= 1.0, "train.min_lr_ratio", self.min_lr_ratio, "between 0 and 1")
        _require(self.weight_decay >= 0, "train.weight_decay", self.weight_decay, "0 or more, e.g. 0.1")
        _require(self.keep_last >= 2, "train.keep_last", self.keep_last, "at least 2: the newest may be cut short")
        _require(self.keep_best >= 0, "train.keep_best", self.keep_best, "0 or more")
        for name in ("beta1", "beta2"):
            _require(0.0 <= getattr(self, name) < 1.0, f"train.{name}", getattr(self, name), "in [0, 1)")


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run's numbers, except what the ds_config owns."""

    preset: str = "custom"
    model: UltraConfig = field(default_factory=UltraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def to_dict(self) -> dict[str, Any]:
        return {
            "preset": self.preset,
            "model": self.model.to_dict(),
            "data": dataclasses.asdict(self.data),
            "train": dataclasses.asdict(self.train),
        }

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def save(self, path: Path) -> None:
        path.write_text(self.to_yaml(), encoding="utf-8")

    def replace(self, *, model: Mapping = {}, data: Mapping = {}, train: Mapping = {}) -> RunConfig:
        """Returns a copy with fields of its sections changed."""
        return dataclasses.replace(
            self,
            model=dataclasses.replace(self.model, **model),
            data=dataclasses.replace(self.data, **data),
            train=dataclasses.replace(self.train, **train),
        )

    def fingerprint(self, corpus: str = "") -> str:
        """Hash of what a checkpoint shares with the run that resumes it: architecture, rows, masks and seed.

        `corpus` names the content of the shards: files may change under the same `data.source`. The length of the run
        is left out: a longer run moves its decay phase, of the learning rate and of the mask rate alike.
        """
        data = {key: value for key, value in dataclasses.asdict(self.data).items() if key not in FREE_DATA}
        parts = {"model": self.model.to_dict(), "data": data, "corpus": corpus, "seed": self.train.seed}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def preset_names() -> list[str]:
    """Names that `--preset` accepts besides a YAML file."""
    return sorted(f.name[: -len(".yaml")] for f in resources.files("tbf.presets").iterdir() if f.name.endswith(".yaml"))


def load_run_config(preset: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a preset by name or YAML file and applies `section.key=value` overrides.

    Raises ConfigError on a missing or malformed file, an unknown key (naming the nearest valid one) or a bad value.
    """
    name, text, where = _read_preset(preset)
    try:
        raw = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{where} holds a {type(raw).__name__}; expected the sections model, data and train")
    sections: dict[str, dict[str, Any]] = {"model": {}, "data": {}, "train": {}}
    for key, values in raw.items():
        if key == "preset":
            name = str(values)
        elif key not in sections:
            raise ConfigError(f"{where}: unknown section '{key}'; {nearest(str(key), [*sections, 'preset'])}")
        elif not isinstance(values, dict):
            raise ConfigError(f"{where}: section '{key}' holds {values!r}; expected keys and values")
        else:
            sections[key].update(values)
    for override in overrides:
        section, key, value = _parse_override(override, sections)
        sections[section][key] = value
    _settle_vocabulary(sections, where)
    return RunConfig(
        preset=name,
        model=_build(UltraConfig, "model", sections["model"], where),
        data=_build(DataConfig, "data", sections["data"], where),
        train=_build(TrainConfig, "train", sections["train"], where),
    )


def _settle_vocabulary(sections: dict[str, dict[str, Any]], where: str) -> None:
    """The tokenizer decides the vocabulary, so a size given for the model is a wish to it, and may not contradict."""
    model_size, data_size = sections["model"].get("vocab_size"), sections["data"].get("vocab_size")
    if model_size and data_size and model_size != data_size:
        raise ConfigError(f"{where}: model.vocab_size {model_size} contradicts data.vocab_size {data_size}; keep one")
    if model_size and not data_size:
        sections["data"]["vocab_size"] = model_size


def _read_preset(preset: str) -> tuple[str, str, str]:
    if preset in preset_names():
        return preset, (resources.files("tbf.presets") / f"{preset}.yaml").read_text("utf-8"), f"preset '{preset}'"
    path = Path(preset)
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"no preset '{preset}'; {nearest(preset, preset_names())} (or give a .yaml file)")
    try:
        return path.stem, path.read_text("utf-8"), f"preset file {path}"
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot read preset file {path}: {error}; shipped presets: {', '.join(preset_names())}"
        ) from None


def _parse_override(text: str, sections: Mapping[str, Any]) -> tuple[str, str, Any]:
    path, equals, value = text.partition("=")
    section, dot, key = path.strip().partition(".")
    if not equals or not dot:
        raise ConfigError(f"--set {text}: expected section.key=value, e.g. --set train.max_steps=200")
    if section not in sections:
        raise ConfigError(f"--set {text}: unknown section '{section}'; {nearest(section, sections)}")
    try:
        return section, key.strip(), yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"--set {text}: '{value}' is not a YAML value") from None


def _build(cls: type[Section], section: str, values: Mapping[str, Any], where: str) -> Section:
    """Builds one section, refusing unknown keys and values of another type than the field's default."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    checked = {}
    for key, value in values.items():
        if key not in fields:
            raise ConfigError(f"{where}: unknown key '{section}.{key}'; {nearest(str(key), fields)}")
        checked[key] = _convert(value, fields[key].default, f"{where}: {section}.{key}")
    return cls(**checked)


def _convert(value: Any, default: Any, where: str) -> Any:
    """YAML reads `1e-3` as text and 1 as int: accepts both where a float is due; refuses anything else."""
    if isinstance(default, bool):
        ok, kind = isinstance(value, bool), "true or false"
    elif isinstance(default, int):
        ok, kind = isinstance(value, int) and not isinstance(value, bool), "a whole number"
    elif isinstance(default, float):
        kind = "a number"
        try:
            ok, value = not isinstance(value, bool), float(value)
        except (TypeError, ValueError):
            ok = False
    elif isinstance(default, str):
        ok, kind = isinstance(value, str), "text"
    elif isinstance(default, tuple):
        ok, kind = isinstance(value, list | tuple), "a list"
    else:  # ffn_hidden_size: a number or nothing
        ok, kind = value is None or (isinstance(value, int) and not isinstance(value, bool)), "a whole number or null"
    if not ok:
        raise ConfigError(f"{where} is {value!r}; expected {kind}")
    return value


def _require(condition: bool, name: str, value: Any, rule: str) -> None:
    if not condition:
        raise ConfigError(f"{name} is {value!r}; it must be {rule}")
