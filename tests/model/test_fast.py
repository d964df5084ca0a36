"""The fused encoder computes what the packed model computes, but for roundings that FP32 tips one way or the other."""

from __future__ import annotations

import copy
import ctypes

import pytest
import torch

from tbf.errors import ConfigError, HardwareError
from tbf.model.encoder import TormentedBertFrankenstein
from tbf.model.fast import make_fast
from tbf.ops import fast_native
from tests.model.conftest import ALL_MIXERS, MIXER_CASES, tiny_config
from tests.model.test_packed import packed_copy


def serves() -> bool:
    try:
        fast_native.fast_library()
    except HardwareError:
        return False
    return True


needs_fast = pytest.mark.skipif(not serves(), reason="no AVX512-VNNI or no C++ compiler here")
NORMS = {kind: {"norm_type": kind} for kind in ("rms", "layer_norm", "derf", "dynamic_tanh")}
ACTIVATIONS = {kind: {"ffn_activation": kind} for kind in ("relu2", "silu", "gelu", "swiglu", "geglu")}
CASES = {
    **MIXER_CASES,
    **{f"norm_{kind}": change for kind, change in NORMS.items()},
    **{f"ffn_{kind}": change for kind, change in ACTIVATIONS.items()},
    "one_rk4_step_of_two": {"layer_pattern": ["ode"], "ode_steps": 2},
    "titan_memory_of_long_chunks": {"layer_pattern": ["titan_attn"], "titan_memory": "linear", "titan_chunk_size": 64},
    "odd_widths": {**ALL_MIXERS, "num_layers": 6, "hidden_size": 36, "num_heads": 6, "retention_heads": 2,
                   "mamba_head_dim": 6, "mamba_state_size": 5, "ffn_hidden_size": 50, "mamba_conv_kernel": 3},
}  # fmt: skip
LENGTHS = (1, 7, 48, 49, 95, 150)  # blocks of queries end at 48, chunks of scans at 64


def pair(model: TormentedBertFrankenstein) -> tuple[TormentedBertFrankenstein, TormentedBertFrankenstein]:
    """A packed model, and the same made fast."""
    packed = packed_copy(model.eval())
    fast = copy.deepcopy(packed)
    make_fast(fast)
    return packed, fast


def rows(lengths: tuple[int, ...] = LENGTHS) -> dict[str, torch.Tensor]:
    """One document a row, padded."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.randint(5, 60, mask.shape, generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "attention_mask": mask.long()}


@needs_fast
@pytest.mark.parametrize("case", CASES)
def test_hidden_states_agree(case, lively):
    changes = {"use_bitnet": True, **CASES[case]}
    packed, fast = pair(lively(tiny_config(**changes)))
    inputs = rows()
    with torch.no_grad():
        expected, found = packed(**inputs).last_hidden_state, fast(**inputs).last_hidden_state
    real = inputs["attention_mask"].bool()
    difference = (found - expected)[real].abs()
    # Where no int8 rounding tips, FP32 noise is left; a tipped one moves a token by about 1/127 of one activation.
    assert difference.quantile(0.5) < 5e-6
    assert difference.max() < 0.05
    assert (found[~real] == 0).all()


@needs_fast
def test_python_and_cpp_lay_out_a_model_alike():
    library, _ = fast_native.fast_library()
    library.tbf_fast_sizes.restype = ctypes.c_int64
    mirrored = (fast_native.Linear, fast_native.Norm, fast_native.Layer, fast_native.Model)
    assert [ctypes.sizeof(each) for each in mirrored] == [library.tbf_fast_sizes(i) for i in range(4)]


@pytest.mark.parametrize(("rows", "inner"), [(1, 1), (16, 16), (17, 63), (50, 130)])
def test_two_bits_hold_what_was_packed(rows, inner):
    values = torch.randint(-1, 2, (rows, inner), dtype=torch.int8)
    quads = fast_native.pack_quads(values)
    assert quads.shape == (-(-rows // 16), -(-inner // 16), 64) and quads.is_contiguous()
    unpacked = torch.stack([quads >> 2 * i & 3 for i in range(4)], 2)  # [P, Q, 4, 64]
    whole = unpacked.view(len(quads), -1, 16, 4).transpose(1, 2).flatten(0, 1).flatten(1)  # [16 P, 16 Q]
    assert torch.equal(whole[:rows, :inner].to(torch.int8) - 1, values)
    assert not whole[rows:].any() and not whole[:, inner:].any()


@needs_fast
def test_packed_documents_are_taken_apart(lively):
    packed, fast = pair(lively(tiny_config(use_bitnet=True, **ALL_MIXERS)))
    ids, segments = torch.randint(5, 60, (3, 90)), torch.ones(3, 90, dtype=torch.long)
    segments[0, 30:], segments[0, 31:], segments[0, 80:] = 2, 3, 0
    segments[1, :], segments[2, 89:] = 0, 2
    with torch.no_grad():
        expected, found = (model(ids, segment_ids=segments) for model in (packed, fast))
    real = segments > 0
    assert (found.last_hidden_state - expected.last_hidden_state)[real].abs().quantile(0.5) < 5e-6
    cosines = torch.cosine_similarity(found.pooler_output, expected.pooler_output)[[0, 2]]
    assert cosines.min() > 0.999


@needs_fast
def test_the_number_of_threads_and_the_batch_change_nothing(lively):
    _, fast = pair(lively(tiny_config(use_bitnet=True, **ALL_MIXERS)))
    inputs, x0 = rows(), torch.randn(sum(LENGTHS), 32)
    model, before = fast.fast._described(256), torch.get_num_threads()
    edges = torch.tensor([0, *LENGTHS]).cumsum(0)

    def encode(threads: int, group_rows: int) -> torch.Tensor:
        torch.set_num_threads(threads)
        return fast_native.fast_encode(model, 2, x0, edges, group_rows)

    try:
        found = [encode(threads, size) for threads in (1, 2, 3) for size in (1, 100, 10_000)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(each, found[0]) for each in found)
    alone = fast_native.fast_encode(model, 2, x0[edges[3] : edges[4]], torch.tensor([0, LENGTHS[3]]), 100)
    assert torch.equal(alone, found[0][edges[3] : edges[4]])
    assert torch.equal(fast(**inputs).pooler_output, fast(**inputs).pooler_output)


@needs_fast
def test_logits_and_more_loops(lively):
    packed, fast = pair(lively(tiny_config(use_bitnet=True, num_loops=2, layer_pattern=["retnet"])))
    inputs = rows((9, 4))
    slots = {"masked_positions": torch.tensor([[1, 5], [2, 0]]), "masked_labels": torch.tensor([[7, 8], [9, -100]])}
    with torch.no_grad():
        expected, found = (model(**inputs, **slots, num_loops=3) for model in (packed, fast))
    torch.testing.assert_close(found.logits, expected.logits, rtol=0.02, atol=0.02)
    assert found.loss == pytest.approx(expected.loss.item(), abs=0.02)


@needs_fast
def test_no_row_has_a_token(lively):
    _, fast = pair(lively(tiny_config(use_bitnet=True)))
    empty = torch.zeros(2, 3, dtype=torch.long)
    assert (fast(empty, attention_mask=empty).last_hidden_state == 0).all()


@needs_fast
def test_what_is_not_finite_stays_so(lively):
    _, fast = pair(lively(tiny_config(use_bitnet=True, **ALL_MIXERS)))
    fast.embeddings.table.weight.data[7] = torch.nan
    ids = torch.tensor([[5, 7, 9], [5, 6, 9]])
    hidden = fast(ids).last_hidden_state
    assert hidden[0, 1].isnan().all()
    assert hidden[1].isfinite().all()


@needs_fast
@pytest.mark.parametrize(("changes", "cure"), [({}, "--format ternary"), ({"use_moe": True}, "experts")])
def test_models_that_cannot_be_made_fast(changes, cure):
    model = TormentedBertFrankenstein(tiny_config(use_bitnet=True, **changes))
    with pytest.raises(ConfigError, match=cure):
        make_fast(packed_copy(model) if changes else model)
    assert model.fast is None


def test_a_machine_without_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fast_native.fast_library.cache_clear()
    try:
        with pytest.raises(HardwareError, match="looked for no-such-compiler"):
            make_fast(packed_copy(TormentedBertFrankenstein(tiny_config(use_bitnet=True))))
    finally:
        fast_native.fast_library.cache_clear()


@needs_fast
def test_amx_and_vnni_give_the_same_bits(lively, monkeypatch):
    library, amx = fast_native.fast_library()
    if not amx:
        pytest.skip("no AMX here")
    _, fast = pair(lively(tiny_config(use_bitnet=True, **ALL_MIXERS)))
    inputs = rows()
    tiles = fast(**inputs).last_hidden_state
    monkeypatch.setattr(fast_native, "fast_library", lambda: (library, False))
    assert torch.equal(fast(**inputs).last_hidden_state, tiles)
