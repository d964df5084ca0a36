"""Rotary positions against the rotation written out."""

import torch

from tbf.ops.rope import apply_rope, rope_angles


def test_turns_pairs():
    torch.manual_seed(0)
    x = torch.randn(2, 9, 3, 8, dtype=torch.float64)
    cos, sin = rope_angles(9, 8, 10_000.0, x.device, x.dtype)
    angles = torch.arange(9)[:, None] * 10_000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)  # [T, K/2]
    c, s = angles.cos()[:, None], angles.sin()[:, None]
    expected = torch.empty_like(x)
    expected[..., 0::2] = x[..., 0::2] * c - x[..., 1::2] * s
    expected[..., 1::2] = x[..., 1::2] * c + x[..., 0::2] * s
    torch.testing.assert_close(apply_rope(x, cos, sin), expected)
    strided = x.transpose(-1, -2).contiguous().transpose(-1, -2)
    torch.testing.assert_close(apply_rope(strided, cos, sin), expected)
    odd = torch.cat([x[..., :1], x], -1)[..., 1:]  # starts in the middle of a pair of its storage
    torch.testing.assert_close(apply_rope(odd, cos, sin), expected)


def test_products_depend_on_distance_only():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)
    cos, sin = rope_angles(50, 16, 100.0, q.device, q.dtype)
    q, k = (apply_rope(t.expand(1, 50, 1, 16), cos, sin)[0, :, 0] for t in (q, k))
    products = q @ k.T
    for shift in (0, 3, 20):
        diagonal = products.diagonal(shift)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))


def test_far_positions_keep_single_precision():
    cos, sin = rope_angles(8192, 64, 10_000.0, torch.device("cpu"), torch.float32)
    exact = torch.tensor(8191.0, dtype=torch.float64) * 10_000.0 ** (-torch.arange(32, dtype=torch.float64) / 32)
    torch.testing.assert_close(cos[-1], exact.cos().float(), rtol=0, atol=1e-7)
    torch.testing.assert_close(sin[-1], exact.sin().float(), rtol=0, atol=1e-7)
