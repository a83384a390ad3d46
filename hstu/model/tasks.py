"""Ranking with user-defined tasks (RankingArgs.tasks): a head with outputs for each, and the sum of their losses.

Losses map outputs float32 [M, width] and labels float32 [M] to the loss per labelled item, float32 [M]. Labels are
scaled (RankingTaskArgs.scale) and never missing. No function waits for the device.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hstu.config.args import RankingArgs, RankingTaskArgs
from hstu.data.batches.batch import HSTUBatch
from hstu.data.features.values import PLAIN, LabelCodes
from hstu.model.heads import MultiTaskHead
from hstu.model.ranking import RankingModel
from hstu.model.stack import SequenceEncoder

FOCAL_GAMMA = 2.0
"""Exponent of the focal loss (Lin et al., ICCV 2017)."""


def _focal(outputs: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy times (1 - p)^2, where p is the predicted probability of the label (Lin et al., ICCV 2017)."""
    missed = torch.sigmoid(torch.where(labels > 0, -outputs[:, 0], outputs[:, 0]))
    return missed**FOCAL_GAMMA * F.binary_cross_entropy_with_logits(outputs[:, 0], labels, reduction="none")


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bce": lambda outputs, labels: F.binary_cross_entropy_with_logits(outputs[:, 0], labels, reduction="none"),
    "focal": _focal,
    "cross_entropy": lambda outputs, labels: F.cross_entropy(outputs, labels.long(), reduction="none"),
    "mse": lambda outputs, labels: (outputs[:, 0] - labels).square(),
    "huber": lambda outputs, labels: F.huber_loss(outputs[:, 0], labels, reduction="none"),
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
        elif self.args.positive_texts is not None:
            is_positive = torch.isin(labels, self.positive.to(labels.device))
        else:
            is_positive = labels >= (1.0 if self.args.positive_from is None else self.args.positive_from)
        return torch.where(labels.isnan(), labels, is_positive.float())

    def loss_sum(self, outputs: Tensor, batch: HSTUBatch) -> Tensor:
        """Loss summed over items times RankingTaskArgs.weight, a float32 scalar. outputs: [M, output_width]."""
        assert batch.label_values is not None
        args, targets = self.args, self.labels(batch.label_values)
        weights = (~targets.isnan()).float()
        targets = (targets - self.first_class) / args.scale
        labels = torch.where(weights > 0, targets, 0.0)
        losses = LOSSES[args.loss_in_force](outputs, labels)
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

    def losses(self, outputs: Tensor, batch: HSTUBatch) -> tuple[Tensor, Tensor | None]:
        """See RankingModel."""
        losses = torch.stack([task.loss_sum(output, batch) for task, output in self._by_task(outputs)])
        return losses.sum(), losses.detach() if len(losses) > 1 else None

    def predictions(self, outputs: Tensor) -> Tensor:
        """See RankingModel. Those of all tasks are concatenated."""
        return torch.cat([task.predictions(output) for task, output in self._by_task(outputs)], dim=1)

    def _by_task(self, outputs: Tensor) -> Iterator[tuple[RankingTask, Tensor]]:
        return zip(self.each_task, outputs.split(self.head.task_widths, dim=1), strict=True)
