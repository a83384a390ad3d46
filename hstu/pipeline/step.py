"""One training step, from the look-up in the tables to the moving average of the weights."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from hstu.data.batches.batch import NEGATIVES, POOL, HSTUBatch
from hstu.data.batches.train_batch import TrainBatch
from hstu.model.gr_model import GRModel
from hstu.optim.optimizers import Optimizers
from hstu.parallel.data_parallel import average_sparse_gradients, gradient_sync, own_gradients_finite
from hstu.parallel.group import look_up
from hstu.parallel.mesh import Mesh
from hstu.parallel.own_time import own_time
from hstu.parallel.shards import all_finite, numbers_of
from hstu.pipeline.finite import FiniteCheck, LossScale

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepResult:
    """One finished optimizer step."""

    losses: Tensor
    """Mean over the labelled tokens of the *global* batch, and its parts by task if there are several: float32
    [1 + tasks] on the device, equal on all ranks."""
    batch: HSTUBatch
    """This rank's batch, on the device. A resumed run continues at its ``position``."""
    grad_norms: Mapping[str, Tensor] = field(default_factory=dict)
    """If ``TrainStep.measures_norms``: global L2 norms before clipping, float32 scalars on the device, equal on all
    ranks. "grad_norm" is of the dense weights, "grad_norm_tables" of the rows of all tables, unless it was skipped."""

    @property
    def loss(self) -> Tensor:
        """The mean, a scalar."""
        return self.losses[0]


@dataclass(eq=False)
class TrainStep:
    """One optimizer step per call. All pipelines use it, and add only work that overlaps with it."""

    model: GRModel
    optimizers: Optimizers
    mesh: Mesh
    max_grad_norm: float = 0.0
    loss_scale: LossScale | None = None
    measures_norms: bool = False
    """Whether the next step measures ``StepResult.grad_norms``."""

    def __post_init__(self) -> None:
        self.check = FiniteCheck(self.mesh, self.loss_scale)

    def __call__(self, batch: TrainBatch, overlap: Callable[[], None] = lambda: None) -> StepResult:
        """Train on a batch that is on the device.

        ``overlap``: called once between the dense backward and the table backward; pipelines start overlapping work
        there. Raises NonFiniteStep on all ranks: see FiniteCheck.
        """
        self.optimizers.zero_grad()
        self.optimizers.tables.measure_gradients(self.measures_norms)

        # Look up rows of the sharded tables, for this rank or for its tp_cp group.
        rows = look_up(self.model, batch, self.mesh)

        # DDP and TorchRec average gradients over ranks. The local loss sum, divided by the labels of the global batch
        # and times the data-parallel size, therefore gives the gradient of a single process for any split of the batch.
        num_labels = torch.stack([part.num_labels.sum() for part in batch.parts]).sum().float()
        if self.mesh.dp_size > 1:
            dist.all_reduce(num_labels, group=self.mesh.dp_group)
        num_labels.clamp_(min=1.0)
        loss_weight = self.mesh.dp_size * (self.loss_scale.value if self.loss_scale else 1) / num_labels

        # Forward and backward of the dense part per micro-batch. Backward into the tables updates them,
        # so gradients stop at detached rows until the whole step's gradients exist.
        leaves = detach_rows(rows, batch.parts)
        sums: list[Tensor] = []
        own_time.start(self.mesh.device)
        for index, part in enumerate(batch.parts):
            is_last = index == len(batch.parts) - 1
            with gradient_sync(self.model.dense, is_last=is_last):
                output = self.model.dense(leaves[index], part)
                loss = output.loss_sum * loss_weight
                if is_last:
                    own_time.stop_after_backward(loss)
                loss.backward()
            sums.append(output.loss_sums)
            self.mesh.heartbeat.beat()
        row_gradients = collect_row_gradients(rows, leaves)

        # All ranks decide alike whether the step counts.
        finite = all_finite(row_gradients).logical_and(own_gradients_finite(self.model.dense))
        losses = self.check(sum(sums[1:], sums[0]), finite, batch.own) / num_labels
        overlap()
        if self.loss_scale is not None and not self._unscale(row_gradients, self.loss_scale):
            return StepResult(losses, batch.own)
        norms = {"grad_norm": self.optimizers.gradient_norm()} if self.measures_norms else {}

        # Backward into the sharded tables, which updates fused tables; exchange of replicated tables' gradients.
        if rows:
            torch.autograd.backward(list(rows.values()), self.check.mask(row_gradients))
        average_sparse_gradients(self.model.dense)
        if self.measures_norms:
            norms["grad_norm_tables"] = self.optimizers.tables.gradient_norm(self.mesh)

        # Clip and update the dense part; update the other tables and the moving average.
        if self.max_grad_norm > 0:
            self.optimizers.clip_grad_norm(self.max_grad_norm)
        self.optimizers.step(self.check.found_inf)
        return StepResult(losses, batch.own, norms)

    def _unscale(self, row_gradients: list[Tensor], loss_scale: LossScale) -> bool:
        """Unscale all gradients and update the loss scale. False: they overflow, skip the step."""
        scale = loss_scale.value
        loss_scale.update(self.check.overflowed)
        if self.check.overflowed:
            iteration, now = self.mesh.heartbeat.iteration, loss_scale.value
            log.info("gradients overflow at iteration %d: skipped, loss scale %g → %g", iteration, scale, now)
            return False
        weights = self.optimizers.dense.parameters.values()
        dense_gradients = [numbers_of(weight.grad) for weight in weights if weight.grad is not None]
        torch._foreach_mul_([*row_gradients, *dense_gradients], 1.0 / scale)
        return True


def detach_rows(rows: Mapping[str, Tensor], parts: Sequence[HSTUBatch]) -> list[dict[str, Tensor]]:
    """Rows [n, dim] per feature as autograd leaves per micro-batch. Negatives and pool share one leaf in all."""
    leaves: list[dict[str, Tensor]] = [{} for _ in parts]
    lengths = [dict(zip(part.features.keys(), part.features.length_per_key(), strict=True)) for part in parts]
    for feature, values in rows.items():
        if feature.partition(".")[0] in (NEGATIVES, POOL):
            pieces = [values.detach().requires_grad_()] * len(parts)
        else:
            sizes = [length[feature] for length in lengths]
            pieces = [piece.detach().requires_grad_() for piece in values.detach().split(sizes)]
        for leaf, piece in zip(leaves, pieces, strict=True):
            leaf[feature] = piece
    return leaves


def collect_row_gradients(rows: Mapping[str, Tensor], leaves: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
    """Gradient of each of ``rows`` after backward, from its leaves in all micro-batches."""
    gradients = []
    for feature in rows:
        pieces = dict.fromkeys(leaf[feature] for leaf in leaves)  # each leaf once
        grads = [torch.zeros_like(piece) if piece.grad is None else piece.grad for piece in pieces]
        gradients.append(grads[0] if len(grads) == 1 else torch.cat(grads))
    return gradients
