"""Tensors of which each rank holds a part: global views for checkpoints, weights that ranks update in parts, norms."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

from hstu.ops.row_update import sum_by_row


class ShardedView:
    """A global tensor, described by its size and the shards that this rank holds.

    Shards are live tensors. They need not be contiguous, a rank may hold several, and several ranks may hold the same
    one: ShardedTensor and DTensor each forbid one of these. The dunder methods implement
    torch.distributed._checkpointable, the protocol of torch.distributed.checkpoint.
    """

    def __init__(self, size: Sequence[int], shards: Iterable[tuple[Sequence[int], Tensor]]) -> None:
        """``size``: of the global tensor; ``shards``: (offset of the first element, shard) pairs."""
        self._size = torch.Size(size)
        self.shards = {torch.Size(offset): shard.detach() for offset, shard in shards if shard.numel()}
        """Offset of the first element in the global tensor → shard."""

    @classmethod
    def whole(cls, tensor: Tensor) -> ShardedView:
        """A view of a tensor that this rank holds completely."""
        return cls(tensor.size(), [([0] * tensor.ndim, tensor)])

    def size(self) -> torch.Size:
        """Size of the global tensor."""
        return self._size

    def with_rows(self, rows: int) -> ShardedView:
        """The same memory as shards of a tensor with ``rows`` rows; rows beyond those are left out."""
        kept = [(offset, shard[: max(0, rows - offset[0])]) for offset, shard in self.shards.items()]
        return ShardedView((rows, *self._size[1:]), kept)

    def copy_from(self, whole: Tensor) -> None:
        """Overwrite the shards by the corresponding parts of a global tensor."""
        for offset, shard in self.shards.items():
            shard.copy_(whole[tuple(slice(start, start + n) for start, n in zip(offset, shard.shape, strict=True))])

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, TensorProperties.create_from_tensor(shard), self._size),
            )
            for chunk, shard in zip(self.__create_chunk_list__(), self.shards.values(), strict=True)
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offset, shard.size()) for offset, shard in self.shards.items()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self.shards[index.offset]


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


def shard_dim(parameter: Tensor) -> int | None:
    """The dimension along which Megatron's attributes say that a parameter is sharded; None if it is replicated."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return None
    dim: int = parameter.partition_dim  # type: ignore[attr-defined]
    return dim


def global_view(shard: Tensor | ShardedView, dim: int, group: dist.ProcessGroup) -> ShardedView:
    """The tensor of which each rank of ``group`` has an equal shard along ``dim``; it shares the shard's memory.

    A shard may itself be sharded over ranks of another group.
    """
    own = shard if isinstance(shard, ShardedView) else ShardedView.whole(shard)
    size = list(own.size())
    begin = size[dim] * dist.get_rank(group)
    size[dim] *= dist.get_world_size(group)
    moved = [((*at[:dim], at[dim] + begin, *at[dim + 1 :]), piece) for at, piece in own.shards.items()]
    return ShardedView(size, moved)


def clip_grad_norm(parameters: Collection[nn.Parameter], max_norm: float, group: dist.ProcessGroup | None) -> Tensor:
    """torch.nn.utils.clip_grad_norm_ by the L2 norm over the global parameters, each counted once.

    Gradients may be sparse, or DTensors, all on one mesh. ``group``: the tensor-parallel group, or None. Returns the
    norm before clipping, a scalar on the device; the host does not wait for it.
    """
    kinds: dict[tuple[bool, bool], list[Tensor]] = {}
    """(whether tensor-parallel ranks have parts, whether data-parallel ranks have parts) → numbers of gradients."""
    data_group = None
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None:
            continue
        if gradient.is_sparse:  # the norm is that of the sums of repeated rows
            rows, values = sum_by_row(gradient)
            gradient = torch.sparse_coo_tensor(rows[None], values, parameter.shape, check_invariants=False)
            parameter.grad = gradient
        if isinstance(gradient, DTensor):
            data_group = gradient.device_mesh.get_group()
        is_split = group is not None and shard_dim(parameter) is not None
        kinds.setdefault((is_split, isinstance(gradient, DTensor)), []).append(numbers_of(gradient))
    squares = []
    for (is_split, is_sharded), gradients in sorted(kinds.items()):
        square = torch.nn.utils.get_total_norm(gradients).square()
        for parts, ranks in ((is_split, group), (is_sharded, data_group)):
            if parts:
                dist.all_reduce(square, group=ranks)
        squares.append(square)
    norm = torch.stack(squares).sum().sqrt()
    torch._foreach_mul_([one for kind in kinds.values() for one in kind], (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def numbers_of(gradient: Tensor) -> Tensor:
    """The numbers of a gradient that this rank has; of a sparse one, those of the rows that it has."""
    return gradient._values() if gradient.is_sparse else local_part(gradient)


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, in the same memory: of a DTensor its shard, of any other tensor all."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def view_of(whole: DTensor, shard: Tensor | None = None) -> ShardedView:
    """A tensor that is cut along its first dimension as ``whole``, of which this rank has ``shard``, or its own."""
    ranks = whole.device_mesh.size()
    begin = -(-whole.shape[0] // ranks) * whole.device_mesh.get_local_rank()
    return ShardedView(whole.size(), [((begin, *[0] * (whole.ndim - 1)), whole.to_local() if shard is None else shard)])


def all_finite(tensors: Iterable[Tensor]) -> Tensor:
    """Whether all numbers are finite, as a bool scalar on the device, by their sum, which is faster than isfinite."""
    sums = [tensor.sum(dtype=torch.float32) for tensor in tensors]
    return torch.stack(sums).sum().isfinite() if sums else torch.tensor(True)
