"""Row 7: the neural memory."""

import pytest
import torch
import torch.nn.functional as F

from tbf.ops.titan_scan import titan_scan
from tests.ops.reference import random_segments, titan_loop
from tests.parity.conftest import absolute, random, relative


@pytest.mark.parametrize("chunk_size", [1, 8, 16])
@pytest.mark.parametrize("packed", [False, True])
def test_against_the_autograd_loop(measured, chunk_size, packed):
    q, k, v = (random(2, 2, 50, 4, seed=i, dtype=torch.float64) for i in range(3))
    k = F.normalize(k, dim=-1)
    gates = [torch.sigmoid(random(2, 2, 50, seed=3 + i, dtype=torch.float64)) * 0.6 for i in range(3)]
    initial = random(2, 4, 4, seed=7, dtype=torch.float64)
    seg = random_segments(2, 50, 4 if packed else 1)
    got = titan_scan(q, k, v, *gates, seg, initial, chunk_size=chunk_size)
    expected = titan_loop(q, k, v, *gates, seg, initial, chunk_size)
    measured(7, f"memory scan, C={chunk_size}, FP64", "token loop with autograd", absolute(got, expected), 1e-12)


@pytest.mark.parametrize("chunk_size", [1, 8])
def test_against_titans_pytorch(measured, chunk_size):
    """Gates per token, gradients at the memory of the last finished batch of `chunk_size` tokens."""
    titans = pytest.importorskip("titans_pytorch", reason="titans-pytorch is not installed")
    torch.manual_seed(0)
    width, tokens = 8, 40
    memory = titans.NeuralMemory(
        dim=width, chunk_size=1, batch_size=chunk_size, heads=1, model=titans.MemoryMLP(width, depth=1), momentum=True,
        pre_rmsnorm=False, mem_model_norm_add_residual=False, default_step_transform_max_lr=0.1,
        store_memory_loss_fn=lambda read, target: (read - target).pow(2).sum(-1),
    )  # fmt: skip
    x = random(2, tokens, width)
    expected, _ = memory(x)
    q, k, v = (f(x)[:, None] for f in (memory.to_queries, memory.to_keys, memory.to_values))  # [B, 1, T, K]
    theta = 0.1 * torch.sigmoid(memory.to_adaptive_step[0](x)).mT
    eta, alpha = (torch.sigmoid(gate[0](x)).mT for gate in (memory.to_momentum, memory.to_decay_factor))
    initial = memory.memory_model_parameters[0]
    seg = torch.ones(2, tokens, dtype=torch.long)
    got = titan_scan(q, k, v, theta, eta, alpha, seg, initial, chunk_size=chunk_size)
    measured(7, f"memory scan, C={chunk_size}", "titans-pytorch NeuralMemory", relative(got[:, 0], expected), 1e-4)
