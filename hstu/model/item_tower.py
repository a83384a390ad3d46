"""Item features other than the id: joined rows, and the tower that computes item vectors from id and features."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hstu.config.args import NetworkArgs
from hstu.config.args.network import SIDE_WIDTH
from hstu.data.batches.batch import NEGATIVES, POOL, HSTUBatch
from hstu.data.features.roles import FeatureRoles
from hstu.model.heads import MLP


def join_rows(names: Sequence[str], rows: Mapping[str, Tensor], list_lengths: Mapping[str, Tensor]) -> Tensor:
    """Join the feature rows of n items side by side: [n, number of names × width]. Lists are averaged.

    rows: feature → [n, width], or for a list [sum of list_lengths, width]. list_lengths: list → int64 [n].
    """
    joined = []
    for name in names:
        values = rows[name]
        if name in list_lengths:
            lengths = list_lengths[name]
            values = torch.segment_reduce(values, "mean", lengths=lengths, unsafe=True)  # checks would wait for the GPU
        joined.append(values)
    return torch.cat(joined, dim=1)


class ItemTower(nn.Module):
    """Vector of an item: the row of its id plus an MLP of its joined feature rows. Both are scaled by √E."""

    def __init__(self, network: NetworkArgs, roles: FeatureRoles) -> None:
        super().__init__()
        self.features, self.lists, self._all_lists = roles.tower, roles.tower_lists, roles.lists
        width = network.item_width
        self.scale = math.sqrt(width)
        self.projection = MLP(len(self.features) * SIDE_WIDTH, (width, width), "silu")

    def forward(self, rows: Tensor, of_features: Mapping[str, Tensor], list_lengths: Mapping[str, Tensor]) -> Tensor:
        """Vectors [n, E], not normalised. rows: of the ids, [n, E]; the rest as in :func:`join_rows`."""
        joined = join_rows(self.features, of_features, list_lengths)
        vectors: Tensor = rows * self.scale + self.projection(joined * self.scale)
        return vectors

    def list_lengths(self, batch: HSTUBatch, key: str) -> dict[str, Tensor]:
        """List → number of values for each item under ``key``: the item feature, NEGATIVES or POOL."""
        if key == POOL:
            assert batch.negatives.pool_features is not None
            return {name: batch.negatives.pool_features[name].lengths() for name in self.lists}
        is_negative = key == NEGATIVES
        lengths = batch.negatives.list_lengths if is_negative else batch.items.list_lengths
        names = self.lists if is_negative else self._all_lists
        return {} if lengths is None else {name: lengths[names.index(name)] for name in self.lists}
