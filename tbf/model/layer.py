"""One layer: a mixer, then a feed-forward block, each on a residual stream.

Shapes: `B` batch, `T` tokens, `D` hidden.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from tbf.model.config import UltraConfig
from tbf.model.ffn import FeedForward
from tbf.model.mixers import MIXERS
from tbf.model.moe import MixtureOfExperts
from tbf.model.norms import build_norm
from tbf.model.segment_info import SegmentInfo


class HybridLayer(nn.Module):
    """x + Mixer(x), then x + FFN(Norm(x)). The mixer norms its own input: an ODE one does so at every stage.

    Router statistics are returned rather than stored, so that recomputing a layer can't count them twice.
    """

    def __init__(self, config: UltraConfig, mixer: str, window: int) -> None:
        super().__init__()
        self.mixer_norm = build_norm(config)
        self.mixer = MIXERS[mixer](config, window)
        self.ffn_norm = build_norm(config)
        self.ffn = MixtureOfExperts(config) if config.use_moe else FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, info: SegmentInfo, loop: int = 0, chosen: list[Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        """x [B, T, D] -> ([B, T, D], router statistics or None). chosen: as in MixtureOfExperts."""
        x = x + self.dropout(self.mixer(x, info, partial(self.mixer_norm, loop=loop), loop))
        update, stats = self.ffn(self.ffn_norm(x, loop), info, loop, chosen)
        return x + self.dropout(update), stats
