"""Matrix products in bfloat16 on CPUs with and without instructions for them."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hstu.config.args import NetworkArgs
from hstu.model.stack import FusedHSTULayer
from hstu.ops import products
from hstu.ops.self_check import small_layout


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


class Factors(TorchDispatchMode):
    """Records the dtypes of the factors of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.dtypes |= {arg.dtype for arg in args if isinstance(arg, torch.Tensor)}
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("has_instructions", [True, False])
def test_a_layer_multiplies_in_float32_where_the_cpu_lacks_bfloat16(
    has_instructions: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "cpu_multiplies_bfloat16", lambda: has_instructions)
    network = NetworkArgs(num_layers=1, hidden_size=16, num_attention_heads=2, kv_channels=8, dtype_str="bfloat16")
    layer = FusedHSTULayer(network, max_tokens=20)
    layout = small_layout(torch.device("cpu"))
    x = torch.randn(layout.num_tokens, 16, requires_grad=True)
    with Factors() as recorded, torch.autocast("cpu", dtype=torch.bfloat16):
        torch.add(*layer(x, layout)).sum().backward()
    assert recorded.dtypes == {torch.bfloat16 if has_instructions else torch.float32}
