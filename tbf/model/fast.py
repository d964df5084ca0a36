"""The forward of a packed model in one call of compiled code: `load_pretrained(folder, fast=True)`.

PyTorch makes some thousand small operations of a forward, each a pass over memory. csrc/fast_encoder.cpp goes through
all loops and layers with a few documents at a time, without padding, in a core's caches, and reads weights of two bits.
Integer products are the same. FP32 sums run in another order, which now and then tips the rounding of an activation to
int8: results are close to the packed model's, but not equal bit for bit.

Shapes: `B` batch, `T` tokens, `D` hidden, `K` head width.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tbf.errors import ConfigError
from tbf.model.ffn import GATED
from tbf.model.mixers import MIXERS
from tbf.model.mixers.mamba import Mamba
from tbf.model.mixers.ode_attention import STAGES, OdeAttention
from tbf.model.mixers.retention import Retention
from tbf.model.mixers.softmax_attention import SoftmaxAttention
from tbf.model.mixers.titan_attention import TitanAttention
from tbf.model.packed import PackedLinear, is_packed
from tbf.model.segment_info import retention_log_gamma
from tbf.ops import fast_native as native
from tbf.ops.hope import hope_rates
from tbf.ops.rope import rope_angles
from tbf.ops.ternary_pack import unpack_trits

if TYPE_CHECKING:
    from tbf.model.encoder import TormentedBertFrankenstein
    from tbf.model.layer import HybridLayer

GROUP_ROWS = 128
"""Tokens whose documents go through the layers together: enough to share the unpacking of weights, few enough for a
core's caches."""


def make_fast(model: TormentedBertFrankenstein) -> None:
    """Lets `model`, packed, compute by the fused encoder from now on, with the weights that it has now.

    Hidden states at padding become zero. Raises ConfigError when the model isn't packed or has experts, HardwareError
    where the processor or the compiler can't serve.
    """
    if not is_packed(model):
        raise ConfigError("fast: only packed models can; export with --format ternary")
    if model.config.use_moe:
        raise ConfigError("fast: models with experts aren't served; load this one without it")
    native.fast_library()
    model.fast = FastEncoder(model)


class FastEncoder:
    """input_ids and documents [B, T] -> last hidden states [B, T, D]."""

    def __init__(self, model: TormentedBertFrankenstein) -> None:
        self.config, self.embeddings = model.config, model.embeddings
        windows = [window for _, window in model.config.layer_types]
        self.kept = [_layer(*layer, model.config.norm_type) for layer in zip(model.layers, windows)]
        self.layers = (native.Layer * len(self.kept))(*self.kept)
        self.start, self.final_norm = model.loop_start, model.final_norm
        self.model: native.Model | None = None

    def __call__(self, input_ids: Tensor, segments: Tensor, loops: int) -> Tensor:
        if input_ids.device.type != "cpu":
            raise ConfigError(f"fast: the model computes on the CPU, and the ids are on {input_ids.device}")
        real = segments > 0
        starts = real.clone()
        starts[:, 1:] &= segments[:, 1:] != segments[:, :-1]
        starts = starts[real]  # [rows]
        edges = torch.cat([starts.nonzero()[:, 0], torch.tensor([len(starts)])])  # [documents + 1]
        hidden = torch.zeros(*input_ids.shape, self.config.hidden_size)
        if len(starts):
            x0 = self.embeddings(input_ids[real][None], starts.cumsum(0)[None])[0]  # [rows, D]
            model = self._described(int(edges.diff().max()))
            hidden[real] = native.fast_encode(model, loops, x0, edges, GROUP_ROWS)
        return hidden

    def _described(self, tokens: int) -> native.Model:
        """The model with rotary tables for documents of `tokens` tokens."""
        if self.model is None or self.model.positions < tokens:
            self.model = self._describe(1 << (tokens - 1).bit_length())
        return self.model

    def _describe(self, positions: int) -> native.Model:
        config = self.config
        theta, theta_prime = hope_rates(config.num_heads, config.head_dim, config.hope_base, config.hope_damping)
        return native.Model(
            hidden=config.hidden_size, loops=config.num_loops, layers=len(self.layers),
            gated=config.ffn_activation in GATED, activation=native.ACTIVATIONS[config.ffn_activation],
            heads=config.num_heads, head_dim=config.head_dim,
            retention_heads=config.retention_heads, retention_dim=config.retention_head_dim,
            inner=config.mamba_inner_size, state=config.mamba_state_size, mamba_heads=config.mamba_heads,
            mamba_dim=config.mamba_head_dim, taps=config.mamba_conv_kernel,
            stages=STAGES[config.ode_solver], steps=config.ode_steps, hope=config.use_hope,
            memory_chunk=config.titan_chunk_size, eps=config.norm_eps, layer=self.layers,
            inject=self.start.inject, shift=self.start.shift, final_gain=self.final_norm.weight,
            log_gamma=retention_log_gamma(config.retention_heads), theta=theta, theta_prime=theta_prime,
            rope=_rope(positions, config.head_dim, config.rope_base),
            retention_rope=_rope(positions, config.retention_head_dim, config.rope_base),
            positions=positions,
        )  # fmt: skip


def _rope(positions: int, width: int, base: float) -> Tensor:
    """[2, T, K]: a cosine for each channel, and the sine that its pair's other channel is multiplied by."""
    cos, sin = rope_angles(positions, width, base, torch.device("cpu"), torch.float32)
    return torch.stack([torch.stack([cos, cos], -1), torch.stack([-sin, sin], -1)]).flatten(2)


def _layer(layer: HybridLayer, window: int, norm: str) -> native.Layer:
    mixer = layer.mixer
    wide = {Retention: "qkvg_proj", Mamba: "in_proj"}.get(type(mixer), "qkv_proj")
    fields = {
        "mixer": native.MIXERS[next(name for name, kind in MIXERS.items() if type(mixer) is kind)],
        "window": window,
        "mixer_norm": _norm(layer.mixer_norm, norm),
        "ffn_norm": _norm(layer.ffn_norm, norm),
        "in": _linear(getattr(mixer, wide)),
        "out": _linear(mixer.out_proj),
        "up": _linear(layer.ffn.up_proj),
        "down": _linear(layer.ffn.down_proj),
    }
    if isinstance(mixer, SoftmaxAttention):
        fields |= {"q_gain": mixer.q_norm.weight, "k_gain": mixer.k_norm.weight}
    if isinstance(mixer, OdeAttention):
        fields |= {"tau": mixer.tau, "stage_scale": mixer.stage_scale}
    if isinstance(mixer, Mamba):
        fields |= {"taps": mixer.conv.weight.T, "tap_bias": mixer.conv.bias, "rate": -mixer.A_log.exp()}
        fields |= {"step_bias": mixer.dt_bias, "skip": mixer.skip}
    if isinstance(mixer, TitanAttention) and mixer.memory is not None:
        gates = mixer.memory.gates
        fields |= {"gates": gates.weight.T, "gate_bias": gates.bias, "initial": mixer.memory.initial}
    return native.Layer(**fields)


def _norm(norm: nn.Module, kind: str) -> native.Norm:
    vectors = {name: getattr(norm, name) for name in ("weight", "bias", "alpha", "shift") if hasattr(norm, name)}
    return native.Norm(kind=native.NORMS[kind], eps=norm.eps if hasattr(norm, "eps") else 0.0, **vectors)


def _linear(layer: PackedLinear) -> native.Linear:
    values = unpack_trits(layer.trits, layer.in_features).split(list(layer.slices))
    quads = [native.pack_quads(part) for part in values]
    described = native.Linear(
        inner=layer.in_features, outer=sum(layer.slices), slices=len(layer.slices),
        widths=(ctypes.c_int64 * len(layer.slices))(*layer.slices),
        quads=(ctypes.c_void_p * len(layer.slices))(*(part.data_ptr() for part in quads)),
        scales=layer.scales, gain=layer.sub_norm, eps=layer.eps,
    )  # fmt: skip
    described.kept.append(quads)
    return described
