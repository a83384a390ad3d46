"""A loss that is not finite: no table, no weight and no checkpoint sees the step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec import JaggedTensor

from hstu.config.errors import UserError
from hstu.data.batch import HSTUBatch
from hstu.parallel.collectives import gather_objects
from hstu.parallel.mesh import Mesh

_SHOWN_USERS = 5


class NonFiniteLoss(UserError):
    """Raised on all ranks alike."""


class LossCheck:
    """Looks at the loss of each step: on a CPU before backward, on a GPU after it, and before the dense step.

    A GPU is behind its host, which waits here for the forward while the backward is under way, so the device never
    waits. Tables are updated in backward, hence ``mask_rows``: a row's gradient is zero where the loss is not finite.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.after_backward = mesh.device.type == "cuda"
        self._finite: Tensor | None = None
        self._on_host: Tensor | None = None
        self._copied: torch.cuda.Event | None = None
        self._own_loss: Tensor | None = None
        self._batch: HSTUBatch | None = None

    def begin(self, own_loss: Tensor, mean_loss: Tensor, batch: HSTUBatch) -> None:
        """After forward. ``own_loss``: of this rank, ``mean_loss``: over the data-parallel ranks. Collective.

        Raises NonFiniteLoss unless that is for ``end`` to do.
        """
        flag = mean_loss.detach()
        if self.mesh.tp_size > 1:  # the ranks of a group compute the same loss each by itself
            flag = flag.clone()
            dist.all_reduce(flag, group=self.mesh.tp_group)
        self._finite, self._own_loss, self._batch = torch.isfinite(flag), own_loss.detach(), batch
        self._on_host = self._finite.to("cpu", non_blocking=True)  # page-locked, if it comes from a GPU
        if self._finite.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()
        if not self.after_backward:
            self.end()

    def end(self) -> None:
        """Before anything is done that lasts. Raises NonFiniteLoss, on all ranks alike."""
        if self._copied is not None:
            self._copied.synchronize()
        if self._on_host is not None and not self._on_host:
            raise NonFiniteLoss(self._report())

    def mask_rows(self, _module: nn.Module, inputs: tuple[Sequence[Mapping[str, JaggedTensor]], Any]) -> None:
        """A forward pre-hook of DenseModel: the gradients of looked-up rows are zero if the loss is not finite."""
        for part in inputs[0]:
            for looked_up in part.values():
                if looked_up.values().requires_grad:
                    looked_up.values().register_hook(self._zero_unless_finite)

    def _zero_unless_finite(self, gradient: Tensor) -> Tensor:
        assert self._finite is not None
        return torch.where(self._finite, gradient, 0)

    def _report(self) -> str:
        assert self._own_loss is not None and self._batch is not None
        users = self._batch.user_ids.tolist()[: self._batch.real_batch_size]
        told = gather_objects((float(self._own_loss), users), self.mesh.world_group)
        ranks = [_rank_in_words(rank, *of_rank) for rank, of_rank in enumerate(told) if not math.isfinite(of_rank[0])]
        return (
            f"the loss is not finite at iteration {self.mesh.progress.iteration}: "
            f"{'; '.join(ranks) or 'the sum over the ranks, on none of them'}. Nothing was updated by this step. Lower "
            "OptimizerArgs.learning_rate, warm up (LRScheduleArgs.warmup_iters), clip (TrainerArgs.max_grad_norm) or "
            "use float32"
        )


def _rank_in_words(rank: int, loss: float, users: Sequence[int]) -> str:
    shown = ", ".join(map(str, users[:_SHOWN_USERS]))
    more = ", …" if len(users) > _SHOWN_USERS else ""
    return f"{loss} on rank {rank}, whose batch has the users in rows {shown}{more} of the data"
