"""The architecture of a model: one frozen dataclass that validates itself."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tbf.errors import ConfigError, nearest

MIXER_NAMES = ("retnet", "titan_attn", "mamba", "ode", "standard_attn", "sigmoid_attn")
ATTENTION_MIXERS = ("titan_attn", "standard_attn", "sigmoid_attn", "ode")
NORM_TYPES = ("rms", "layer_norm", "derf", "dynamic_tanh")
FFN_ACTIVATIONS = ("relu2", "silu", "gelu", "swiglu", "geglu")
DEFAULT_PATTERN = ("retnet", "titan_attn", "retnet", "mamba", "titan_attn", "ode")

_CHOICES = {
    "norm_type": NORM_TYPES,
    "ffn_activation": FFN_ACTIVATIONS,
    "ode_solver": ("rk4", "euler"),
    "titan_memory": ("none", "linear"),
    "pooling": ("mean", "cls"),
}
_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_loops",
    "num_heads",
    "retention_heads",
    "ode_steps",
    "num_experts",
    "top_k_experts",
    "factorized_embedding_dim",
    "embedding_conv_kernel",
    "mamba_state_size",
    "mamba_head_dim",
    "mamba_expand",
    "mamba_conv_kernel",
    "titan_chunk_size",
)
_ABOVE = {"norm_eps": 0.0, "hope_damping": 0.0, "hope_base": 1.0, "rope_base": 1.0, "initializer_std": 0.0}
_AT_LEAST_0 = (
    "window",
    "dropout",
    "router_balance_coef",
    "router_z_coef",
    "router_bias_rate",
    "pad_token_id",
    "mask_token_id",
)


@dataclass(frozen=True)
class UltraConfig:
    """Shape and behaviour of a Tormented-BERT-Frankenstein encoder. Raises ConfigError on impossible combinations."""

    vocab_size: int = 50_000
    hidden_size: int = 2048
    num_layers: int = 12
    """Physical layers; the model visits each of them `num_loops` times."""
    num_loops: int = 2
    layer_pattern: tuple[str, ...] = DEFAULT_PATTERN
    """Mixer names, cycled over the layers. `name:local` restricts an attention mixer to `window` tokens."""
    num_heads: int = 16
    """Heads of the attention mixers (titan_attn, ode, standard_attn, sigmoid_attn)."""
    retention_heads: int = 8
    window: int = 0
    """Width in tokens of `:local` attention: a token sees those at most window // 2 away."""
    dropout: float = 0.0
    """On the output of each mixer and FFN; encoders pretrain best with 0."""

    use_bitnet: bool = True
    """Ternary weights and int8 activations in every projection inside the layers (BitNet b1.58, 2402.17764)."""
    norm_type: str = "rms"
    norm_eps: float = 1e-6
    ffn_hidden_size: int | None = None
    """None: 2 x hidden_size."""
    ffn_activation: str = "relu2"

    use_factorized_embedding: bool = True
    factorized_embedding_dim: int = 256
    use_embedding_conv: bool = True
    embedding_conv_kernel: int = 3

    use_hope: bool = True
    """HoPE positions in titan_attn; False: rotary ones, as in the other attention mixers."""
    hope_base: float = 10_000.0
    hope_damping: float = 0.01
    rope_base: float = 10_000.0
    titan_memory: str = "linear"
    """The neural memory beside titan_attn's attention: linear (a matrix per head) or none."""
    titan_chunk_size: int = 64
    """Tokens that share one gradient point of the neural memory: part of the architecture, not a speed knob."""

    ode_solver: str = "rk4"
    ode_steps: int = 1

    mamba_state_size: int = 64
    mamba_head_dim: int = 64
    mamba_expand: int = 2
    mamba_conv_kernel: int = 7

    use_moe: bool = False
    num_experts: int = 4
    top_k_experts: int = 2
    router_balance_coef: float = 1e-2
    router_z_coef: float = 1e-3
    router_aux_free: bool = False
    """Balance experts by a selection bias (DeepSeek-V3) moved by `router_bias_rate` once per optimizer step."""
    router_bias_rate: float = 1e-3

    initializer_std: float = 0.02
    pooling: str = "mean"
    pad_token_id: int = 0
    mask_token_id: int = 4

    def __post_init__(self) -> None:
        if not isinstance(self.layer_pattern, list | tuple):
            raise ConfigError(f"layer_pattern is {self.layer_pattern!r}; give a list, e.g. [retnet, mamba]")
        object.__setattr__(self, "layer_pattern", tuple(self.layer_pattern))
        self._check_values()
        self._check_pattern()
        self._check_heads()

    def _check_values(self) -> None:
        for name in _POSITIVE:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least 1")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; choose one of: {', '.join(choices)}")
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name in (*_ABOVE, *_AT_LEAST_0):
            value, bound = getattr(self, name), _ABOVE.get(name, 0.0)
            kind, types = ("whole number", int) if isinstance(defaults[name], int) else ("number", int | float)
            good = isinstance(value, types) and not isinstance(value, bool) and bound <= value < math.inf
            if not good or (name in _ABOVE and value == bound):
                rule = "above" if name in _ABOVE else "of at least"
                raise ConfigError(f"{name} is {value!r}; it must be a {kind} {rule} {bound:g}, e.g. {defaults[name]}")
        for name, default in defaults.items():
            if isinstance(default, bool) and not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be true or false, e.g. {default}")
        if self.dropout >= 1.0:
            raise ConfigError(f"dropout is {self.dropout}; it must lie in [0, 1), e.g. 0.1")
        size = self.ffn_hidden_size
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ConfigError(f"ffn_hidden_size is {size!r}; give a width of at least 1, or null for 2x hidden_size")
        for name in ("embedding_conv_kernel", "mamba_conv_kernel"):
            if getattr(self, name) % 2 == 0:
                value = getattr(self, name)
                raise ConfigError(f"{name} is {value}; a symmetric convolution needs an odd width, e.g. {value + 1}")
        for name in ("pad_token_id", "mask_token_id"):
            if getattr(self, name) >= self.vocab_size:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}; it must lie below vocab_size {self.vocab_size}, "
                    f"e.g. {min(defaults[name], self.vocab_size - 1)}"
                )
        if self.top_k_experts > self.num_experts:
            raise ConfigError(
                f"top_k_experts is {self.top_k_experts}; at most num_experts = {self.num_experts}, "
                f"e.g. {min(defaults['top_k_experts'], self.num_experts)}"
            )

    def _check_pattern(self) -> None:
        if not self.layer_pattern:
            raise ConfigError(f"layer_pattern is empty; name at least one of: {', '.join(MIXER_NAMES)}")
        for entry in self.layer_pattern:
            name, _, suffix = str(entry).partition(":")
            if name not in MIXER_NAMES:
                raise ConfigError(f"layer_pattern names the mixer '{entry}'; {nearest(name, MIXER_NAMES)}")
            if suffix not in ("", "local"):
                raise ConfigError(f"layer_pattern has '{entry}'; the only suffix is ':local', as in '{name}:local'")
            if suffix and name not in ATTENTION_MIXERS:
                raise ConfigError(f"layer_pattern has '{entry}'; only {', '.join(ATTENTION_MIXERS)} can be local")
            if suffix and self.window < 2:
                raise ConfigError(f"layer_pattern has '{entry}' but window is {self.window}; set e.g. window: 128")

    def _check_heads(self) -> None:
        for name, heads in (("num_heads", self.num_heads), ("retention_heads", self.retention_heads)):
            if self.hidden_size % heads or (self.hidden_size // heads) % 2:
                good = [h for h in range(1, self.hidden_size + 1) if self.hidden_size % (2 * h) == 0]
                if not good:
                    raise ConfigError(
                        f"hidden_size is {self.hidden_size}; it must be even, e.g. {self.hidden_size + 1}"
                    )
                best = min(good, key=lambda h: abs(h - heads))
                raise ConfigError(
                    f"{name} is {heads}: hidden_size {self.hidden_size} does not split into heads of an even width; "
                    f"use e.g. {name}={best}"
                )
        if self.mamba_inner_size % self.mamba_head_dim:
            good = next(d for d in (64, 48, 32, 16, 8, 4, 2) if self.mamba_inner_size % d == 0)
            raise ConfigError(
                f"mamba_head_dim is {self.mamba_head_dim}; it must divide mamba_expand x hidden_size = "
                f"{self.mamba_inner_size}, e.g. {good}"
            )

    @property
    def layer_types(self) -> tuple[tuple[str, int], ...]:
        """(mixer name, attention window in tokens or 0 for global) of each physical layer."""
        entries = (self.layer_pattern[i % len(self.layer_pattern)] for i in range(self.num_layers))
        split = (entry.partition(":") for entry in entries)
        return tuple((name, self.window if suffix else 0) for name, _, suffix in split)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def retention_head_dim(self) -> int:
        return self.hidden_size // self.retention_heads

    @property
    def mamba_inner_size(self) -> int:
        return self.mamba_expand * self.hidden_size

    @property
    def mamba_heads(self) -> int:
        return self.mamba_inner_size // self.mamba_head_dim

    @property
    def ffn_size(self) -> int:
        return self.ffn_hidden_size or 2 * self.hidden_size

    @property
    def embedding_size(self) -> int:
        return self.factorized_embedding_dim if self.use_factorized_embedding else self.hidden_size

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding table: the vocabulary rounded up to a multiple of 64."""
        return -(-self.vocab_size // 64) * 64

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "layer_pattern": list(self.layer_pattern)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> UltraConfig:
        """Builds a config, refusing unknown keys with the nearest valid one named."""
        names = {field.name for field in dataclasses.fields(cls)}
        for key in values:
            if key not in names:
                raise ConfigError(f"unknown model key '{key}'; {nearest(key, names)}")
        return cls(**values)

    def replace(self, **changes: Any) -> UltraConfig:
        return dataclasses.replace(self, **changes)

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
