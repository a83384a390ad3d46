"""torch.compile for what is outside of our own autograd functions: perceptrons, and the loss of ranking.

Layers, concatenation, positions and the losses of retrieval are autograd functions around kernels; a compiler sees
nothing in them to fuse.
"""

from __future__ import annotations

import torch
from torch import nn

from hstu.model.heads import MLP
from hstu.model.ranking import RankingDense


def why_not(device: torch.device) -> str | None:
    """Why nothing can be compiled for this device, on which something is tried; None: it works."""
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(2, device=device))
    except Exception as error:  # no compiler, one that is too old, no place for its files, …
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def compile_parts(task: nn.Module) -> list[str]:
    """Compile them in place, at their first use, once for all numbers of rows; parameters keep their names.

    Returns what will be compiled, by name.
    """
    found = {name: module for name, module in task.named_modules() if isinstance(module, MLP)}
    for module in found.values():
        module.compile(dynamic=True)
    names = [*found]
    if isinstance(task, RankingDense):
        task.loss_sum = torch.compile(task.loss_sum, dynamic=True)  # type: ignore[method-assign]
        names.append("loss")
    return names
