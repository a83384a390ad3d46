"""Trading a cheap computation in backward for the memory of its output."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class recomputed_in_backward(saved_tensors_hooks):
    """Operators run within this context do not keep ``output``, nor views of it: backward computes it again.

    ``output`` must be ``function(given)``, and ``given`` be kept by autograd anyway (or cost less than ``output``);
    ``function`` must be deterministic, without side effects. Once all that was not kept has been handed out, the
    recomputed tensor is let go.

        y = norm(x)
        with recomputed_in_backward(y, norm, x):
            z = linear(y)  # would keep y for the gradient of its weight
    """

    def __init__(self, output: Tensor, function: Callable[[Tensor], Tensor], given: Tensor) -> None:
        storage = output.untyped_storage().data_ptr()
        given = given.detach()
        device = given.device.type
        autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        again: list[Tensor] = []  # the recomputed output, while views of it are still to be handed out
        kept = handed_out = 0

        def pack(tensor: Tensor) -> Tensor | tuple[torch.Size, tuple[int, ...], int]:
            nonlocal kept
            if tensor.numel() == 0 or tensor.untyped_storage().data_ptr() != storage:
                return tensor
            kept += 1
            return tensor.size(), tensor.stride(), int(tensor.storage_offset())

        def unpack(packed: Tensor | tuple[torch.Size, tuple[int, ...], int]) -> Tensor:
            nonlocal handed_out
            if isinstance(packed, Tensor):
                return packed
            if not again:
                with torch.no_grad(), torch.autocast(device, enabled=autocast[0], dtype=autocast[1]):
                    again.append(function(given))
            view = again[0].as_strided(*packed)
            handed_out += 1
            if handed_out == kept:
                again.clear()
                handed_out = 0
            return view

        super().__init__(pack, unpack)
