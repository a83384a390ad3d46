"""torch.compile for MLPs and the ranking loss. The rest is kernels, in which a compiler finds nothing to fuse."""

from __future__ import annotations

import torch
from torch import nn

from hstu.model.heads import MLP
from hstu.model.ranking import RankingDense


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
