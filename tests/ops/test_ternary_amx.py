"""The AMX GEMM against the AVX512-VNNI one, bit by bit: both read the same operands."""

import pytest
import torch

from tbf.ops.ternary_native import INT8_ZERO_POINT, NativeTools, native_tools

pytestmark = pytest.mark.skipif(
    not getattr(native_tools(), "has_amx", False), reason="needs a processor with AMX, and a compiler"
)
SHAPES = [  # rows, columns, inner: edges of a tile, a strip, a block, and of the inner dimension's blocks
    *((1, 1, 1), (15, 17, 63), (16, 16, 64), (33, 31, 65), (32, 33, 130), (0, 16, 64), (16, 0, 64), (5, 7, 0)),
    *((257, 300, 100), (300, 257, 2048), (40, 48, 2049), (35, 20, 4200)),
]


def operand(rows: int, cols: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("low", [False, True], ids=["one part", "two parts"])
@pytest.mark.parametrize(("rows", "cols", "inner"), SHAPES)
def test_amx_equals_vnni(rows, cols, inner, low):
    tools: NativeTools = native_tools()
    right = tools.quantise_rows(operand(cols, inner, 0))[0].high[:, :inner]
    panels = tools.pack_rows(right, INT8_ZERO_POINT)
    one = torch.ones(())

    def products(left, amx, tiled):
        return tools.gemm(left, rows, panels, cols, inner, zero_point=INT8_ZERO_POINT, scale=one, tiled=tiled, amx=amx)

    by_row, _ = tools.quantise_gradient(
        [operand(rows, inner, 1)], one[None], None, low=low, rows=True, columns=True, tiled=True
    )
    _, by_column = tools.quantise_gradient(
        [operand(inner, rows, 2)], one[None], None, low=low, rows=True, columns=True, tiled=True
    )
    for left, tiled in ((by_row, False), (by_column, True)):
        expected = products(left, amx=False, tiled=tiled)
        torch.testing.assert_close(products(left, amx=True, tiled=tiled), expected, rtol=0, atol=0)
        assert inner == 0 or expected.abs().sum() > 0 or expected.numel() == 0


def test_nothing_but_cpu_memory_is_read():
    with pytest.raises(ValueError, match="read CPU memory"):
        native_tools().ternarise(torch.empty(4, 4, device="meta"))
