"""One HSTU layer. Source: HSTU, arXiv 2402.17152, sec. 3."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hstu.config.args import NetworkArgs
from hstu.ops.attention import AttentionRule
from hstu.ops.backends import Backend
from hstu.ops.layer import LayerRule, LayerWeights, hstu_layer
from hstu.ops.layout import JaggedLayout
from hstu.ops.ranks import Ranks
from hstu.ops.relative_bias import NUM_TIME_BUCKETS


class RelativeAttentionBias(nn.Module):
    """Learned bias of a layer by distance and by time, shared by its heads. Initial values: N(0, 0.02²)."""

    def __init__(self, max_tokens: int) -> None:
        super().__init__()
        self.position_weight = nn.Parameter(torch.randn(2 * max_tokens - 1) * 0.02)
        self.time_weight = nn.Parameter(torch.randn(NUM_TIME_BUCKETS) * 0.02)


class HSTULayer(nn.Module):
    """x + W_o · Dropout(LayerNorm(attention) ⊙ U), with U, V, Q, K = SiLU(W_uvqk · LayerNorm(x) + b).

    The output of W_uvqk is laid out as [head, (u v q k), channel], for every tensor-parallel size: a shard holds
    whole heads (hstu.parallel.tensor cuts them, from outside). Initial values: W_uvqk N(0, 0.02²), its bias 0, W_o
    Xavier uniform, norms 1 and 0.

    Args:
        network: widths, dropout, mask and what to recompute in backward.
        max_tokens: tokens of the longest possible sequence, the divisor N unless ``scaling_seqlen`` is given.
        backend: kernels.
    """

    def __init__(
        self,
        network: NetworkArgs,
        max_tokens: int,
        backend: Backend = Backend.PYTORCH,
    ) -> None:
        super().__init__()
        self.network = network
        self.backend = backend
        self.attention_rule = AttentionRule(
            alpha=network.kv_channels**-0.5,
            scaling_seqlen=network.scaling_seqlen if network.scaling_seqlen > 0 else max_tokens,
            is_causal=network.is_causal,
            contextual_mask=not network.disable_contextual_mask,
        )
        inner = network.num_attention_heads * network.kv_channels

        self.input_norm = nn.LayerNorm(network.hidden_size, eps=network.norm_epsilon)
        self.uvqk = nn.Linear(network.hidden_size, 4 * inner)
        self.output_norm = nn.LayerNorm(inner, eps=network.norm_epsilon)
        self.out = nn.Linear(inner, network.hidden_size, bias=False)
        self.ranks = Ranks()
        """Where uvqk, output_norm and out hold only some of the heads: how to reach the ranks with the others."""
        self.bias: RelativeAttentionBias | None = None
        if network.position_encoding == "relative_bias":
            self.bias = RelativeAttentionBias(max_tokens)

        nn.init.normal_(self.uvqk.weight, std=0.02)
        nn.init.zeros_(self.uvqk.bias)
        nn.init.xavier_uniform_(self.out.weight)

    def forward(self, x: Tensor, layout: JaggedLayout) -> Tensor:
        """x: [T, D] → [T, D]."""
        network, bias = self.network, self.bias
        weights = LayerWeights(
            input_norm_weight=self.input_norm.weight,
            input_norm_bias=self.input_norm.bias,
            uvqk_weight=self.uvqk.weight,
            uvqk_bias=self.uvqk.bias,
            position_weight=None if bias is None else bias.position_weight,
            time_weight=None if bias is None else bias.time_weight,
            output_norm_weight=self.output_norm.weight,
            output_norm_bias=self.output_norm.bias,
            out_weight=self.out.weight,
        )
        rule = LayerRule(
            head_dim=network.kv_channels,
            attention=self.attention_rule,
            eps=network.norm_epsilon,
            dropout=network.hidden_dropout if self.training else 0.0,
            recompute_normalised=network.recompute_input_layernorm,
            recompute_activated=network.recompute_input_silu,
            recompute_all=network.recompute_layer,
            backend=self.backend,
            ranks=self.ranks,
        )
        return hstu_layer(x, weights, layout, rule)
