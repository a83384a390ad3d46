"""Ranking: which tokens are scored, against which labels, with which loss."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hstu.config.args import RankingArgs
from hstu.model.ranking import RankingDense, task_labels
from hstu.model.stack import SequenceEncoder
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
