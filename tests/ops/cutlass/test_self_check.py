"""CUTLASS kernels are compared with PyTorch before their first use."""

import dataclasses

import pytest
import torch

from hstu.ops.kernels import Backend, KernelShapes
from hstu.ops.select import resolve_kernels
from hstu.ops.self_check import checks

GPU = torch.device("cuda", 0)


SHAPES = KernelShapes(64, 4, 64, 64, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="NEEDS AN NVIDIA GPU: the CUTLASS kernels are not run")
@pytest.mark.parametrize(("head_dim", "has_bias"), [(256, False), (64, True), (128, True)])
def test_all_kernels_pass(head_dim: int, has_bias: bool) -> None:
    shapes = KernelShapes(head_dim, 4, 64, 64, torch.bfloat16, has_bias)
    errors = {name: error for check in checks(Backend.CUTLASS, GPU, shapes) for name, error in check.measure().items()}
    assert len(errors) == 3 * 3
    assert all(error <= tolerance for error, tolerance in errors.values()), errors


def test_only_the_head_dim_and_dtype_of_the_run_are_checked() -> None:
    pytest.importorskip("cutlass", reason="nvidia-cutlass-dsl is not installed: the CUTLASS kernels are NOT checked")
    names = [check.case for check in checks(Backend.CUTLASS, GPU, SHAPES)]
    assert len(names) == 3 and all("64 channels, bfloat16" in name for name in names)
    with_bias = [check.case for check in checks(Backend.CUTLASS, GPU, dataclasses.replace(SHAPES, has_bias=True))]
    assert len(with_bias) == 3 and all("bfloat16" in name and ", bias" in name for name in with_bias)
    assert not list(checks(Backend.CUTLASS, GPU, dataclasses.replace(SHAPES, head_dim=256, has_bias=True)))


def test_the_log_names_what_cutlass_serves() -> None:
    def served(head_dim: int, *, has_bias: bool, has_window: bool = False) -> list[str]:
        shapes = KernelShapes(head_dim, 4, 64, 64, torch.bfloat16, has_bias, has_window)
        served_by = resolve_kernels(Backend.CUTLASS, shapes).served_by
        return [str(served_by[operator]) for operator in ("attention", "add_layer_norm")]

    others = "triton (cutlass: no kernel)"
    assert served(256, has_bias=False) == ["cutlass", others]
    assert served(128, has_bias=True) == ["cutlass", others]
    bias = "triton (cutlass: heads of 256 channels with a relative bias, not 32, 64, 128)"
    assert served(256, has_bias=True) == [bias, others]
    width = "triton (cutlass: heads of 50 channels, not 32, 64, 128, 256)"
    assert served(50, has_bias=False) == [width, others]
    window = "triton (cutlass: NetworkArgs.max_attention_span)"
    assert served(64, has_bias=False, has_window=True) == [window, others]
