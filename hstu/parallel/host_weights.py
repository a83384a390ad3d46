"""Dense weights that are updated on the host, where the states of their optimizer are then too.

A step copies the gradients and the weights that this rank updates to pinned memory of the host, updates them there, and
copies the weights back. The weights are copied anew in each step because others change them on the device, such as the
load of a checkpoint. On a CPU the same copies are made within one memory.

torch's CPUOffloadPolicy of FSDP2 (2.13) does not serve here: it needs fully sharded weights, and keeps these on the
host between the layers, too. Source: Ren et al., ZeRO-Offload, USENIX ATC 2021, without its delayed update.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hstu.parallel.shards import ShardedView
from hstu.parallel.weight_shares import WeightShares


class WholeWeights(WeightShares):
    """Weights that each rank updates completely."""

    def __init__(self, weights: Mapping[str, nn.Parameter]) -> None:
        super().__init__(weights, {name: weight.detach() for name, weight in weights.items()})

    def gather(self) -> None:
        """Do nothing: this rank has updated all."""

    @contextmanager
    def lend(self, owned: Mapping[str, Tensor]) -> Iterator[None]:
        """See WeightShares."""
        self._swap(owned)
        try:
            yield
        finally:
            self._swap(owned)

    def view(self, name: str, owned: Tensor) -> Tensor:
        """See WeightShares."""
        return owned

    def _own_part(self, name: str, gradient: Tensor) -> Tensor:
        return gradient

    def _swap(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            weight = self.weights[name]
            weight.data, value.data = value.data, weight.data


class HostWeights(WeightShares):
    """``own`` are copies on the host of what this rank updates by ``shares``, which are on the device.

    They have the values of the weights from ``take_gradients`` to the next step.
    """

    def __init__(self, shares: WeightShares) -> None:
        on_host = {name: _pinned_like(own).copy_(own.detach()) for name, own in shares.own.items()}
        super().__init__(shares.weights, on_host)
        self._shares = shares
        self._device = next(iter(shares.own.values())).device
        self._gradients = {name: _pinned_like(own) for name, own in shares.own.items()}

    def take_gradients(self) -> None:
        """See WeightShares. The host waits for the gradients."""
        self._shares.take_gradients()
        with torch.no_grad():
            for name, on_device in self._shares.own.items():
                own, gradient = self.own[name], on_device.grad
                own.copy_(on_device, non_blocking=True)
                own.grad = None if gradient is None else self._gradients[name].copy_(gradient, non_blocking=True)
                on_device.grad = None
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def zero_grad(self) -> None:
        """See WeightShares."""
        super().zero_grad()
        self._shares.zero_grad()

    def gather(self) -> None:
        """See WeightShares."""
        with torch.no_grad():
            for name, on_device in self._shares.own.items():
                on_device.copy_(self.own[name], non_blocking=True)
        self._shares.gather()

    @contextmanager
    def lend(self, owned: Mapping[str, Tensor]) -> Iterator[None]:
        """See WeightShares. It takes the memory of ``owned`` on the device."""
        copies = {name: value.to(self._device, copy=True) for name, value in owned.items()}
        with self._shares.lend(copies):
            yield

    def view(self, name: str, owned: Tensor) -> Tensor | ShardedView:
        """See WeightShares."""
        return self._shares.view(name, owned)

    def _own_part(self, name: str, gradient: Tensor) -> Tensor:
        raise NotImplementedError("the shares on the device take the gradients")


def _pinned_like(tensor: Tensor) -> Tensor:
    """Memory of the host for a copy of ``tensor``; pinned, so that a GPU copies without another copy."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
