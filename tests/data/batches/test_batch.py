import dataclasses

import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from hstu.data.batches.batch import HSTUBatch
from hstu.data.sampling.sampler import SamplerPosition
from tests.data.collators import tensors_of
from tests.helpers import make_batch


def full_batch() -> HSTUBatch:
    """A batch in which every optional field is present."""
    batch = make_batch(
        [[3, 1, 3], [], [2, 1]],
        [[5, 4, 5], [], [1, 2]],
        {"age": [6, 0, 7]},
        task="retrieval",
        timestamp_lists=[[10, 20, 30], [], [40, 50]],
        negatives=[8, 9],
        draws=[[0, 1], [1, 1], [0, 0]],
        in_batch_pool=True,
        seen_lists=[[3, 1], [], [2]],
    )
    return dataclasses.replace(batch, position=SamplerPosition(1, 2))


def test_moving_moves_every_tensor_and_keeps_the_rest() -> None:
    batch = full_batch()
    moved = batch.to(torch.device("meta"), non_blocking=True)
    assert {tensor.device.type for tensor in tensors_of(moved).values()} == {"meta"}
    assert batch.labels.device.type == "cpu"
    assert moved.item_lengths is batch.item_lengths and moved.position == SamplerPosition(1, 2)
    assert isinstance(moved.features, KeyedJaggedTensor) and moved.features.length_per_key() == [2, 5, 5, 2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: pinning and streams")
def test_a_pinned_batch_is_copied_on_a_side_stream() -> None:
    batch, stream = full_batch().pin_memory(), torch.cuda.Stream()
    assert all(tensor.is_pinned() for tensor in tensors_of(batch).values())
    with torch.cuda.stream(stream):
        moved = batch.to(torch.device("cuda"), non_blocking=True)
    torch.cuda.current_stream().wait_stream(stream)
    moved.record_stream(torch.cuda.current_stream())
    for name, tensor in tensors_of(batch).items():
        assert torch.equal(tensor, tensors_of(moved)[name].cpu()), name
