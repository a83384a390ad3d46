"""RankingGR: predict the action of each labelled item, or the labels of user-defined tasks (RankingArgs.tasks)."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hstu.config.args import RankingArgs, RankingTaskArgs
from hstu.data.batches.batch import HSTUBatch
from hstu.data.features.values import PLAIN, LabelCodes
from hstu.model.heads import MLP, MultiTaskHead
from hstu.model.stack import ModelOutput, SequenceEncoder, labelled_rows, mixed_precision


class RankingModel(nn.Module, ABC):
    """A sequence encoder and a head on the tokens of labelled items."""

    encoder: SequenceEncoder
    head: nn.Module

    def forward(self, embeddings: Mapping[str, Tensor], batch: HSTUBatch) -> ModelOutput:
        """Loss and predictions for labelled items. Each rank applies the head to its own tokens."""
        tokens, layout = self.encoder(embeddings, batch)
        rows, labels = labelled_rows(tokens, layout, batch, self.encoder.comm)
        outputs = self.encoder.comm.gather_rows(self._of_head(rows), labels.counts)
        loss, by_task = self.losses(outputs, batch)
        return ModelOutput(loss, logits=self.predictions(outputs), task_losses=by_task)

    @abstractmethod
    def losses(self, outputs: Tensor, batch: HSTUBatch) -> tuple[Tensor, Tensor | None]:
        """``ModelOutput.loss_sum`` and ``task_losses`` of the head's outputs for labelled items, float32 [M, .]."""

    def predictions(self, outputs: Tensor) -> Tensor:
        """``ModelOutput.logits`` of the head's outputs."""
        return outputs

    def logits(self, tokens: Tensor) -> Tensor:
        """Predictions as in ``ModelOutput.logits`` for tokens [M, D] of items."""
        return self.predictions(self._of_head(tokens))

    def _of_head(self, tokens: Tensor) -> Tensor:
        """Apply the head to tokens [M, D] in the network's compute dtype: float32 [M, .]."""
        with mixed_precision(self.encoder.network.dtype_str, tokens.device.type):
            outputs: Tensor = self.head(tokens)
        return outputs.float()


class RankingDense(RankingModel):
    """Ranking of the action feature: a sequence encoder and one head on the tokens of labelled items.

    The head's last width is num_tasks (one sigmoid per task, for bit t of the action) or the number of classes of one
    task. label_offset: action of class 0 (1 for ratings that start at 1).
    """

    def __init__(self, encoder: SequenceEncoder, args: RankingArgs, *, label_offset: int = 0) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = MLP(
            encoder.network.hidden_size,
            args.prediction_head_arch,
            args.prediction_head_act_type,
            args.prediction_head_bias,
        )
        self.num_tasks = args.num_tasks
        self.is_multi_task = not args.num_classes
        self.label_offset = label_offset

    def losses(self, outputs: Tensor, batch: HSTUBatch) -> tuple[Tensor, Tensor | None]:
        """See RankingModel."""
        return self.loss_sum(outputs, batch.labels)

    def loss_sum(self, logits: Tensor, actions: Tensor) -> tuple[Tensor, Tensor | None]:
        """``ModelOutput.loss_sum`` and ``task_losses``. logits: float32 [M, last]; actions: int64 [M]."""
        if not self.is_multi_task:
            return F.cross_entropy(logits, actions - self.label_offset, reduction="sum"), None
        labels = task_labels(actions, self.num_tasks)
        losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        return losses.sum(), losses.detach().sum(0) if self.num_tasks > 1 else None


def task_labels(actions: Tensor, num_tasks: int) -> Tensor:
    """Bit t of each action as the label of task t: int64 [M] → float32 [M, num_tasks]."""
    tasks = torch.arange(num_tasks, device=actions.device)
    return (actions[:, None] >> tasks & 1).float()


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
"""Functions of outputs float32 [M, width] and labels float32 [M], scaled and never missing: the loss per labelled item,
float32 [M]. None waits for the device."""


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


def why_not(device: torch.device) -> str | None:
    """Compile a small function on this device. Returns None if that works, otherwise the error."""
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(2, device=device))
    except Exception as error:  # no compiler, an old compiler, no directory for its files, …
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def compile_parts(task: nn.Module) -> list[str]:
    """Compile the MLPs and the ranking loss at their first call, for any number of rows. Returns their names."""
    found = {name: module for name, module in task.named_modules() if isinstance(module, MLP)}
    for module in found.values():
        module.compile(dynamic=True)
    names = [*found]
    if isinstance(task, RankingDense):
        task.loss_sum = torch.compile(task.loss_sum, dynamic=True)  # type: ignore[method-assign]
        names.append("loss")
    return names
