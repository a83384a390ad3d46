"""What data-parallel ranks share of the dense weights, as their optimizer sees it: each rank updates its elements."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from hstu.parallel.shards import ShardedView, local_part


class WeightShares(ABC):
    """Weights of which each rank updates some elements.

    A step: backward, ``take_gradients``, an update of ``own``, ``gather``.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], own: Mapping[str, Tensor]) -> None:
        """``own``: the elements of each weight that this rank updates, perhaps none, in the memory of the weight."""
        self.weights = dict(weights)
        self.own = {name: nn.Parameter(elements.detach()) for name, elements in own.items()}
        """Weight → the elements that this rank updates, with a gradient of their own."""

    def take_gradients(self) -> None:
        """After backward: give each of ``own`` its part of the gradient of the weight, in the same memory."""
        for name, own in self.own.items():
            gradient = self.weights[name].grad
            own.grad = None if gradient is None else self._own_part(name, local_part(gradient))

    def zero_grad(self) -> None:
        """Drop the gradients of the weights and of ``own``."""
        for weight in (*self.weights.values(), *self.own.values()):
            weight.grad = None

    @abstractmethod
    def gather(self) -> None:
        """After each rank has changed ``own``: update the weights. Collective."""

    @abstractmethod
    @contextmanager
    def lend(self, owned: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, parts of the model can be called, with other weights where ``owned`` has some: tensors like ``own``.

        Entering is collective. Leaving is not, so a rank that fails inside does not wait for others.
        """

    @abstractmethod
    def view(self, name: str, owned: Tensor) -> ShardedView:
        """A tensor of the size of a weight, of which this rank has ``owned``, a number for each of its ``own``."""

    @abstractmethod
    def _own_part(self, name: str, gradient: Tensor) -> Tensor:
        """Of what this rank has of the gradient of a weight, the part of its ``own``."""
