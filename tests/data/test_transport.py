from __future__ import annotations

import numpy as np
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
    assert len(packed.content) == 128
    one, other = unpack(packed)
    assert one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() == packed.tensor.data_ptr()
