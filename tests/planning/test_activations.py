from __future__ import annotations

import pytest
import torch
from torch import nn

from tbf.config import load_run_config
from tbf.model.config import UltraConfig
from tbf.planning import activations as module
from tbf.planning.activations import activations, replay
from tbf.planning.engine_state import Reduction
from tbf.planning.trace import Trace
from tbf.planning.visits import PieceTracer, Shape, trace_pieces
from tests.planning.whole_model import PLAN, shape_of, trace_whole

FEW = ["model.hidden_size=64", "model.num_heads=2", "model.retention_heads=2", "model.mamba_head_dim=32",
       "model.num_layers=4", "model.layer_pattern=[retnet, mamba, titan_attn, ode]",
       "data.seq_len=96", "data.vocab_size=512"]  # fmt: skip


@pytest.mark.parametrize(
    ("preset", "changes", "granularity"),
    [
        ("mini", [], "none"),
        ("mini", ["model.num_layers=2", "model.num_loops=3"], "layer"),
        ("mini", ["model.num_layers=2", "model.num_loops=3"], "loop"),
        ("mini", ["train.micro_batch_size=1", "data.seq_len=16"], "layer"),  # gradients outweigh activations
        ("mini_moe", ["model.ffn_hidden_size=64", "model.num_layers=2"], "layer"),
    ],
)
def test_the_replay_of_single_visits_is_the_whole_model(preset, changes, granularity):
    run = load_run_config(preset, [*FEW, *changes])
    run = run.replace(model={"vocab_size": 512})
    kept, peak = trace_whole(run, granularity)
    pieces = trace_pieces(run.model, shape_of(run), PLAN, checkpointed=granularity != "none", on_cuda=False)
    played = replay(run.model, pieces, granularity, loops=run.model.num_loops)
    assert played.kept == pytest.approx(kept, rel=2e-3)
    assert played.peak == pytest.approx(peak, rel=0.02)
    assert played.peak >= 0.999 * peak, "a plan must not promise less than what is needed"


def test_each_further_loop_keeps_one_hidden_state_per_visit_or_per_loop():
    run = load_run_config("mini", FEW)
    shape, state = shape_of(run), 4 * 8 * 96 * 64
    tracer = PieceTracer(on_cuda=False)

    def kept(granularity, loops):
        return activations(tracer, run.model, shape, PLAN, granularity, loops=loops).kept

    assert kept("layer", 4) - kept("layer", 3) == pytest.approx(4 * state, rel=0.01)
    assert kept("loop", 4) - kept("loop", 3) == pytest.approx(state, rel=0.01)


def test_what_cpu_checkpointing_keeps_is_on_the_host():
    run = load_run_config("mini", FEW)
    pieces = trace_pieces(run.model, shape_of(run), PLAN, checkpointed=True, on_cuda=False)
    here = replay(run.model, pieces, "layer", loops=2)
    there = replay(run.model, pieces, "layer", loops=2, host_offload=True)
    assert here.host == 0
    assert there.host == here.kept - there.kept == 7 * 4 * 8 * 96 * 64


def test_a_reduction_counts_once_what_lies_in_the_engines_own_bucket():
    one_layer = ["model.num_loops=1", "model.num_layers=1", "model.layer_pattern=[retnet]"]
    run = load_run_config("mini", [*FEW, *one_layer])
    pieces = trace_pieces(run.model, shape_of(run), PLAN, checkpointed=True, on_cuda=False)

    def peak(**reduction):
        return replay(run.model, pieces, "layer", loops=1, reduction=Reduction(bucket=1000, **reduction))

    large = 10**8  # what a reduction takes decides over the peak
    alone, with_bucket = peak(moment=large), peak(moment=large, collected=4000)
    assert alone.peak_at.endswith("reducing") and alone.handed == large
    assert peak().peak < alone.peak and peak(fills=500, moment=large).handed == large  # nothing is complete before it
    assert with_bucket.peak == alone.peak - 4000


def test_a_torch_that_cannot_trace_gets_an_estimate_of_the_same_order(monkeypatch, caplog):
    run = load_run_config("mini", ["data.seq_len=64"])
    shape = Shape(4, 64, 19)
    traced = activations(PieceTracer(on_cuda=False), run.model, shape, PLAN, "layer", loops=2)

    def broken(*_, **__):
        raise AttributeError("no FakeTensorMode")

    monkeypatch.setattr(PieceTracer, "pieces", broken)
    module._explain.cache_clear()
    estimated = [activations(PieceTracer(on_cuda=False), run.model, shape, PLAN, "layer", loops=2) for _ in range(2)]
    assert len([record for record in caplog.records if "no FakeTensorMode" in record.message]) == 1
    assert estimated[0].source == "estimated"
    assert traced.peak / 2 < estimated[0].peak < 2 * traced.peak
    flops = [sum(op.flops + op.integer_ops for op in each.forward) for each in (traced, estimated[0])]
    assert flops[0] > 0 and flops[1] > 0


def test_every_mixer_can_be_traced():
    config = UltraConfig(
        hidden_size=32, num_layers=6, num_heads=2, retention_heads=2, mamba_state_size=8, mamba_head_dim=16,
        factorized_embedding_dim=16, vocab_size=128, window=16,
        layer_pattern=("retnet", "titan_attn:local", "mamba", "ode", "standard_attn:local", "sigmoid_attn"),
    )  # fmt: skip
    pieces = trace_pieces(config, Shape(2, 32, 9), PLAN, checkpointed=False, on_cuda=False)
    assert len(pieces.layers) == 6
    assert all(visit.kept > visit.output for visit in pieces.layers.values())


def test_the_trace_agrees_with_torchs_memory_tracker():
    memory_tracker = pytest.importorskip("torch.distributed._tools.mem_tracker")
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))

    def step():
        for parameter in model.parameters():
            parameter.grad = None
        model(torch.ones(32, 64)).sum().backward()

    step()
    tracker = memory_tracker.MemTracker()
    tracker.track_external(model)
    with tracker:
        step()
    theirs = next(iter(tracker.get_tracker_snapshot("peak").values()))["Total"]
    held = sum(4 * parameter.numel() for parameter in model.parameters())
    with Trace() as trace:
        step()
    assert trace.peak + held == pytest.approx(theirs, rel=0.02)
