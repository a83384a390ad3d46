"""Where the dense part ends and the sharded tables begin: gradients wait here until all of a step are known.

Tables are updated inside their backward. The rows that were looked up are therefore cut off from the look-up, the dense
part is trained on them, in as many parts as there are micro-batches, and its gradients are handed back in one piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torchrec import JaggedTensor

from hstu.data.batch import POOL, HSTUBatch, MicroBatch
from hstu.model.gr_model import as_jagged


class Boundary:
    """The rows of one step. ``looked_up``: GRModel.look_up of ``batch``."""

    def __init__(self, looked_up: Mapping[str, JaggedTensor], batch: HSTUBatch) -> None:
        self._looked_up = looked_up
        self._batch = batch.computed
        self._leaves: dict[str, dict[tuple[int, int], Tensor]] = {feature: {} for feature in looked_up}

    def parts(self) -> Iterator[tuple[dict[str, JaggedTensor], HSTUBatch]]:
        """(rows to differentiate, batch) of each micro-batch, or of the whole batch where it has none."""
        if self._batch.micro:
            for part in self._batch.micro:
                yield self._rows_of(part), part.batch
            return
        rows = {
            feature: JaggedTensor(self._leaf(feature), lengths=jagged.lengths(), offsets=jagged.offsets())
            for feature, jagged in self._looked_up.items()
        }
        yield rows, self._batch

    @property
    def num_parts(self) -> int:
        """How many ``parts`` gives."""
        return len(self._batch.micro) or 1

    def gradients(self) -> list[Tensor]:
        """After backward of all parts: the gradients of the looked-up rows, whole, in the order of ``looked_up``."""
        return [self._gradient(feature) for feature in self._looked_up]

    def hand_back(self, gradients: list[Tensor]) -> Tensor:
        """A scalar whose backward is that of the look-ups, from ``gradients`` on."""
        rows = [jagged.values() for jagged in self._looked_up.values()]
        if not rows:  # nothing is left to do in it
            return self.keep_back()
        loss: Tensor = _HandBack.apply(gradients, *rows)
        return loss

    def keep_back(self) -> Tensor:
        """A scalar whose backward ends here: the tables hear nothing of the step."""
        return torch.zeros((), requires_grad=True, device=self._batch.device)

    def _rows_of(self, part: MicroBatch) -> dict[str, JaggedTensor]:
        keyed, rows = part.batch.features.to_dict(), {}
        for feature in self._looked_up:
            if feature == POOL:
                rows[feature] = as_jagged(self._leaf(feature))
            else:
                leaf, ids = self._leaf(feature, part.rows[feature]), keyed[feature]
                rows[feature] = JaggedTensor(leaf, lengths=ids.lengths(), offsets=ids.offsets())
        return rows

    def _leaf(self, feature: str, where: slice = slice(None)) -> Tensor:
        """These rows of a feature; asked for again (what all parts share), the same tensor."""
        rows, leaves = self._looked_up[feature].values(), self._leaves[feature]
        start, stop, _ = where.indices(len(rows))
        if (start, stop) not in leaves:
            leaves[start, stop] = rows.detach()[start:stop].requires_grad_()
        return leaves[start, stop]

    def _gradient(self, feature: str) -> Tensor:
        leaves = [leaf for _, leaf in sorted(self._leaves[feature].items())]
        parts = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class _HandBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, gradients: list[Tensor], *rows: Tensor) -> Tensor:
        ctx.gradients = gradients  # type: ignore[attr-defined]
        return rows[0].new_zeros(())

    @staticmethod
    def backward(ctx: FunctionCtx, *_: Any) -> tuple[Tensor | None, ...]:
        return (None, *ctx.gradients)  # type: ignore[attr-defined]
