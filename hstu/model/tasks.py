"""Ranking with user-defined tasks (RankingArgs.tasks): a head with outputs for each, and the sum of their losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from hstu.config.args import RankingArgs, RankingTaskArgs
from hstu.data.batches.batch import HSTUBatch
from hstu.data.features.values import PLAIN, LabelCodes
from hstu.model import task_losses
from hstu.model.heads import MultiTaskHead
from hstu.model.outputs import ModelOutput
from hstu.model.ranking import RankingModel
from hstu.model.stack import SequenceEncoder

_LOSSES = {
    "bce": task_losses.bce,
    "focal": task_losses.focal,
    "cross_entropy": task_losses.cross_entropy,
    "mse": task_losses.mse,
    "huber": task_losses.huber,
}


class RankingTask(nn.Module):
    """One ranking task. columns: row names of HSTUBatch.label_values. codes: what the values of its label mean."""

    positive: Tensor

    def __init__(self, args: RankingTaskArgs, columns: Sequence[str], codes: LabelCodes = PLAIN) -> None:
        super().__init__()
        self.args = args
        self.first_class = codes.first
        self.register_buffer("positive", torch.tensor(codes.positive, dtype=torch.float32), persistent=False)
        self._row = columns.index(args.label)

    def predictions(self, outputs: Tensor) -> Tensor:
        """Predictions for evaluation, float32 [M, output_width]: a logit, a logit per class, or the value."""
        return outputs * self.args.scale

    def labels(self, label_values: Tensor) -> Tensor:
        """Labels float32 [M]: 1 for positive and 0 for negative, or the value itself; NaN where missing."""
        labels = label_values[self._row]
        if self.args.kind != "binary":
            return labels
        if self.args.bit_mask is not None:
            is_positive = labels.nan_to_num().int() & self.args.bit_mask != 0
        elif self.args.positive_values is not None:
            is_positive = torch.isin(labels, self.positive.to(labels.device))
        else:
            is_positive = labels >= (1.0 if self.args.positive_from is None else self.args.positive_from)
        return torch.where(labels.isnan(), labels, is_positive.float())

    def weights(self, label_values: Tensor) -> Tensor:
        """float32 [M]: 1 for items with a label, 0 where it is missing."""
        return (~label_values[self._row].isnan()).float()

    def loss_sum(self, outputs: Tensor, batch: HSTUBatch) -> Tensor:
        """Loss summed over items times RankingTaskArgs.weight, a float32 scalar. outputs: [M, output_width]."""
        assert batch.label_values is not None
        args, weights = self.args, self.weights(batch.label_values)
        targets = (self.labels(batch.label_values) - self.first_class) / args.scale
        labels = torch.where(weights > 0, targets, 0.0)
        if args.loss_in_force == "pairwise":
            longest = max(1, int(batch.num_candidates_host.max(initial=0)))
            return args.weight * task_losses.pairwise_sum(outputs, labels, weights, batch.num_labels, longest)
        losses = _LOSSES[args.loss_in_force](outputs, labels)
        return args.weight * (losses * weights).sum()


class MultiTaskDense(RankingModel):
    """Ranking with RankingArgs.tasks: a sequence encoder and a head with outputs for each task on labelled items."""

    def __init__(
        self, encoder: SequenceEncoder, args: RankingArgs, columns: Sequence[str], codes: Sequence[LabelCodes]
    ) -> None:
        super().__init__()
        assert args.tasks is not None
        self.encoder = encoder
        self.head = MultiTaskHead(
            encoder.network.hidden_size,
            args.prediction_head_arch,
            args.prediction_head_act_type,
            args.prediction_head_bias,
            [task.output_width for task in args.tasks],
            args.task_sharing,
            args.num_experts,
        )
        self.tasks = nn.ModuleList(
            RankingTask(task, columns, meaning) for task, meaning in zip(args.tasks, codes, strict=True)
        )

    @property
    def each_task(self) -> list[RankingTask]:
        """``tasks``, typed."""
        return [cast(RankingTask, task) for task in self.tasks]

    def output(self, outputs: Tensor, batch: HSTUBatch) -> ModelOutput:
        """See RankingModel. Predictions of all tasks are concatenated."""
        losses = [
            task.loss_sum(output, batch) for task, output in zip(self.each_task, self._split(outputs), strict=True)
        ]
        return ModelOutput(
            loss_sum=torch.stack(losses).sum(),
            num_labels=batch.num_labels.sum(),
            logits=self._predictions(outputs),
        )

    def logits(self, tokens: Tensor) -> Tensor:
        """See RankingModel."""
        return self._predictions(self.of_head(tokens))

    def _split(self, outputs: Tensor) -> tuple[Tensor, ...]:
        return outputs.split(self.head.task_widths, dim=1)

    def _predictions(self, outputs: Tensor) -> Tensor:
        each = [task.predictions(output) for task, output in zip(self.each_task, self._split(outputs), strict=True)]
        return torch.cat(each, dim=1)
