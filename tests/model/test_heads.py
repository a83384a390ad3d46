"""The prediction head: widths, activation, bias, type of the logits. Heads of several tasks: what they share."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hstu.model.heads import MLP, MultiTaskHead
from hstu.optim.dense import decayed_parameters


def test_activation_stands_between_layers_and_not_behind_the_last() -> None:
    head, x = MLP(6, [5, 3], "gelu"), torch.randn(4, 6)
    torch.testing.assert_close(head(x), head[2](F.gelu(head[0](x))))
    assert head(x).min() < 0


WIDTHS = [1, 3, 1]
"""Outputs of three tasks."""
SHARINGS = ("shared", "mmoe", "ple")


def multi_task_head(sharing: str, bias: bool = True) -> Any:
    torch.manual_seed(0)
    head = MultiTaskHead(6, [5, 4], "gelu", bias, WIDTHS, sharing, 2)
    for parameter in head.parameters():  # biases start at zero and would hide that they are used
        nn.init.normal_(parameter)
    return head


def read_by_a_task(head: Any, token: Tensor, task: int) -> Tensor:
    """The weighted mean of the experts that one task reads for one token, written as loops."""
    mixture = head.trunk
    own_first = mixture.num_shared + task * mixture.num_own
    experts = [*range(mixture.num_shared), *range(own_first, own_first + mixture.num_own)]
    scores = mixture.gates.weight.view(len(head.task_widths), len(experts), -1)[task]
    shares = torch.stack([torch.exp(score @ token) for score in scores])
    total = torch.zeros(head.outputs[task].in_features, dtype=token.dtype)
    for share, expert in zip(shares / shares.sum(), experts, strict=True):
        hidden = token
        for layer in mixture.experts:
            hidden = hidden @ layer.weight[expert]
            if layer.bias is not None:
                hidden = hidden + layer.bias.view(layer.num_experts, -1)[expert]
            hidden = F.gelu(hidden)
        total = total + share * hidden
    return total


def test_sharing_one_trunk_equals_an_mlp_that_ends_in_all_outputs() -> None:
    torch.manual_seed(3)
    head = MultiTaskHead(6, [5, 4], "relu", True, WIDTHS)
    torch.manual_seed(3)
    mlp, x = MLP(6, [5, 4, sum(WIDTHS)], "relu"), torch.randn(7, 6)
    assert torch.equal(head(x), mlp(x))


@pytest.mark.parametrize("sharing", ["mmoe", "ple"])
@pytest.mark.parametrize("bias", [True, False])
def test_mixed_experts_and_their_gradients_equal_loops_over_tokens_tasks_and_experts(sharing: str, bias: bool) -> None:
    head, x = multi_task_head(sharing, bias=bias).double(), torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    expected = [
        torch.stack([output(read_by_a_task(head, token, task)) for token in x])
        for task, output in enumerate(head.outputs)
    ]
    mixed = [output(own) for output, own in zip(head.outputs, head.trunk(x).unbind(1), strict=True)]
    torch.testing.assert_close(mixed, expected)
    torch.testing.assert_close(head(x), torch.cat(expected, dim=1).float())

    inputs = [x, *head.parameters()]
    weighted = [torch.randn_like(output) for output in expected]
    theirs = torch.autograd.grad(expected, inputs, weighted)
    ours = torch.autograd.grad(mixed, inputs, weighted)
    torch.testing.assert_close(ours, theirs)
    assert all(gradient.abs().sum() > 0 for gradient in ours)


@pytest.mark.parametrize("sharing", SHARINGS)
def test_weight_decay_applies_to_the_weights_of_a_head_and_not_to_its_biases(sharing: str) -> None:
    head = multi_task_head(sharing)
    decayed = {id(weight) for weight in decayed_parameters(head)}
    for name, parameter in head.named_parameters():
        assert (id(parameter) in decayed) == name.endswith("weight")


@pytest.mark.parametrize("sharing", SHARINGS)
def test_outputs_of_tasks_are_float32_under_autocast_and_gradients_reach_every_weight(sharing: str) -> None:
    head, x = multi_task_head(sharing), torch.randn(7, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = head(x)
    assert outputs.dtype == torch.float32
    for output, exact in zip(*(each.split(head.task_widths, dim=1) for each in (outputs, head(x))), strict=True):
        torch.testing.assert_close(output, exact, rtol=0.1, atol=0.1 * exact.abs().max().item())
    outputs.square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in head.parameters())


def test_experts_without_a_layer_are_refused() -> None:
    with pytest.raises(ValueError, match="hidden_widths is empty"):
        MultiTaskHead(6, [], "relu", True, WIDTHS, "mmoe", 2)
