"""Ternary layers that hold their packed weights and nothing else: inference from a fifth of a byte per weight.

Shapes: `D` input features, `N` output features, summed over `S` slices, `E` experts, `A` rows of all experts,
`G` = ceil(D / 5) bytes a row.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tbf.model.bitlinear import BitLinear
from tbf.model.moe import ExpertLinear
from tbf.ops.ternary import ternary_inference
from tbf.ops.ternary_backends import TernaryPlan, TernaryWeight
from tbf.ops.ternary_cache import TernaryCache
from tbf.ops.ternary_pack import packed_width, prepare_packed
from tbf.ops.ternary_probe import default_plan


class PackedLayer(nn.Module):
    """Base of the packed layers: `trits` uint8 [.., N, G] and `scales` FP32 [.., S] in place of a weight [.., N, D].

    Unpacked once, at the first forward on a device, into the integer operands of the plan in force; after that, results
    equal those of the layer it was packed from, bit for bit.
    """

    def __init__(self, layer: BitLinear | ExpertLinear) -> None:
        super().__init__()
        *experts, rows, self.in_features = layer.weight.shape
        self.slices, self.eps = layer.slices, layer.eps
        self.register_buffer("trits", torch.empty(*experts, rows, packed_width(self.in_features), dtype=torch.uint8))
        self.register_buffer("scales", torch.empty(*experts, len(self.slices)))
        self.sub_norm = layer.sub_norm  # [D] or None
        self.ternary_plan: TernaryPlan | None = None
        self.ternary_cache = TernaryCache()

    def multiply(self, x: Tensor, counts: list[int]) -> tuple[Tensor, ...]:
        """x [A, D], counts[e] rows for each matrix -> one [A, N_i] per slice."""
        plan = self.ternary_plan or default_plan(self.trits.device)
        matrices = self.ternary_cache.get(self.trits, (self.slices, plan), lambda: self._unpack(plan))
        return ternary_inference(x, matrices, counts, gain=self.sub_norm, norm_eps=self.eps, plan=plan)

    def _unpack(self, plan: TernaryPlan) -> list[TernaryWeight]:
        return prepare_packed(self.trits, self.scales, self.slices, self.in_features, plan)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.slices}, packed, sub_norm={self.sub_norm is not None}"


class PackedLinear(PackedLayer):
    """A BitLinear without its FP32 weight."""

    def __init__(self, layer: BitLinear) -> None:
        super().__init__(layer)
        self.fused = layer.fused

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Maps x [..., D] to [..., N], or to a tuple of [..., N_i] for a fused projection."""
        rows = x.reshape(-1, x.shape[-1])
        ys = tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in self.multiply(rows, [len(rows)]))
        return ys if self.fused else ys[0]


class PackedExperts(PackedLayer):
    """An ExpertLinear without its FP32 weights."""

    in_integers = True

    def forward(self, x: Tensor, counts: Tensor) -> tuple[Tensor, ...]:
        """x [A, D], sorted by expert, counts [E] rows each -> one [A, N_i] per slice."""
        return self.multiply(x, counts.tolist())


def ternary_layers(model: nn.Module) -> dict[str, BitLinear | ExpertLinear]:
    """Name -> each layer of `model` whose weight can be packed."""
    found = (BitLinear, ExpertLinear)
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, found) and layer.ternary}


def pack_layers(model: nn.Module) -> None:
    """Puts packed layers, yet without values, where `model` has ternary ones, and turns gradients off everywhere."""
    for name, layer in ternary_layers(model).items():
        packed = PackedLinear(layer) if isinstance(layer, BitLinear) else PackedExperts(layer)
        model.set_submodule(name, packed.train(layer.training))
    model.requires_grad_(False)


def is_packed(model: nn.Module) -> bool:
    """Whether `model` came from a ternary export, and so has no weights to train."""
    return any(isinstance(module, PackedLayer) for module in model.modules())
