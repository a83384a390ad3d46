"""Rows of NumPy arrays that the ranks divide: sums over all rows, and exchanges that bring the rows of a key together.

Tensors are sent, on the device of the ranks. ``ALONE`` sends nothing: the same code then computes on all rows at once.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import ArrayLike
from torch import Tensor

from hstu.parallel.collectives import gather_copies, join_rows, reduce_scatter
from hstu.parallel.mesh import Mesh

_SAMPLES = 32
"""Values per rank that choose the ranges of ``by_value``. They are 1 MiB on 4,096 ranks."""


@dataclass(frozen=True)
class Exchange:
    """The ranks of a group. Every method is a collective of all of them."""

    group: dist.ProcessGroup | None = None
    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @classmethod
    def of(cls, mesh: Mesh) -> "Exchange":
        """All ranks of the run."""
        return cls(mesh.world_group, mesh.rank, mesh.world_size, mesh.device) if mesh.world_size > 1 else ALONE

    def total(self, values: ArrayLike, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> np.ndarray:
        """Combine the ranks' arrays, all of one shape, element by element."""
        array = np.asarray(values)
        if self.group is None:
            return array
        combined = torch.tensor(array, device=self.device)
        dist.all_reduce(combined, op, group=self.group)
        return on_host(combined)

    def mean(self, rows: np.ndarray) -> np.ndarray:
        """Mean of the rows of all ranks."""
        return np.asarray(self.total(rows.sum(axis=0)) / self.total(len(rows)))

    def gathered(self, rows: np.ndarray) -> np.ndarray:
        """All rows in rank order, on every rank."""
        if self.group is None:
            return rows
        counts = gather_copies(torch.tensor([len(rows)], device=self.device), self.group).flatten().tolist()
        return on_host(join_rows(self._on_device(rows), counts, self.group))

    def to_owners(self, owners: np.ndarray, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        """Send row i of each array to rank ``owners[i]``, int64 [n]. Returns the received rows in rank order."""
        if self.group is None:
            return arrays
        order, sent = np.argsort(owners, kind="stable"), np.bincount(owners, minlength=self.size)
        received = on_host(self.swap(self._on_device(sent)))
        found = []
        for array in arrays:
            rows = self._on_device(array[order])
            of_others = rows.new_empty((int(received.sum()), *rows.shape[1:]))
            dist.all_to_all_single(of_others, rows, received.tolist(), sent.tolist(), group=self.group)
            found.append(on_host(of_others))
        return tuple(found)

    def by_value(self, values: np.ndarray, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        """Divide rows by ``values`` [n] into ranges that ascend over the ranks. Equal values are on one rank."""
        if self.group is None:
            return (values, *arrays)
        count = min(_SAMPLES, len(values))  # at other quantiles on each rank, or most ranges would be narrow
        chosen = (np.arange(count) + (self.rank + 0.5) / self.size) * len(values) / max(1, count)
        samples = np.sort(self.gathered(np.sort(values)[chosen.astype(np.int64)]))
        bounds = samples[np.arange(1, self.size) * len(samples) // self.size] if len(samples) else samples
        return self.to_owners(np.searchsorted(bounds, values, side="right"), values, *arrays)

    def gather(self, rows: Tensor) -> Tensor:
        """Concatenate the ranks' tensors [n, …], all of one shape."""
        return rows if self.group is None else gather_copies(rows, self.group).flatten(0, 1)

    def swap(self, rows: Tensor) -> Tensor:
        """Send the n / size rows number r of a tensor [n, …] to rank r; return those of each rank, in rank order."""
        found = rows.clone()  # a fake process group leaves it so
        if self.group is not None:
            dist.all_to_all_single(found, rows, group=self.group)
        return found

    def summed(self, rows: Tensor) -> Tensor:
        """The n / size rows of this rank in the sum of the ranks' tensors [n, …]."""
        return rows if self.group is None else reduce_scatter(rows, self.group)

    def _on_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)


ALONE = Exchange()
"""This process has all rows."""


def on_host(tensor: Tensor) -> np.ndarray:
    """The numbers of a tensor without gradient, whose memory it shares on a CPU."""
    return tensor.cpu().numpy()
