"""Tensors of which each rank holds a part: tensor-parallel parameters, and global views for checkpoints."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from hstu.ops.pytorch.row_update import sum_by_row


class ShardedView:
    """A global tensor, described by its size and the shards that this rank holds.

    Shards are live tensors. They need not be contiguous (a table without its padding columns), a rank may hold several
    (column-wise tables), and several ranks may hold the same one. ShardedTensor and DTensor each forbid one of these.
    The dunder methods implement torch.distributed._checkpointable, the protocol of torch.distributed.checkpoint.
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

    Gradients may be sparse. ``group``: the tensor-parallel group, or None. Returns the norm before clipping, a scalar
    on the device; the host does not wait for it. Megatron-core 0.16.1 has the same in optimizer/clip_grads.py, for
    dense CUDA tensors only.
    """
    sharded: list[Tensor] = []
    replicated: list[Tensor] = []
    for parameter in parameters:
        if parameter.grad is None:
            continue
        if parameter.grad.is_sparse:  # the norm is that of the sums of repeated rows
            rows, values = sum_by_row(parameter.grad)
            parameter.grad = torch.sparse_coo_tensor(rows[None], values, parameter.shape, check_invariants=False)
        kind = replicated if group is None or shard_dim(parameter) is None else sharded
        kind.append(numbers_of(parameter.grad))
    norm = torch.nn.utils.get_total_norm(replicated)
    if group is not None:
        square = torch.nn.utils.get_total_norm(sharded).square()
        dist.all_reduce(square, group=group)
        norm = (square + norm.square()).sqrt()
    torch._foreach_mul_([*sharded, *replicated], (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def numbers_of(gradient: Tensor) -> Tensor:
    """The numbers of a gradient; of a sparse one, those of the rows that it has."""
    return gradient._values() if gradient.is_sparse else gradient
