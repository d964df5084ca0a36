from __future__ import annotations

import pytest

from tbf.errors import HardwareError
from tbf.hardware.probe import DeviceFacts, carries_kernels, check_device, peak_flops

CUDA_126 = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")
CUDA_130 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")


@pytest.mark.parametrize(
    ("capability", "archs", "runs"),
    [
        ((6, 1), CUDA_126, True),  # sm_60 kernels serve sm_61
        ((6, 1), CUDA_130, False),
        ((6, 0), ("sm_61",), False),  # not the other way round
        ((6, 1), ("compute_60",), True),  # older PTX is compiled at load time
        ((7, 0), CUDA_130, False),
        ((9, 0), (*CUDA_130, "sm_90a"), True),
        ((12, 0), CUDA_130, True),
        ((6, 1), (), False),
    ],
)
def test_kernels_are_matched_by_major_and_minor(capability, archs, runs):
    assert carries_kernels(capability, archs) is runs


def test_a_p40_with_a_cuda_13_torch_is_told_which_release_to_install():
    with pytest.raises(HardwareError, match=r"no kernels for Tesla P40 \(sm_61\).*torch==2.7.1") as caught:
        check_device(DeviceFacts("Tesla P40", (6, 1), CUDA_130, "2.14.1"))
    assert caught.value.exit_code == 5
    check_device(DeviceFacts("Tesla P40", (6, 1), CUDA_126, "2.14.1"))


def test_unknown_cards_have_no_peak():
    assert peak_flops("Tesla P40") == pytest.approx(11.76e12)
    assert peak_flops("Quadro 9000") is None
