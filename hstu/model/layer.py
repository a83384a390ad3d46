"""One HSTU layer in plain PyTorch, in the order of the paper (arXiv 2402.17152, sec. 3). Read this first.

Models run :class:`hstu.model.stack.FusedHSTULayer`, a subclass that computes the same with kernels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hstu.config.args import NetworkArgs
from hstu.ops.dropout import dropout
from hstu.ops.functional import hstu_attention
from hstu.ops.kernels import AttentionConfig, AttentionInputs, RelativeBias
from hstu.ops.layout import NUM_TIME_BUCKETS, JaggedLayout
from hstu.ops.pytorch.operators import REFERENCE_KERNELS


class RelativeAttentionBias(nn.Module):
    """Learned bias by distance and by time, shared by the heads of a layer. Initial values: N(0, 0.02²)."""

    def __init__(self, max_tokens: int) -> None:
        super().__init__()
        self.position_weight = nn.Parameter(torch.randn(2 * max_tokens - 1) * 0.02)
        self.time_weight = nn.Parameter(torch.randn(NUM_TIME_BUCKETS) * 0.02)


def layer_norm(network: NetworkArgs, width: int) -> nn.LayerNorm:
    """Build a norm of an HSTU layer. Without NetworkArgs.norm_affine its weight stays 1 and its bias 0."""
    norm = nn.LayerNorm(width, eps=network.norm_epsilon)
    if not network.norm_affine:
        hold_constant(norm, "weight", "bias")
    return norm


def hold_constant(module: nn.Module, *names: str) -> None:
    """Keep the values of weights that the model does not have, outside its parameters and state: kernels read them."""
    for name in names:
        value = module.get_parameter(name).detach()
        delattr(module, name)
        module.register_buffer(name, value, persistent=False)


class HSTULayer(nn.Module):
    """The update W_o · Dropout(LayerNorm(attention) ⊙ U) + b_o of x, with U, V, Q, K = SiLU(W_uvqk · LayerNorm(x) + b).

    The rows of W_uvqk are ordered [head, (u v q k), channel], so that a tensor-parallel shard holds whole heads.
    Initial values: W_uvqk N(0, 0.02²), W_o Xavier uniform, both biases 0, norms 1 and 0. NetworkArgs.uvqk_bias,
    output_bias and norm_affine decide whether b, b_o and the weights of the norms are learned or stay so.

    max_tokens: tokens of the longest possible sequence; the divisor N unless ``scaling_seqlen`` is set.
    """

    def __init__(self, network: NetworkArgs, max_tokens: int, index: int = 0) -> None:
        super().__init__()
        self.network = network
        inner = network.num_attention_heads * network.kv_channels
        self.input_norm = layer_norm(network, network.hidden_size)
        self.uvqk = nn.Linear(network.hidden_size, 4 * inner)
        self.output_norm = layer_norm(network, inner)
        self.out = nn.Linear(inner, network.hidden_size, bias=network.output_bias)
        self.bias = RelativeAttentionBias(max_tokens) if network.has_relative_bias else None
        self.attention_config = AttentionConfig(
            alpha=network.score_factor,
            scaling_seqlen=network.scaling_seqlen if network.scaling_seqlen > 0 else max_tokens,
            is_causal=network.is_causal,
            contextual_mask=not network.disable_contextual_mask,
            max_span=network.attention_spans[index],
            full_tokens=network.min_full_attention_tokens,
        )
        nn.init.normal_(self.uvqk.weight, std=0.02)
        nn.init.zeros_(self.uvqk.bias)
        if not network.uvqk_bias:
            hold_constant(self.uvqk, "bias")
        nn.init.xavier_uniform_(self.out.weight)
        if network.output_bias:
            nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, layout: JaggedLayout, update: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Add the previous layer's ``update`` to x, and return the sum and this layer's update, all [T, D].

        update: None for the first layer. The caller adds the update of the last layer.
        """
        x = x if update is None else x + update
        projected = F.silu(self.uvqk(self.input_norm(x)))
        u, v, q, k = projected.unflatten(1, (-1, 4, self.network.kv_channels)).unbind(2)  # [T, H, d] each
        bias = None if self.bias is None else RelativeBias(self.bias.position_weight, self.bias.time_weight)
        attended = hstu_attention(
            AttentionInputs(q, k, v, layout, self.attention_config, bias), REFERENCE_KERNELS.attention
        )
        gated = self.output_norm(attended.flatten(1)) * u.flatten(1)
        return x, self.out(dropout(gated, self.network.hidden_dropout, self.training))
