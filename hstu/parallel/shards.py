"""Sharded tensors: global views for checkpoints, and gradient norms."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

from hstu.ops.row_update import sum_by_row


class ShardedView:
    """A global tensor, described by its size and this rank's live shards.

    Unlike with ShardedTensor or DTensor, shards need not be contiguous, a rank may hold several, and ranks may hold the
    same one. The dunder methods implement torch.distributed._checkpointable for torch.distributed.checkpoint.
    """

    def __init__(self, size: Sequence[int], shards: Iterable[tuple[Sequence[int], Tensor]]) -> None:
        """``size``: of the global tensor; ``shards``: (offset of the first element, shard) pairs."""
        self._size = torch.Size(size)
        self.shards = {torch.Size(offset): shard.detach() for offset, shard in shards if shard.numel()}
        """Offset of the first element in the global tensor → shard."""

    @classmethod
    def whole(cls, tensor: Tensor | ShardedView) -> ShardedView:
        """Return the view of a tensor that this rank holds completely; a view itself."""
        return tensor if isinstance(tensor, ShardedView) else cls(tensor.size(), [([0] * tensor.ndim, tensor)])

    def size(self) -> torch.Size:
        """Return the size of the global tensor."""
        return self._size

    def with_rows(self, rows: int) -> ShardedView:
        """Return the same memory as shards of a tensor with ``rows`` rows, without later rows."""
        kept = [(offset, shard[: max(0, rows - offset[0])]) for offset, shard in self.shards.items()]
        return ShardedView((rows, *self._size[1:]), kept)

    def copy_from(self, whole: Tensor) -> None:
        """Overwrite the shards with the corresponding parts of a global tensor."""
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


def swap_values(weights: Mapping[str, nn.Parameter], others: Mapping[str, Tensor]) -> None:
    """Exchange the memory of weights and other tensors, by name."""
    for name, other in others.items():
        weights[name].data, other.data = other.data, weights[name].data


def shard_dim(parameter: Tensor) -> int | None:
    """Return the dimension along which Megatron's attributes shard a parameter, or None if it is replicated."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return None
    return parameter.partition_dim  # type: ignore[attr-defined]


def global_view(shard: Tensor | ShardedView, dim: int, group: dist.ProcessGroup) -> ShardedView:
    """Return the tensor that ``group`` holds in equal shards along ``dim``. A shard may be sharded over other ranks."""
    own = ShardedView.whole(shard)
    size = list(own.size())
    begin = size[dim] * dist.get_rank(group)
    size[dim] *= dist.get_world_size(group)
    moved = [((*at[:dim], at[dim] + begin, *at[dim + 1 :]), piece) for at, piece in own.shards.items()]
    return ShardedView(size, moved)


def clip_grad_norm(parameters: Collection[nn.Parameter], max_norm: float, group: dist.ProcessGroup | None) -> Tensor:
    """Clip like torch.nn.utils.clip_grad_norm_, by the norm that ``gradient_norm`` returns. Returns it, too."""
    norm = gradient_norm(parameters, group)
    gradients = [numbers_of(parameter.grad) for parameter in parameters if parameter.grad is not None]
    torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def gradient_norm(parameters: Collection[nn.Parameter], group: dist.ProcessGroup | None) -> Tensor:
    """L2 norm of the gradients of global parameters, each counted once, as a scalar on the device. Collective.

    Gradients may be sparse, whose repeated rows are summed in place, or DTensors on one mesh. ``group``: the
    tensor-parallel group or None. The host does not wait.
    """
    kinds: dict[tuple[bool, bool], list[Tensor]] = {}
    """(is split over tensor-parallel ranks, is split over data-parallel ranks) → local gradient values."""
    data_group = None
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None:
            continue
        if gradient.is_sparse:  # the norm needs the sums of repeated rows
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
    return torch.stack(squares).sum().sqrt()


def numbers_of(gradient: Tensor) -> Tensor:
    """Return this rank's values of a gradient; for a sparse gradient, the values of its rows."""
    return gradient._values() if gradient.is_sparse else local_part(gradient)


def local_part(tensor: Tensor) -> Tensor:
    """Return the local shard of a DTensor, or any other tensor itself, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def view_of(whole: DTensor, shard: Tensor | None = None) -> ShardedView:
    """Return a view of a tensor that is split by rows like ``whole``; this rank's shard is ``shard`` or its own."""
    ranks = whole.device_mesh.size()
    begin = -(-whole.shape[0] // ranks) * whole.device_mesh.get_local_rank()
    return ShardedView(whole.size(), [((begin, *[0] * (whole.ndim - 1)), whole.to_local() if shard is None else shard)])


def all_finite(tensors: Iterable[Tensor]) -> Tensor:
    """Return whether all values are finite, as a bool scalar on the device. Uses sums, faster than isfinite."""
    sums = [tensor.sum(dtype=torch.float32) for tensor in tensors]
    return torch.stack(sums).sum().isfinite() if sums else torch.tensor(True)
