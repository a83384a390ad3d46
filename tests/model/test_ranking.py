"""Ranking: which tokens are scored, by which head, against which labels, with which loss.

The losses of tasks are compared with their formulas in float64, item by item, with gradients. Heads have widths, an
activation, a bias and the type of the logits, and of several tasks what they share.
"""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hstu.config.args import RankingArgs, RankingTaskArgs
from hstu.data.features.values import PLAIN, LabelCodes
from hstu.model.heads import MLP, MultiTaskHead
from hstu.model.ranking import LOSSES, RankingDense, RankingTask, task_labels
from hstu.model.stack import SequenceEncoder
from hstu.optim.optimizers import decayed_parameters
from tests.model.examples import Tables, gradients, make_batch, make_features, make_network, random_samples


def make_model(
    arch: list[int], num_tasks: int = 1, contextuals: int = 2, label_offset: int = 0, **changes: Any
) -> RankingDense:
    torch.manual_seed(0)
    return RankingDense(
        SequenceEncoder(make_network(**changes), make_features(contextuals)),
        RankingArgs(prediction_head_arch=arch, num_tasks=num_tasks),
        label_offset=label_offset,
    )


@pytest.mark.parametrize(("candidates", "interleave"), [(0, True), (2, True), (2, False)])
def test_logits_are_the_heads_at_the_labelled_items_in_the_order_of_the_labels(
    candidates: int, interleave: bool
) -> None:
    model = make_model([6, 3], num_tasks=3, interleave_actions=interleave)
    features = model.encoder.features
    samples = random_samples([4, 1, 3], contextuals=2, candidates=candidates)
    batch, tables = make_batch(samples, features, padding=1), Tables(features, 8, 8)
    output = model(tables(batch), batch)

    tokens, layout = model.encoder(tables(batch), batch)
    stride, expected, first = 1 + interleave, [], 0
    for sample, length in zip(samples, layout.seqlens, strict=False):
        items = range(len(sample.items) - sample.labels, len(sample.items))
        expected += [model.head(tokens[first + 2 + item * stride]) for item in items]
        first += int(length)
    assert output.logits is not None and output.logits.dtype == torch.float32
    torch.testing.assert_close(output.logits, torch.stack(expected))
    assert len(batch.labels) == len(expected)


def test_multi_task_loss_is_the_summed_cross_entropy_of_each_bit() -> None:
    model = make_model([3], num_tasks=3)
    logits, actions = torch.randn(4, 3), torch.tensor([0, 5, 2, 7])
    expected = 0.0
    for row, action in zip(logits.tolist(), actions.tolist(), strict=True):
        for task, logit in enumerate(row):
            probability = 1 / (1 + math.exp(-logit))
            expected -= math.log(probability if (action >> task) & 1 else 1 - probability)
    loss, by_task = model.loss_sum(logits, actions)
    assert float(loss) == pytest.approx(expected, rel=1e-5) and by_task is not None
    alone = [make_model([1]).loss_sum(logits[:, [bit]], actions >> bit) for bit in range(3)]
    assert by_task.tolist() == pytest.approx([float(loss) for loss, _ in alone]) and alone[0][1] is None
    assert task_labels(actions, 3).tolist() == [[0, 0, 0], [1, 0, 1], [0, 1, 0], [1, 1, 1]]


@pytest.mark.parametrize("offset", [0, 1])
def test_multi_class_loss_is_the_summed_cross_entropy_of_the_action(offset: int) -> None:
    model = make_model([5], label_offset=offset)
    logits, classes = torch.randn(4, 5), [0, 4, 2, 2]
    expected = -sum(float(row.log_softmax(0)[c]) for row, c in zip(logits, classes, strict=True))
    assert float(model.loss_sum(logits, torch.tensor(classes) + offset)[0]) == pytest.approx(expected, rel=1e-5)


def test_sums_of_two_half_batches_are_those_of_the_whole() -> None:
    model = make_model([4, 8])
    features = model.encoder.features
    samples, tables = random_samples([4, 2, 5, 1], contextuals=2), Tables(features, 8, 8)

    def run(part: list[Any], padding: int) -> Tensor:
        batch = make_batch(part, features, padding)
        loss: Tensor = model(tables(batch), batch).loss_sum
        return loss

    whole, first, second = run(samples, 0), run(samples[:3], 1), run(samples[3:], 3)
    torch.testing.assert_close(first + second, whole)
    assert whole.dtype == torch.float32


@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_a_batch_without_labels_has_loss_zero_and_gradients_of_zero(lengths: list[int]) -> None:
    model = make_model([4, 3], num_tasks=3, dtype_str="bfloat16")
    features = model.encoder.features
    batch, tables = make_batch(random_samples(lengths, contextuals=2), features, padding=2), Tables(features, 8, 8)
    output = model(tables(batch), batch)
    assert output.loss_sum.item() == 0
    output.loss_sum.backward()
    assert not any(gradient.any() for gradient in gradients(model).values())


def test_bfloat16_keeps_losses_and_logits_in_float32_and_close() -> None:
    outputs = {}
    for dtype in ("float32", "bfloat16"):
        model = make_model([6, 3], num_tasks=3, dtype_str=dtype)
        features = model.encoder.features
        batch, tables = make_batch(random_samples([6, 3], contextuals=2), features), Tables(features, 8, 8)
        outputs[dtype] = model(tables(batch), batch)
    exact, rounded = outputs["float32"], outputs["bfloat16"]
    assert rounded.loss_sum.dtype == rounded.logits.dtype == torch.float32
    torch.testing.assert_close(rounded.logits, exact.logits, rtol=0, atol=0.05)
    assert not torch.equal(rounded.logits, exact.logits)


ITEMS = 24
EXTREME = (-60.0, 60.0, 0.0)
"""Outputs at the begin of each case: no loss or gradient overflows there."""


def likelihood(logit: Tensor, is_positive: bool) -> Tensor:
    return 1 / (1 + (-logit if is_positive else logit).exp())


def bce(outputs: Tensor, label: float) -> Tensor:
    return -likelihood(outputs[0], label == 1).log()


def focal(outputs: Tensor, label: float) -> Tensor:
    probability = likelihood(outputs[0], label == 1)
    return -((1 - probability) ** 2) * probability.log()


def cross_entropy(outputs: Tensor, label: float) -> Tensor:
    return -(outputs[int(label)].exp() / outputs.exp().sum()).log()


def mse(outputs: Tensor, label: float) -> Tensor:
    return (outputs[0] - label) ** 2


def huber(outputs: Tensor, label: float) -> Tensor:
    error = (outputs[0] - label).abs()
    return 0.5 * error**2 if error <= 1 else error - 0.5


CASES: dict[str, tuple[Callable[[Tensor, float], Tensor], int, int]] = {
    "bce": (bce, 1, 2),
    "focal": (focal, 1, 2),
    "cross_entropy": (cross_entropy, 4, 4),
    "mse": (mse, 1, 0),
    "huber": (huber, 1, 0),
}
"""Loss → its formula, width of the outputs, number of classes (0: any number)."""


def outputs_of(width: int) -> Tensor:
    outputs = torch.randn(ITEMS, width, generator=torch.Generator().manual_seed(0)) * 3
    outputs[: len(EXTREME)] = torch.tensor(EXTREME)[:, None]
    return outputs.requires_grad_()


def labels_of(classes: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if classes:
        return torch.randint(classes, (ITEMS,), generator=generator).float()
    return 2 * torch.randn(ITEMS, generator=generator)


@pytest.mark.parametrize("name", CASES)
def test_losses_are_their_formulas(name: str) -> None:
    formula, width, classes = CASES[name]
    outputs, labels = outputs_of(width), labels_of(classes)
    losses = LOSSES[name](outputs, labels)
    exact = outputs.detach().double().requires_grad_()
    expected = torch.stack([formula(row, label) for row, label in zip(exact, labels.tolist(), strict=True)])
    compare(losses, outputs, expected, exact)


def compare(losses: Tensor, outputs: Tensor, expected: Tensor, exact: Tensor) -> None:
    """Values and gradients, each item with another weight."""
    weights = torch.linspace(0.5, 2, losses.numel()).view_as(losses)
    (gradient,) = torch.autograd.grad((losses * weights).sum(), outputs)
    (exact_gradient,) = torch.autograd.grad((expected * weights).sum(), exact)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-4, atol=1e-5)
    assert gradient.abs().max() > 0


def values(*columns: list[float]) -> Tensor:
    return torch.tensor(columns)


def task(codes: LabelCodes = PLAIN, **args: object) -> RankingTask:
    made = RankingTaskArgs(label="a", **args)  # type: ignore[arg-type]
    return RankingTask(made, ("a", "b"), codes)


def test_labels_of_binary_tasks_are_positive_by_threshold_or_bit_or_text() -> None:
    labels = values([0, 1, 2, 3, 6, torch.nan], [0.0] * 6)
    assert task().labels(labels)[:5].tolist() == [0, 1, 1, 1, 1]
    assert task(positive_values=[">= 2.5"]).labels(labels)[:5].tolist() == [0, 0, 0, 1, 1]
    assert task(positive_values=["& 4"]).labels(labels)[:5].tolist() == [0, 0, 0, 0, 1]
    assert task(positive_values=["&3"]).labels(labels)[:5].tolist() == [0, 1, 1, 1, 1]
    of_texts = task(LabelCodes(positive=(0, 3)), positive_values=["cart", "purchase"])
    assert of_texts.labels(labels)[:5].tolist() == [1, 0, 0, 1, 0]
    assert task(positive_values=["&3"]).labels(labels)[5].isnan() and of_texts.labels(labels)[5].isnan()


def test_items_without_a_label_do_not_count() -> None:
    batch: Any = SimpleNamespace(label_values=values([0, 1, torch.nan, 1], [0.0] * 4))
    assert float(task().loss_sum(torch.zeros(4, 1), batch)) == pytest.approx(3 * math.log(2))


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
