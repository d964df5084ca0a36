"""One forward and backward of a whole model under a trace, as the planner's replay should reproduce it."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tbf.config import RunConfig
from tbf.ops.ternary_backends import TernaryPlan
from tbf.planning.trace import Trace
from tbf.planning.visits import Shape, _fake_model, _fill_caches

PLAN = TernaryPlan("cpu_vnni", "cpu_vnni")


def shape_of(run: RunConfig) -> Shape:
    return Shape(run.train.micro_batch_size, run.data.seq_len, round(run.data.mask_rate * run.data.seq_len))


def trace_whole(run: RunConfig, granularity: str) -> tuple[int, int]:
    """(bytes kept after the forward pass, most bytes at once), beside parameters and ternary caches."""
    shape = shape_of(run)
    with FakeTensorMode(), Trace(record_work=False) as trace:
        model = _fake_model(run.model, trace, PLAN, on_cuda=False)
        model.set_activation_checkpointing(granularity)
        with torch.no_grad():
            _fill_caches(model)
        start = trace.now
        trace.reset_peaks()
        ids = torch.zeros(shape.rows, shape.tokens, dtype=torch.int64)
        slots = torch.zeros(shape.rows, shape.slots, dtype=torch.int64)
        output = model(
            ids, segment_ids=torch.ones_like(ids), masked_positions=slots, masked_labels=slots.clone(),
            loss_denominator=torch.ones(()),
        )  # fmt: skip
        kept = trace.now - start
        output.loss.backward()
        return kept, trace.peak - start
