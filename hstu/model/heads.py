"""Small MLPs: the prediction head, and projections between widths."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}


class MLP(nn.Sequential):
    """Linear layers with an activation between them, none after the last.

    ``activation``: relu, gelu or silu. Initial values: Xavier uniform weights, zero biases.
    """

    def __init__(self, in_width: int, widths: Sequence[int], activation: str, bias: bool = True) -> None:
        layers: list[nn.Module] = []
        for before, after in zip((in_width, *widths), widths, strict=False):
            linear = nn.Linear(before, after, bias=bias)
            nn.init.xavier_uniform_(linear.weight)
            if bias:
                nn.init.zeros_(linear.bias)
            layers += [linear, _ACTIVATIONS[activation]()]
        super().__init__(*layers[:-1])


class PredictionHead(MLP):
    """The ranking head: [M, hidden_size] → logits [M, arch[-1]]."""

    def __init__(self, hidden_size: int, arch: Sequence[int], activation: str, bias: bool) -> None:
        super().__init__(hidden_size, arch, activation, bias)

    def forward(self, x: Tensor) -> Tensor:
        """Returns float32 logits, whatever the compute dtype."""
        logits: Tensor = super().forward(x)
        return logits.float()
