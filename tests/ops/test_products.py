"""Matrix products in bfloat16 on CPUs with and without instructions for them."""

import pytest
import torch

from hstu.ops.pytorch import operators as products


@pytest.mark.parametrize("has_instructions", [True, False])
def test_products_are_summed_in_float32_and_rounded_once(
    has_instructions: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "cpu_multiplies_bfloat16", lambda: has_instructions)
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(size).bfloat16() for size in ((70, 300), (40, 300), (40,)))
    exact = x.double() @ weight.double().t()
    for found, expected in (
        (products.matmul(x, weight.t()), exact),
        (products.linear(x, weight, bias), exact + bias.double()),
    ):
        assert found.dtype == torch.bfloat16
        # Half a unit in the last of 8 binary places, and what float32 sums add to it.
        torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-4)
