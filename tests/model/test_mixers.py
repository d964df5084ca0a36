"""Mixers against plain restatements of their equations: explicit matrices and token loops."""

import math

import torch
import torch.nn.functional as F

from tbf.model.mixers import MIXERS
from tbf.model.segment_info import SegmentInfo

SEGMENTS = torch.tensor([[1] * 5 + [2] * 4 + [0] * 2, [1] * 11])


def identity(x):
    return x


def build(config):
    torch.manual_seed(0)
    mixer = MIXERS[config.layer_types[0][0]](config, config.layer_types[0][1])
    for module in mixer.modules():
        if hasattr(module, "init_parameters"):
            module.init_parameters()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return mixer, SegmentInfo.build(config, SEGMENTS), torch.randn(2, 11, 32)


def rotate(x, base=10_000.0):
    """Rotary positions by complex multiplication: [B, T, H, K]."""
    half = x.shape[-1] // 2
    rates = base ** (-torch.arange(half, dtype=torch.float64) / half)
    turns = torch.polar(torch.ones(1, dtype=torch.float64), torch.arange(x.shape[1])[:, None] * rates)  # [T, K/2]
    pairs = torch.view_as_complex(x.double().unflatten(-1, (half, 2)).contiguous())
    return torch.view_as_real(pairs * turns[:, None]).flatten(-2).float()


def unit(x, eps=1e-6):
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()


def out(mixer, y):
    """The output projection, with SubLN where the mixer has one."""
    y = unit(y, 1e-5) * mixer.out_proj.sub_norm if mixer.out_proj.sub_norm is not None else y
    return y @ mixer.out_proj.weight.T


def same_document():
    return (SEGMENTS[:, :, None] == SEGMENTS[:, None])[:, None]  # [B, 1, T, T]


def normed_heads(mixer, x):
    q, k, v = (t.unflatten(-1, (4, 8)) for t in (x @ mixer.qkv_proj.weight.T).split(32, -1))
    return unit(q) * mixer.q_norm.weight, unit(k) * mixer.k_norm.weight, v


def test_retention_is_the_symmetric_decay_matrix(tiny):
    mixer, info, x = build(tiny(layer_pattern=["retnet"]))
    q, k, v, gate = (x @ mixer.qkvg_proj.weight.T).split(32, -1)
    q, k, v = (t.unflatten(-1, (4, 8)) for t in (q, k, v))
    gamma = 1 - torch.exp(torch.linspace(math.log(1 / 32), math.log(1 / 512), 4))
    position = torch.arange(11)
    decay = gamma[:, None, None] ** (position[:, None] - position).abs()  # [H, T, T]
    scores = torch.einsum("bnhk,bmhk->bhnm", rotate(q), rotate(k)) / 8**0.5 * decay * same_document()
    y = unit(torch.einsum("bhnm,bmhk->bnhk", scores, v)).flatten(2) * F.silu(gate)
    torch.testing.assert_close(mixer(x, info, identity), out(mixer, y), rtol=1e-4, atol=1e-5)


def test_mamba_is_two_token_recurrences(tiny):
    mixer, info, x = build(tiny(layer_pattern=["mamba"]))
    gate, values, states, steps = (x @ mixer.in_proj.weight.T).split((64, 64, 32, 8), -1)
    joined = torch.cat([values, states], -1)  # [B, T, C]
    convolved = torch.zeros_like(joined) + mixer.conv.bias
    for tap in range(7):
        for t in range(11):
            s = t + tap - 3
            if 0 <= s < 11:
                inside = (SEGMENTS[:, s] == SEGMENTS[:, t]).float()[:, None]
                convolved[:, t] += mixer.conv.weight[:, tap] * joined[:, s] * inside
    convolved = F.silu(convolved)
    values, b_fwd, c_fwd, b_bwd, c_bwd = convolved.split((64, 8, 8, 8, 8), -1)
    values = values.unflatten(-1, (4, 16))  # [B, T, H, P]
    dt_fwd, dt_bwd = (F.softplus(s + mixer.dt_bias) for s in steps.split(4, -1))  # [B, T, H]
    y = values * mixer.skip[:, None]
    for order, b, c, dt, inclusive in (
        (range(11), b_fwd, c_fwd, dt_fwd, True),
        (range(10, -1, -1), b_bwd, c_bwd, dt_bwd, False),
    ):
        state, previous = torch.zeros(2, 4, 8, 16), SEGMENTS[:, order[0]]
        for t in order:
            state = state * (SEGMENTS[:, t] == previous).float()[:, None, None, None]
            state = state * torch.exp(-dt[:, t] * mixer.A_log.exp())[..., None, None]
            fresh = torch.einsum("bn,bhp->bhnp", b[:, t], values[:, t] * dt[:, t, :, None])
            read = state + fresh if inclusive else state
            y[:, t] += torch.einsum("bn,bhnp->bhp", c[:, t], read)
            state, previous = state + fresh, SEGMENTS[:, t]
    torch.testing.assert_close(mixer(x, info, identity), out(mixer, y.flatten(2) * F.silu(gate)), rtol=1e-4, atol=1e-5)


def test_softmax_attention(tiny):
    mixer, info, x = build(tiny(layer_pattern=["standard_attn:local"]))
    q, k, v = normed_heads(mixer, x)
    scores = torch.einsum("bnhk,bmhk->bhnm", rotate(q), rotate(k)) / 8**0.5
    position = torch.arange(11)
    visible = same_document() & ((position[:, None] - position).abs() <= 2)
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    y = torch.einsum("bhnm,bmhk->bnhk", weights, v).flatten(2)
    torch.testing.assert_close(mixer(x, info, identity), out(mixer, y), rtol=1e-4, atol=1e-5)


def test_sigmoid_attention(tiny):
    mixer, info, x = build(tiny(layer_pattern=["sigmoid_attn"]))
    q, k, v = normed_heads(mixer, x)
    scores = torch.einsum("bnhk,bmhk->bhnm", rotate(q), rotate(k)) / 8**0.5
    length = same_document().sum(-1, keepdim=True)  # [B, 1, T, 1]: keys in the query's document
    weights = torch.sigmoid(scores - length.log()) * same_document()
    y = torch.einsum("bhnm,bmhk->bnhk", weights, v).flatten(2)
    torch.testing.assert_close(mixer(x, info, identity), out(mixer, y), rtol=1e-4, atol=1e-5)


def test_titan_attention_with_hope(tiny):
    """The logit of a pair decays exponentially with distance, per light-cone channel and direction."""
    config = tiny(layer_pattern=["titan_attn"])
    mixer, info, x = build(config)
    q, k, v = normed_heads(mixer, x)
    theta, theta_prime = info.hope
    scores = torch.empty(2, 4, 11, 11)
    for n in range(11):
        for m in range(11):
            distance = abs(n - m)
            angle = (n - m) * theta  # [H, K/2]
            qn, km = q[:, n].unflatten(-1, (4, 2)), k[:, m].unflatten(-1, (4, 2))  # [B, H, K/2, 2]
            boosted = torch.stack(
                [
                    torch.cosh(angle) * km[..., 0] + torch.sinh(angle) * km[..., 1],
                    torch.sinh(angle) * km[..., 0] + torch.cosh(angle) * km[..., 1],
                ],
                -1,
            )
            scores[:, :, n, m] = (qn * boosted).sum((-1, -2)) * torch.exp(-theta_prime * distance)
    weights = (scores / 8**0.5).masked_fill(~same_document(), float("-inf")).softmax(-1)
    y = torch.einsum("bhnm,bmhk->bnhk", weights, v).flatten(2)
    torch.testing.assert_close(mixer(x, info, identity), out(mixer, y), rtol=1e-4, atol=1e-5)


def test_titan_memory_learns_along_the_document(tiny):
    """Against the token rule, with the surprise taken at the memory before the token's chunk of its document."""
    config = tiny(layer_pattern=["titan_attn"], titan_memory="linear")
    mixer, info, x = build(config)
    memory = mixer.memory
    q, k, v = mixer.heads(x)
    got = memory(q, k, v, x, info.ids)

    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    gates = torch.sigmoid(F.linear(x, memory.gates.weight, memory.gates.bias)).unflatten(-1, (7, 4))  # [B, T, 7, H]
    read = torch.zeros(2, 11, 4, 8)
    for row in range(2):
        for head in range(4):
            for direction in range(2):
                order = list(range(11))[:: -1 if direction else 1]
                for step, t in enumerate(order):
                    fresh = step == 0 or SEGMENTS[row, t] != SEGMENTS[row, order[step - 1]]
                    if fresh:
                        place, weights, momentum_state = 0, memory.initial[head], torch.zeros(8, 8)
                    if place % 4 == 0:
                        anchor = weights
                    place += 1
                    rate, momentum, forget = gates[row, t, 3 * direction : 3 * direction + 3, head]
                    momentum = 0.95 * momentum
                    rate = rate * (1 - momentum) / 4
                    key, value = k[row, t, head], v[row, t, head]
                    surprise = 2 * torch.outer(key, key @ anchor - value)
                    momentum_state = momentum * momentum_state - rate * surprise
                    weights = (1 - forget) * weights + momentum_state
                    read[row, t, head] += q[row, t, head] @ weights
    expected = gates[:, :, 6, :, None] * unit(read, 1e-4)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
