"""How the ranks that share a layer reach each other; here one has it all, and nothing is exchanged."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Pending = Callable[[], Tensor]
"""An exchange that has begun: waits for it and returns its result."""


class Ranks:
    """A layer on one rank. :class:`hstu.parallel.tensor.GroupRanks`: on several, equally many heads on each.

    No gradient flows through what is exchanged: the layer's backward exchanges on its own.
    """

    rank = 0
    """Which of them this is; each drops out in a pattern of its own."""
    count = 1

    def gather(self, own: Tensor) -> Tensor:
        """A tensor of each rank [...], of one shape → [ranks, ...] on all."""
        return own.unsqueeze(0)

    def every_token(self, own: Tensor) -> Pending:
        """Begin to bring together rows of this rank's tokens: those of all tokens, in rank order."""
        return lambda: own

    def summed(self, shares: Tensor) -> Pending:
        """Begin to sum what each rank has for all tokens; the rows of this rank's tokens."""
        return lambda: shares

    def sum_over_heads(self, gradient: Tensor) -> Tensor:
        """Of a parameter that every rank used on its heads: the gradient of all of them."""
        return gradient

    def sum_over_tokens(self, gradient: Tensor) -> Tensor:
        """Of a parameter that every rank used on its tokens: the gradient of all of them."""
        return gradient
