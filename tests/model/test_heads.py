"""The prediction head: widths, activation, bias, type of the logits."""

import torch
import torch.nn.functional as F

from hstu.model.heads import MLP, PredictionHead


def test_activation_stands_between_layers_and_not_behind_the_last() -> None:
    head, x = PredictionHead(6, [5, 3], "gelu", bias=True), torch.randn(4, 6)
    first, _, last = head
    expected = F.linear(F.gelu(F.linear(x, first.weight, first.bias)), last.weight, last.bias)
    torch.testing.assert_close(head(x), expected)
    assert head(x).min() < 0


def test_without_bias_no_layer_has_one() -> None:
    assert [name for name, _ in PredictionHead(6, [5, 3], "relu", bias=False).named_parameters()] == [
        "0.weight",
        "2.weight",
    ]


def test_logits_are_float32_under_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert PredictionHead(6, [3], "relu", bias=True)(torch.randn(2, 6)).dtype == torch.float32
        assert MLP(6, [3], "relu")(torch.randn(2, 6)).dtype == torch.bfloat16


def test_one_seed_gives_one_head() -> None:
    def weights() -> list[torch.Tensor]:
        torch.manual_seed(3)
        return list(PredictionHead(6, [5, 3], "relu", bias=True).parameters())

    assert all(torch.equal(a, b) for a, b in zip(weights(), weights(), strict=True))
