"""Small MLPs: prediction heads of one or several tasks, and projections between widths."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}


class MLP(nn.Sequential):
    """Linear layers with an activation (relu, gelu or silu) between them; Xavier uniform weights, zero biases."""

    def __init__(self, in_width: int, widths: Sequence[int], activation: str, bias: bool = True) -> None:
        layers: list[nn.Module] = []
        for before, after in pairwise((in_width, *widths)):
            layers += [_linear(before, after, bias), _ACTIVATIONS[activation]()]
        super().__init__(*layers[:-1])


class MultiTaskHead(nn.Module):
    """Heads of several tasks: tokens [M, hidden_size] → the outputs of all tasks side by side, float32 [M, .].

    A trunk is an MLP of ``hidden_widths`` with the activation after every layer. Each task applies a linear layer to
    the output of the trunks. ``sharing`` is one of:

    - shared: all tasks use one trunk. Trunk and linear layers form one MLP. ``num_experts`` has no effect.
    - mmoe: each task uses the weighted mean of ``num_experts`` trunks (experts). The weights are the softmax of one
      linear layer per task, without bias, applied to the token (Ma et al., KDD 2018). Needs ``hidden_widths``.
    - ple: as mmoe, but each task also has ``num_experts`` experts of its own (Tang et al., RecSys 2020, with one
      extraction layer: customized gate control).

    Initial values: as in :class:`MLP`.
    """

    def __init__(
        self,
        hidden_size: int,
        hidden_widths: Sequence[int],
        activation: str,
        bias: bool,
        task_widths: Sequence[int],
        sharing: str = "shared",
        num_experts: int = 1,
    ) -> None:
        super().__init__()
        self.task_widths = [*task_widths]
        self.trunk: MLP | _Mixture
        if sharing == "shared":
            self.trunk = MLP(hidden_size, [*hidden_widths, sum(task_widths)], activation, bias)
            return
        experts = num_experts, num_experts if sharing == "ple" else 0
        self.trunk = _Mixture([hidden_size, *hidden_widths], activation, bias, len(task_widths), experts)
        self.outputs = nn.ModuleList(_linear(hidden_widths[-1], width, bias) for width in task_widths)

    def forward(self, x: Tensor) -> Tensor:
        """Returns float32 outputs for any compute dtype."""
        if isinstance(self.trunk, MLP):
            return self.trunk(x).float()
        inputs = self.trunk(x).unbind(dim=1)
        return torch.cat([output(own).float() for output, own in zip(self.outputs, inputs, strict=True)], dim=1)


class _Mixture(nn.Module):
    """Tokens [M, first width] → weighted mean of experts per task, [M, tasks, last width].

    experts: numbers of shared experts, which come first, and of each task's own.
    """

    def __init__(
        self, widths: Sequence[int], activation: str, bias: bool, num_tasks: int, experts: tuple[int, int]
    ) -> None:
        super().__init__()
        self.num_tasks, (self.num_shared, self.num_own) = num_tasks, experts
        num_experts = self.num_shared + num_tasks * self.num_own
        self.experts = nn.ModuleList(_ExpertLayer(num_experts, *layer, bias) for layer in pairwise(widths))
        self.activation = _ACTIVATIONS[activation]()
        self.gates = _linear(widths[0], num_tasks * sum(experts), bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = x
        for layer in self.experts:
            hidden = self.activation(layer(hidden))
        weights = self.gates(x).unflatten(1, (self.num_tasks, -1)).softmax(dim=2)
        of_shared, of_own = weights.split([self.num_shared, self.num_own], dim=2)
        # Other tasks' experts get weight zero: one product with all experts is faster than one product per task.
        is_own = torch.eye(self.num_tasks, dtype=weights.dtype, device=weights.device).unsqueeze(-1)
        of_all = torch.cat([of_shared, (of_own.unsqueeze(2) * is_own).flatten(2)], dim=2)
        return torch.einsum("mte,emd->mtd", of_all, hidden)


class _ExpertLayer(nn.Module):
    """One linear layer of all experts as one batched product: [experts, M, in] or [M, in] → [experts, M, out]."""

    def __init__(self, num_experts: int, in_width: int, out_width: int, bias: bool) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.weight = nn.Parameter(torch.empty(num_experts, in_width, out_width))
        for weight in self.weight:
            nn.init.xavier_uniform_(weight)
        # One dimension, like every bias: weight decay applies to parameters with at least two.
        self.bias = nn.Parameter(torch.zeros(num_experts * out_width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 3:
            if self.bias is None:
                return torch.bmm(x, self.weight)
            return torch.baddbmm(self.bias.view(self.num_experts, 1, -1), x, self.weight)
        weight = self.weight.transpose(0, 1).flatten(1)  # [in, experts × out]: one product without copies of x
        outputs = x @ weight if self.bias is None else torch.addmm(self.bias, x, weight)
        return outputs.unflatten(1, (self.num_experts, -1)).transpose(0, 1)


def _linear(in_width: int, out_width: int, bias: bool) -> nn.Linear:
    linear = nn.Linear(in_width, out_width, bias=bias)
    nn.init.xavier_uniform_(linear.weight)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear
