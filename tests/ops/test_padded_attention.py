"""Attention on padded sequences equals that on jagged ones."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from hstu.ops.kernels import AttentionConfig, AttentionInputs, RelativeBias
from hstu.ops.layout import build_layout
from hstu.ops.pytorch import attention, padded_attention
from hstu.ops.pytorch.padded_attention import PaddedLayout


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(
    "mask",
    [{}, {"is_causal": False}, {"contextual_mask": False}, {"max_span": 3}, {"max_span": 2, "full_tokens": 3}],
    ids=str,
)
def test_padded_attention_equals_jagged_attention(mask: dict[str, int], has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths, candidates = np.array([5, 1, 9]), np.array([2, 0, 4])
    layout = build_layout(
        item_lengths=lengths,
        num_sequences=3,
        num_contextuals=2,
        num_candidates=candidates,
        tokens_per_item=2,
        target_group_size=2,
        device=torch.device("cpu"),
        item_times=torch.randint(0, 10**6, (15,), generator=generator).sort()[0],
    )
    sequence = np.repeat(np.arange(3), layout.seqlens)
    place = np.arange(layout.num_tokens) - np.repeat(layout.seqlens.cumsum() - layout.seqlens, layout.seqlens)
    padded = np.full((3, layout.seqlens.max()), layout.num_tokens)
    padded[sequence, place] = np.arange(layout.num_tokens)
    of_padded = PaddedLayout(
        **vars(replace(layout, cache={})),
        padded_tokens=torch.from_numpy(padded),
        places=torch.from_numpy(sequence * padded.shape[1] + place),
        history_ends=torch.from_numpy(layout.seqlens - candidates * 2),
    )
    q, k, v = torch.randn(3, layout.num_tokens, 2, 4, generator=generator)
    bias = RelativeBias(torch.randn(21, generator=generator), torch.randn(128, generator=generator))
    config = AttentionConfig(alpha=0.5, scaling_seqlen=10, **mask)  # type: ignore[arg-type]
    given = bias if has_bias else None
    expected = attention.forward(AttentionInputs(q, k, v, layout, config, given))
    found = padded_attention.forward(AttentionInputs(q, k, v, of_padded, config, given))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
