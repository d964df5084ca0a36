"""The CUDA kernels without a card: their own source run on the host, and compiled for sm_61."""

import ctypes
import re
import subprocess
from importlib import util
from pathlib import Path

import pytest
import torch

from tbf.errors import HardwareError
from tbf.ops import ternary_nvrtc as nvrtc
from tbf.ops.ternary_backends import CudaDp4a, CudaIntMm, TernaryWeight
from tbf.ops.ternary_build import BuildError, find_compiler
from tbf.ops.ternary_cuda import CudaTools, pad_rows, round_up
from tbf.ops.ternary_measure import FP64Products
from tbf.ops.ternary_reference import Quantised, ReferenceTools

REFERENCE = ReferenceTools()
# One tile and several, whole and with every kind of rest; the inner dimension over and under one step of 32.
SHAPES = [(1, 1, 1), (3, 5, 2), (16, 16, 16), (130, 36, 129), (65, 100, 40), (200, 64, 260)]


class HostLauncher:
    """Runs kernels through cuda_on_host.h, thread by thread."""

    descending = False

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def launch(self, name, grid, arguments, stream):
        pointers = (ctypes.c_void_p * len(arguments))(*[ctypes.addressof(argument) for argument in arguments])
        status = self._library.run_on_host(name.encode(), *grid, pointers, self.descending)
        assert status == 0, f"{name}: {['', 'unknown', 'threads disagree about a barrier'][status]}"


@pytest.fixture(scope="module")
def launcher(tmp_path_factory):
    try:
        compiler = find_compiler()
    except BuildError as error:
        pytest.skip(str(error))
    target = tmp_path_factory.mktemp("cuda") / "kernels.so"
    shim = Path(__file__).with_name("cuda_on_host.h")
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-w", "-x", "c++"]
    subprocess.run([*compiler, *flags, f'-DCUDA_SOURCE="{nvrtc.SOURCE}"', str(shim), "-o", str(target)], check=True)
    return HostLauncher(ctypes.CDLL(str(target)))


@pytest.fixture(params=["ascending", "descending"])
def tools(launcher, request):
    launcher.descending = request.param == "descending"
    return CudaTools(launcher)


def make(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_same(mine: Quantised, reference: Quantised, transpose: bool = False) -> None:
    torch.testing.assert_close(mine.scale, reference.scale, rtol=0, atol=0, equal_nan=True)
    for a, b in ((mine.high, reference.high), (mine.low, reference.low)):
        assert (a is None) == (b is None)
        if b is not None:
            b = b.T if transpose else b
            assert torch.equal(a, torch.nn.functional.pad(b, (0, round_up(b.shape[1]) - b.shape[1])))


@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (3, 600), (0, 8)])
@pytest.mark.parametrize("normed", [False, True])
def test_rows(tools, shape, normed):
    x, gain = make(0, *shape) * 3, make(1, shape[1]) if normed else None
    if shape[0] > 2:
        x[0, 1], x[1, 2], x[2] = torch.nan, -torch.inf, 0
    mine, rrms = tools.quantise_rows(x, gain, 1e-5)
    reference, want = REFERENCE.quantise_rows(x, gain, 1e-5)
    assert_same(mine, reference)
    if normed:
        torch.testing.assert_close(rrms, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("widths", [(1,), (33,), (40, 3, 21)])
@pytest.mark.parametrize("rows", [1, 67, 300])
@pytest.mark.parametrize("low", [False, True])
def test_gradients(tools, widths, rows, low):
    dys = [make(i, rows, n) * 1e-4 for i, n in enumerate(widths)]
    if rows == 67:
        dys[0][3, 0], dys[-1][5, -1], dys[0][:, 0] = torch.nan, torch.inf, 0
    scales, factor = torch.rand(len(widths)), torch.rand(rows)
    mine = tools.quantise_gradient(dys, scales, factor, low=low, rows=True, columns=True, transposed=True)
    reference = REFERENCE.quantise_gradient(dys, scales, factor, low=low, rows=True, columns=True)
    assert_same(mine[0], reference[0])
    assert_same(mine[1], reference[1], transpose=True)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("low", [False, True])
def test_products_at_the_extremes(tools, shape, low):
    m, k, n = shape
    generator = torch.Generator().manual_seed(0)
    high, rest, right = (
        torch.randint(-128, 128, (rows, k), dtype=torch.int8, generator=generator) for rows in (m, m, n)
    )
    high[0], right[0] = -128, -128
    scale, one = torch.rand(m, generator=generator), torch.rand((), generator=generator)
    left = Quantised(pad_rows(high), scale, pad_rows(rest) if low else None)
    got = tools.gemm(left, pad_rows(right), one)
    products = [(part.double() @ right.double().T).to(torch.int32) for part in (high, rest)]
    assert torch.equal(got, REFERENCE.scale_products(products[0], products[1] if low else None, scale, one))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("low", [False, True])
def test_whole_layer(launcher, shape, low):
    m, d, n = shape
    x, weight, dy = make(0, m, d), make(1, n, d), make(2, m, n)
    slices = (n,) if n < 4 else (n - 3, 3)
    backend, reference = CudaDp4a(CudaTools(launcher)), FP64Products(REFERENCE)
    parts = [REFERENCE.ternarise(part) for part in weight.split(slices)]
    values, scales = torch.cat([part for part, _ in parts]), torch.stack([scale for _, scale in parts])
    mine = TernaryWeight(
        slices, d, [backend.forward_operand(part) for part, _ in parts], backend.backward_operand(values), scales
    )
    theirs = TernaryWeight(slices, d, [part for part, _ in parts], values, scales)
    q, _ = backend.tools.quantise_rows(x)
    for i, size in enumerate(slices):
        assert torch.equal(
            backend.forward(q, mine.forward[i], scales[i], size, d),
            reference.forward(q, theirs.forward[i], scales[i], size, d),
        )
    dys = list(dy.split(slices, 1))
    got = backend.backward(dys, q, mine, low=low, need_x=True, need_w=True)
    want = reference.backward(dys, q, theirs, low=low, need_x=True, need_w=True)
    assert all(map(torch.equal, got, want))
    assert backend.backward(dys, q, mine, low=low, need_x=False, need_w=False) == (None, None)


@pytest.mark.parametrize("low", [False, True])
def test_int_mm_backend_pads_what_cublas_cannot_take(monkeypatch, low):
    calls = []

    def strict_int_mm(a, b):
        """CUDA's conditions (torch's Blas.cpp), and the one layout that cublasLt is sure to serve."""
        assert a.shape[0] > 16 and a.shape[1] % 8 == 0 and b.shape[1] % 8 == 0
        assert a.is_contiguous() and b.T.is_contiguous()
        calls.append(a.shape)
        return (a.double() @ b.double()).to(torch.int32)

    monkeypatch.setattr(torch, "_int_mm", strict_int_mm)
    backend, reference = CudaIntMm(REFERENCE), FP64Products(REFERENCE)
    x, dy = make(0, 5, 12), make(2, 5, 7)
    values, scale = REFERENCE.ternarise(make(1, 7, 12))
    mine = TernaryWeight((7,), 12, [backend.forward_operand(values)], backend.backward_operand(values), scale[None])
    theirs = TernaryWeight((7,), 12, [values], values, scale[None])
    q, _ = REFERENCE.quantise_rows(x)
    assert torch.equal(backend.forward(q, mine.forward[0], scale, 7, 12), reference.forward(q, values, scale, 7, 12))
    got = backend.backward([dy], q, mine, low=low, need_x=True, need_w=True)
    assert all(map(torch.equal, got, reference.backward([dy], q, theirs, low=low, need_x=True, need_w=True)))
    assert len(calls) == (5 if low else 3)


def needs_nvrtc() -> None:
    try:
        nvrtc.load_nvrtc()
    except HardwareError as error:
        pytest.skip(str(error))


def test_compiles_for_pascal_without_spills(tmp_path):
    needs_nvrtc()
    spec = util.find_spec("nvidia")
    ptxas = (
        [path for root in spec.submodule_search_locations for path in Path(root).glob("cuda_nvcc/bin/ptxas")]
        if spec
        else []
    )
    if not ptxas:
        pytest.skip("no ptxas (pip install nvidia-cuda-nvcc-cu12==12.6.85)")
    ptx = nvrtc.compile_source("compute_61").rstrip(b"\0")
    assert ptx.count(b"dp4a.s32.s32") >= 2 * 8 * 8 * 8  # both GEMMs: 8 steps of 8 x 8 products
    assert b"fma.rn.f32" not in ptx  # contraction would change roundings
    source = tmp_path / "kernels.ptx"
    source.write_bytes(ptx)
    report = subprocess.run(
        [str(ptxas[0]), "-v", "-arch=sm_61", str(source), "-o", str(tmp_path / "kernels.cubin")],
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    assert set(re.findall(r"entry function '(\w+)'", report)) == set(nvrtc.KERNELS)
    assert re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report) == [("0", "0")] * len(nvrtc.KERNELS)
    registers, shared = (list(map(int, re.findall(rf"(\d+) {what}", report))) for what in ("registers", "bytes smem"))
    assert 2 * 256 * max(registers) <= 64 * 1024 and 2 * max(shared) <= 96 * 1024  # two blocks per multiprocessor


def test_machine_code_is_kept(tmp_path, monkeypatch):
    needs_nvrtc()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code = nvrtc.cached_cubin("sm_61")
    assert code.startswith(b"\x7fELF")
    monkeypatch.setattr(nvrtc, "compile_source", lambda _: pytest.fail("compiled again"))
    assert nvrtc.cached_cubin("sm_61") == code
    assert not list(tmp_path.rglob("*.tmp"))


def test_errors_name_the_compilers_words(tmp_path, monkeypatch):
    needs_nvrtc()
    broken = tmp_path / "broken.cu"
    broken.write_text('extern "C" __global__ void f() { undeclared(); }')
    monkeypatch.setattr(nvrtc, "SOURCE", broken)
    with pytest.raises(HardwareError, match='identifier "undeclared" is undefined'):
        nvrtc.compile_source("sm_61")


def test_no_nvrtc_names_the_cure(monkeypatch):
    monkeypatch.setattr(nvrtc, "nvrtc_candidates", lambda: ["libnvrtc-absent.so"])
    nvrtc.load_nvrtc.cache_clear()
    with pytest.raises(HardwareError, match="install nvidia-cuda-nvrtc-cu12"):
        nvrtc.load_nvrtc()
    nvrtc.load_nvrtc.cache_clear()
