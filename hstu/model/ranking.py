"""RankingGR: predict the action of each labelled item."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hstu.config.args import RankingArgs
from hstu.data.batches.batch import HSTUBatch
from hstu.model.heads import MLP
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
        self.is_multi_task = args.prediction_head_arch[-1] == args.num_tasks
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
