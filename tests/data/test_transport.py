from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from hstu.data.transport import pack, unpack

DTYPES = st.sampled_from([torch.int64, torch.int32, torch.uint8, torch.float32, torch.bfloat16, torch.bool])


@given(st.lists(st.tuples(DTYPES, st.lists(st.integers(0, 5), max_size=3)), max_size=6))
def test_tensors_of_any_type_and_shape_arrive_as_they_were(kinds: list[tuple[torch.dtype, list[int]]]) -> None:
    sent = {n: torch.randint(0, 2, shape).to(dtype) for n, (dtype, shape) in enumerate(kinds)}
    received = unpack(pack([sent, "and", np.arange(3)]))
    assert received[1] == "and" and received[2].tolist() == [0, 1, 2]
    for n, tensor in sent.items():
        assert received[0][n].dtype == tensor.dtype and received[0][n].shape == tensor.shape
        assert torch.equal(received[0][n], tensor)


def test_a_keyed_jagged_tensor_keeps_what_it_knows_and_nothing_is_shared_with_the_sender() -> None:
    values = torch.arange(6)
    sent = KeyedJaggedTensor(
        keys=["a", "b"], values=values, lengths=torch.tensor([1, 2, 0, 3]), stride=2, length_per_key=[3, 3]
    )
    received = unpack(pack(sent))
    values += 10
    assert received.keys() == ["a", "b"] and received.stride() == 2 and received.length_per_key() == [3, 3]
    assert received["b"].values().tolist() == [3, 4, 5]
    assert received["a"].lengths().tolist() == [1, 2]


def test_all_tensors_are_slices_of_one() -> None:
    packed = pack([torch.arange(5), torch.ones(2, 2, dtype=torch.int32)])
    assert len(packed.tensor) == 128
    one, other = unpack(packed)
    assert one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() == packed.tensor.data_ptr()


def test_another_process_gets_the_very_memory_and_no_copy_of_it() -> None:
    packed = pack(torch.arange(1000))
    arrived = pickle.loads(pickle.dumps(packed))  # through /proc, as another process would
    assert len(pickle.dumps(packed)) < 1000
    arrived.tensor[:8] = 255
    assert packed.tensor[:8].tolist() == [255] * 8 and unpack(arrived).tolist()[1:] == list(range(1, 1000))


def test_memory_that_is_gone_is_told_as_a_lost_connection() -> None:
    sent = pickle.dumps(pack(torch.arange(5)))
    with pytest.raises(ConnectionError, match="gone"):
        pickle.loads(sent)


def test_no_file_stays_open() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        packed = pack(torch.arange(5))
        assert unpack(pickle.loads(pickle.dumps(packed))).tolist() == [0, 1, 2, 3, 4]
        del packed
    assert len(os.listdir("/proc/self/fd")) == before
