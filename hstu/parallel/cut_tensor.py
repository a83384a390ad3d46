"""A tensor of which each rank holds some pieces, as a checkpoint sees it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


class CutTensor:
    """A whole size and this rank's pieces of it: live tensors, each with the place of its first element.

    Pieces may be views that are not contiguous (a table without the columns that only pad it), which ShardedTensor
    refuses, and several ranks may hold the same one. The methods in underscores are what
    torch.distributed.checkpoint asks of what it saves and loads (torch.distributed._checkpointable).
    """

    def __init__(self, size: Sequence[int], pieces: Iterable[tuple[Sequence[int], Tensor]]) -> None:
        self._size = torch.Size(size)
        self.pieces = {torch.Size(start): part.detach() for start, part in pieces if part.numel()}
        """Place of its first element in the whole → the piece."""

    @classmethod
    def whole(cls, tensor: Tensor) -> CutTensor:
        """A tensor that is here in one piece."""
        return cls(tensor.size(), [([0] * tensor.ndim, tensor)])

    def size(self) -> torch.Size:
        """Size of the whole."""
        return self._size

    def with_rows(self, rows: int) -> CutTensor:
        """The same memory as pieces of a tensor of another number of rows; rows beyond those are left out."""
        kept = [(start, part[: max(0, rows - start[0])]) for start, part in self.pieces.items()]
        return CutTensor((rows, *self._size[1:]), kept)

    def copy_from(self, whole: Tensor) -> None:
        """Overwrite the pieces by their parts of a whole tensor."""
        for start, part in self.pieces.items():
            source = whole
            for dim, first in enumerate(start):
                source = source.narrow(dim, first, part.shape[dim])
            part.copy_(source)

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, start),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(_chunk(start, part), TensorProperties.create_from_tensor(part), self._size),
            )
            for start, part in self.pieces.items()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [_chunk(start, part) for start, part in self.pieces.items()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self.pieces[index.offset]


def _chunk(start: torch.Size, part: Tensor) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(start, part.size())
