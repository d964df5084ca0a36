"""A rough stand-in for the trace, for a torch whose private parts have changed.

The factors are those of the shipped presets' traces, in hidden states (4 B T D bytes) per visit.
"""

from __future__ import annotations

from collections import Counter

from tbf.model.config import UltraConfig
from tbf.model.flops import build_meta, forward_flops_per_token, ode_evaluations
from tbf.planning.trace import Operation
from tbf.planning.visits import Pieces, Shape, Visit

_KEPT = {"retnet": 28, "titan_attn": 30, "mamba": 57, "ode": 17, "standard_attn": 24, "sigmoid_attn": 24}
"""By a layer of each kind and its FFN without experts; an ODE's per evaluation of its field."""
_MEMORY_KEPT = 85  # the neural memory of a titan layer
_EXPERTS_KEPT = 4
_BACKWARD = 5  # beside what was kept


def estimate_pieces(config: UltraConfig, shape: Shape, *, checkpointed: bool) -> Pieces:
    """Visits as `visits.trace_pieces` gives them, from factors. Overestimates small models."""
    state = 4 * shape.rows * shape.tokens * config.hidden_size
    logits = 4 * shape.rows * shape.slots * config.vocab_size
    model = build_meta(config)
    flops = forward_flops_per_token(config, shape.tokens, shape.slots / shape.tokens)
    tokens = shape.rows * shape.tokens
    counts = Counter(mixer for mixer, _ in config.layer_types)
    visits_per_kind = {mixer: count * config.num_loops for mixer, count in counts.items()}
    ffn = flops.get("ffn", 0.0) / (config.num_layers * config.num_loops)

    def visit(kept: float, peak: float, gradients: int, work: float, output: int = state, held: int = 0) -> Visit:
        forward = Counter({Operation("products", 3 * output, round(work * tokens), elements=output // 4): 1})
        backward = Counter({Operation("products", 6 * output, round(2 * work * tokens), elements=output // 4): 1})
        if checkpointed:
            backward += forward
        peak, kept = round(peak), round(kept)
        return Visit(kept, output, peak, peak + _BACKWARD * state, peak + _BACKWARD * state + gradients,
                     peak + _BACKWARD * state, peak, gradients, held, forward, backward)  # fmt: skip

    layers = {}
    for (mixer, window), layer in zip(config.layer_types, model.layers):
        kept = _KEPT[mixer] * (ode_evaluations(config) if mixer == "ode" else 1)
        kept += _MEMORY_KEPT if mixer == "titan_attn" and config.titan_memory == "linear" else 0
        kept = (kept + (_EXPERTS_KEPT if config.use_moe else 0)) * state
        gradients = 4 * sum(parameter.numel() for parameter in layer.parameters())
        work = flops.get(mixer, 0.0) / visits_per_kind[mixer] + ffn
        layers[mixer, window] = visit(state if checkpointed else kept, kept, gradients, work)
    table = 4 * model.embeddings.table.weight.numel()
    embeddings = visit(3 * state, 3 * state, table, flops.get("embeddings", 0.0))
    head = visit(2.2 * logits + state, 4.2 * logits, table, flops.get("head", 0.0), 0, logits)
    start = visit(state, 3 * state, 0, 0.0)
    ternary = sum(module.weight.numel() for module in model.modules() if getattr(module, "ternary", False))
    return Pieces(
        16 * shape.rows * shape.tokens, embeddings, start, layers, head, 2 * ternary, ternary, table
    )  # fmt: skip
