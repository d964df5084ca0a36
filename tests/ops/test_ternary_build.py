"""The compiled kernels: bit-equal to eager torch, built once, and never missed when they can't be built."""

import ctypes
import logging
import multiprocessing
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tbf.ops import ternary_build as build
from tbf.ops.ternary_native import NativeTools, native_tools
from tbf.ops.ternary_reference import Quantised, ReferenceTools

REFERENCE = ReferenceTools()
needs_compiler = pytest.mark.skipif(native_tools() is None, reason="no C++ compiler here")
sizes = st.integers(0, 70)
BIG_CONTRASTS = torch.tensor([0.0, 1e-30, 1e-6, 1.0, 1e4, 1e20, float("nan"), float("inf")])


def make(seed: int, *shape: int) -> torch.Tensor:
    """Normal numbers, some rows of which are zero, tiny, huge or not finite."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    if seed % 2 and len(x):
        x = x * BIG_CONTRASTS[torch.randint(len(BIG_CONTRASTS), (len(x),), generator=generator)][:, None]
    return x


def assert_same(mine: Quantised | None, reference: Quantised | None) -> None:
    assert (mine is None) == (reference is None)
    if mine is not None:
        width = reference.high.shape[-1]
        torch.testing.assert_close(mine.scale, reference.scale, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(mine.high[..., :width], reference.high)
        assert (mine.low is None) == (reference.low is None)
        assert mine.low is None or torch.equal(mine.low[..., :width], reference.low)


@needs_compiler
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), sizes, st.integers(1, 150), st.booleans())
def test_rows(seed, m, d, normed):
    x, gain = make(seed, m, d), make(2 * seed, d) if normed else None
    mine, mine_rrms = native_tools().quantise_rows(x, gain, 1e-5)
    reference, rrms = REFERENCE.quantise_rows(x, gain, 1e-5)
    assert_same(mine, reference)
    finite = reference.scale.isfinite()
    assert torch.equal(mine.total[finite], reference.high.sum(1, dtype=torch.int32)[finite])
    if normed:
        torch.testing.assert_close(mine_rrms, rrms, rtol=0, atol=0, equal_nan=True)


@needs_compiler
@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 150))
def test_weights(seed, n, d):
    weight = make(seed, n, d)
    values, scale = native_tools().ternarise(weight)
    want, want_scale = REFERENCE.ternarise(weight)
    assert torch.equal(values, want)
    torch.testing.assert_close(scale, want_scale, rtol=0, atol=0, equal_nan=True)


@needs_compiler
@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 150), st.lists(sizes.filter(bool), min_size=1, max_size=3), st.booleans())
def test_gradients(seed, m, widths, low):
    dys = [make(seed + i, m, n) for i, n in enumerate(widths)]
    scales, factor = torch.rand(len(widths)), torch.rand(m)
    options = {"low": low, "rows": True, "columns": True}
    mine = native_tools().quantise_gradient(dys, scales, factor, **options)
    reference = REFERENCE.quantise_gradient(dys, scales, factor, **options)
    for a, b in zip(mine, reference, strict=True):
        assert_same(a, b)
    assert_same(native_tools().quantise_gradient(dys, scales, None, low=low, rows=False, columns=True)[1],
                REFERENCE.quantise_gradient(dys, scales, None, low=low, rows=False, columns=True)[1])  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_number_of_threads_changes_nothing(threads):
    tools, x, dy = native_tools(), make(0, 203, 132), make(2, 203, 76)
    before = torch.get_num_threads()

    def everything():
        rows, _ = tools.quantise_rows(x)
        gradients = tools.quantise_gradient(
            [dy], torch.ones(1), rows.scale, low=True, rows=True, columns=True, tiled=True
        )
        return [rows, *gradients], tools.ternarise(x)

    expected, expected_weight = everything()
    try:
        torch.set_num_threads(threads)
        got, weight = everything()
    finally:
        torch.set_num_threads(before)
    for a, b in zip(got, expected, strict=True):
        assert_same(a, b)
        assert torch.equal(a.total, b.total)
    assert all(map(torch.equal, weight, expected_weight))


@needs_compiler
def test_norm_backward():
    x, gain, dy = make(0, 33, 50), make(2, 50), make(4, 33, 50)
    x.requires_grad_()
    gain.requires_grad_()
    want = torch.autograd.grad(torch.nn.functional.rms_norm(x, (50,), gain, 1e-5), (x, gain), dy)
    _, rrms = REFERENCE.quantise_rows(x.detach(), gain.detach(), 1e-5)
    for tools in (native_tools(), REFERENCE):
        got = tools.norm_backward(dy, x.detach(), gain.detach(), rrms)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.WARNING, logger="tbf.ops.ternary_build")
    build.load_library.cache_clear()
    yield lambda: [record.getMessage() for record in caplog.records]
    build.load_library.cache_clear()


def test_no_compiler_is_said_once(said, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build.load_library() is None and build.load_library() is None
    assert len(said()) == 1
    assert "no C++ compiler found (looked for no-such-compiler); going on with slower eager torch" in said()[0]


def test_broken_compiler_is_said_with_its_error(said, tmp_path, monkeypatch):
    compiler = tmp_path / "broken"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "fatal error: no headers" >&2\nexit 1\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build.load_library() is None
    assert "can't build them (fatal error: no headers)" in said()[0]
    assert not list(tmp_path.rglob("build-*")) and not list(tmp_path.rglob("*.so"))


@needs_compiler
def test_without_openmp_one_thread_does(tmp_path, monkeypatch):
    compiler = tmp_path / "plain"
    compiler.write_text(
        '#!/bin/sh\nfor a in "$@"; do [ "$a" = -fopenmp ] && { echo "error: no OpenMP" >&2; exit 1; }; done\n'
        f'exec {shutil.which("g++") or "c++"} "$@"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    tools = NativeTools(ctypes.CDLL(str(build.build(tmp_path))))
    assert not tools._library.tbf_has_threads()
    x = make(0, 20, 30)
    assert_same(tools.quantise_rows(x)[0], REFERENCE.quantise_rows(x)[0])


@pytest.mark.skipif(not build.loaded_openmp(), reason="no OpenMP library is loaded")
def test_the_openmp_of_torch_goes_before_one_that_another_package_brought():
    import sentencepiece  # noqa: F401 - its wheel carries a libgomp, which sorts before torch's

    assert build.loaded_openmp().startswith(str(Path(torch.__file__).parent))


def build_slowly(folder: str) -> str:
    original = build._compile

    def slow(*args):
        with (Path(folder) / "builds").open("a") as log:
            log.write("x")
        time.sleep(0.3)
        original(*args)

    build._compile = slow
    return str(build.build(Path(folder)))


@needs_compiler
def test_processes_build_once_whatever_a_dead_one_left(tmp_path):
    target = build.build(tmp_path)
    assert target.exists() and build.build(tmp_path) == target
    target.unlink()
    assert target.with_suffix(".lock").exists()  # as a killed build leaves it
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        found = pool.map(build_slowly, [str(tmp_path)] * 2)
    assert found == [str(target)] * 2 and (tmp_path / "builds").read_text() == "x"


def test_a_cache_that_cannot_be_written_is_replaced(tmp_path, monkeypatch):
    (tmp_path / "tbf").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = build.cache_folder()
    assert os.access(folder, os.W_OK) and tmp_path not in folder.parents and build.cache_folder() == folder
