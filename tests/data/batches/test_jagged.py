from typing import Any

import numpy as np
import pytest

from hstu.config.args import NetworkArgs
from hstu.data.batches.jagged import ranges, run_indices, run_offsets, run_starts, sequence_tokens


@pytest.mark.parametrize("lengths", [[], [0], [2, 0, 3], [0, 0, 1, 4]])
def test_every_element_has_its_run_and_its_index(lengths: list[int]) -> None:
    array = np.array(lengths, dtype=np.int32)
    runs = [list(range(begin, end)) for begin, end in zip(run_offsets(array), run_offsets(array)[1:], strict=False)]
    assert [len(run) for run in runs] == lengths
    assert run_starts(array).tolist() == run_offsets(array)[:-1].tolist()
    run, index = run_indices(array)
    assert [(r, i) for r, i in zip(run, index, strict=True)] == [
        (r, i) for r, n in enumerate(lengths) for i in range(n)
    ]
    starts = 10 * np.arange(len(array))
    assert ranges(starts, array).tolist() == [10 * r + i for r, n in enumerate(lengths) for i in range(n)]


def test_tokens_count_context_items_and_actions() -> None:
    tokens = sequence_tokens(np.array([5, 0, 1]), num_contextuals=3, tokens_per_item=2)
    assert tokens.tolist() == [3 + 10, 0, 3 + 2]  # an empty sequence has no context tokens either
    assert sequence_tokens(np.array([5]), num_contextuals=0, tokens_per_item=1).tolist() == [5]
    assert sequence_tokens(np.array([0, 0]), 3, 2, has_context=np.array([True, False])).tolist() == [3, 0]


@pytest.mark.parametrize(
    ("interleave", "has_actions", "expected"), [(True, True, 2), (True, False, 1), (False, True, 1)]
)
def test_an_action_is_a_token_of_its_own_if_interleaved(interleave: bool, has_actions: bool, expected: int) -> None:
    sizes: dict[str, Any] = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "kv_channels": 8}
    assert NetworkArgs(**sizes, interleave_actions=interleave).tokens_per_item(has_actions) == expected
