"""The residual stream and its LayerNorm: both outputs and all gradients against float64, and the dtype of each."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hstu.ops.functional import add_layer_norm
from hstu.ops.kernels import AddLayerNormInputs, Backend
from tests.ops.backends import INTERPRETED, TRITON, device_of, kernels_of

BACKENDS = [TRITON] if INTERPRETED else [Backend.PYTORCH, TRITON]
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
EPS = 1e-2


def inputs(backend: Backend, rows: int, width: int, residual: torch.dtype, update: torch.dtype | None) -> list[Tensor]:
    """x, weight, bias and, unless its dtype is None, the update."""
    torch.manual_seed(width)
    x = torch.randn(rows, 2, width).to(residual)[:, 1]  # rows far apart
    tensors = [x, torch.randn(width), torch.randn(width)]
    if update is not None:
        tensors.append(torch.randn(rows, width).to(update))
    return [tensor.to(device_of(backend)).requires_grad_() for tensor in tensors]


def outputs(
    backend: Backend, dtype: torch.dtype, x: Tensor, weight: Tensor, bias: Tensor, *update: Tensor
) -> list[Tensor]:
    """The sum and its norm."""
    added = update[0] if update else None
    given = AddLayerNormInputs(x, added, weight, bias, EPS, dtype)
    return list(add_layer_norm(given, kernels_of(backend, len(weight)).add_layer_norm))


@pytest.mark.parametrize(("rows", "width"), [(5, 1), (5, 50), (5, 1000), (0, 8)])
@pytest.mark.parametrize(
    ("residual", "update"),
    [(FLOAT32, None), (FLOAT32, FLOAT32), (FLOAT32, BFLOAT16), (BFLOAT16, None), (BFLOAT16, BFLOAT16)],
    ids=str,
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_sum_norm_and_gradients_equal_float64(
    backend: Backend, residual: torch.dtype, update: torch.dtype | None, rows: int, width: int
) -> None:
    dtype = update or residual
    tensors = inputs(backend, rows, width, residual, update)
    exact = [tensor.detach().cpu().double().requires_grad_() for tensor in tensors]
    total = exact[0] + exact[3] if update else exact[0]
    out = outputs(backend, dtype, *tensors)
    # The norm is computed from the rounded sum, through which the gradient passes unchanged.
    rounded = total + (out[0].cpu().double() - total).detach()
    expected = [total, F.layer_norm(rounded, (width,), exact[1], exact[2], EPS)]
    slopes = [torch.randn(rows, width).to(kind) for kind in (residual, dtype)]
    right = torch.autograd.grad(expected, exact, [slope.double() for slope in slopes])

    assert [tensor.dtype for tensor in out] == [residual, dtype]
    ours = torch.autograd.grad(out, tensors, [slope.to(device_of(backend)) for slope in slopes])
    assert [gradient.dtype for gradient in ours] == [tensor.dtype for tensor in tensors]
    for computed, correct in zip([*out, *ours], [*expected, *right], strict=True):
        tolerance = 1e-5 if computed.dtype == FLOAT32 else 1e-2
        size = float(correct.detach().abs().max()) if correct.numel() else 0.0
        torch.testing.assert_close(computed.cpu().double(), correct, rtol=tolerance, atol=tolerance * max(size, 1.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_of_the_update_is_that_of_x_rounded_once(backend: Backend) -> None:
    tensors = inputs(backend, 5, 20, FLOAT32, BFLOAT16)
    total, normalized = outputs(backend, BFLOAT16, *tensors)
    grad_x, *_, grad_update = torch.autograd.grad(total.sin().sum() + normalized.float().sin().sum(), tensors)
    if INTERPRETED:  # it rounds towards zero
        torch.testing.assert_close(grad_update.float(), grad_x, rtol=2**-7, atol=0)
    else:
        assert torch.equal(grad_update, grad_x.bfloat16())


@pytest.mark.parametrize("backend", BACKENDS)
def test_recomputing_the_norm_from_the_sum_gives_the_same_bits(backend: Backend) -> None:
    for residual in (FLOAT32, BFLOAT16):
        x, weight, bias, update = inputs(backend, 9, 50, residual, BFLOAT16)
        total, normalized = outputs(backend, BFLOAT16, x, weight, bias, update)
        again, repeated = outputs(backend, BFLOAT16, total, weight, bias)
        assert torch.equal(total, again) and torch.equal(normalized, repeated)
