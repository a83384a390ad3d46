"""Inputs of the model from numbers and vectors of items and events: transforms and flags for missing values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hstu.data.features.values import NUM_QUANTILES
from hstu.data.store.layout import NumberStatistics

_LEAST_STD = 1e-30


class NumberInputs(nn.Module):
    """ItemColumns.numbers → float32 [n, W + N]: W transformed values, then N flags that are 1 where one is missing.

    Each of the N numbers and vectors has its NumericFeatureArgs.transform, "standardize" by default. A missing one
    becomes 0. The statistics are buffers, so checkpoints contain the training data's statistics. Until
    ``load_statistics`` or a checkpoint sets them, the mean is 0 and the standard deviation 1.

    columns: number or vector → its columns in a batch.
    """

    columns: Tensor
    first: Tensor
    is_log: Tensor
    of_quantiles: Tensor
    shift: Tensor
    scale: Tensor
    quantiles: Tensor

    def __init__(self, columns: Mapping[str, range], transforms: Mapping[str, str]) -> None:
        super().__init__()
        self.transforms = {name: transforms.get(name, "standardize") for name in columns}
        widths = [len(places) for places in columns.values()]
        self.out_width = sum(widths) + len(widths)
        self._places: dict[str, range] = {}
        start = 0
        for name, width in zip(columns, widths, strict=True):
            self._places[name] = range(start, start + width)
            start += width
        kind = [self.transforms[name] for name, width in zip(columns, widths, strict=True) for _ in range(width)]
        self._has_logs = "log1p" in kind
        ranked = [place for place, transform in enumerate(kind) if transform == "quantile"]
        fixed = {
            "columns": torch.tensor([place for places in columns.values() for place in places]),
            "first": torch.tensor([places[0] for places in self._places.values()]),
            "is_log": torch.tensor([transform == "log1p" for transform in kind]),
            "of_quantiles": torch.tensor(ranked, dtype=torch.int64),
        }
        for name, values in fixed.items():
            self.register_buffer(name, values, persistent=False)
        self.register_buffer("shift", torch.zeros(start))
        self.register_buffer("scale", torch.ones(start))
        if ranked:
            self.register_buffer("quantiles", torch.linspace(-1, 1, NUM_QUANTILES).repeat(len(ranked), 1))

    @torch.no_grad()
    def load_statistics(self, statistics: Mapping[str, NumberStatistics]) -> None:
        """Set the statistics of the training data: number or vector → statistics."""
        row = 0
        for name, places in self._places.items():
            found, transform = statistics[name], self.transforms[name]
            here = slice(places.start, places.stop)
            if transform == "standardize":
                self._set(here, found.mean, found.std)
            elif transform == "log1p":
                assert found.log_mean is not None and found.log_std is not None, "check_numbers refuses vectors"
                self._set(here, [found.log_mean], [found.log_std])
            elif transform == "quantile":
                assert found.quantiles is not None, "check_numbers refuses vectors"
                self.quantiles[row] = torch.tensor(found.quantiles)
                row += 1

    def _set(self, places: slice, mean: Sequence[float], std: Sequence[float]) -> None:
        self.shift[places] = torch.tensor(mean)
        self.scale[places] = torch.tensor([1 / each if each > _LEAST_STD else 1.0 for each in std])

    def forward(self, numbers: Tensor) -> Tensor:
        """``numbers``: float32 [n, columns of a batch], NaN where missing."""
        values = numbers.index_select(1, self.columns).to(self.shift.dtype)
        missing = values.isnan()
        known = values.masked_fill(missing, 0)
        if self._has_logs:
            known = torch.where(self.is_log, known.sign() * known.abs().log1p(), known)
        transformed = (known - self.shift) * self.scale
        if len(self.of_quantiles):
            ranks = rank_among(known.index_select(1, self.of_quantiles).t().contiguous(), self.quantiles)
            transformed = transformed.index_copy(1, self.of_quantiles, ranks.t())
        flags = missing.index_select(1, self.first).to(transformed.dtype)
        return torch.cat([transformed.masked_fill(missing, 0), flags], dim=1)


def rank_among(values: Tensor, quantiles: Tensor) -> Tensor:
    """Fraction of values below each value, scaled to [-1, 1]; linear between quantiles, the middle of equal ones.

    values: [k, n]. quantiles: [k, Q], ascending, at equal steps of probability.
    """
    last = quantiles.shape[1] - 1
    left = torch.searchsorted(quantiles, values)
    right = torch.searchsorted(quantiles, values, right=True)
    below = quantiles.gather(1, (left - 1).clamp(0, last))
    above = quantiles.gather(1, left.clamp(0, last))
    # Nonzero for values strictly between two quantiles. Halving before subtracting avoids overflow.
    part = (values / 2 - below / 2) / (above / 2 - below / 2)
    between = torch.where(above > below, part, torch.zeros_like(part))
    place = torch.where(right > left, (left + right - 1) / 2, left - 1 + between)
    return place.clamp(0, last) * (2 / last) - 1
