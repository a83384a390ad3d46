"""One HSTU layer. Source: HSTU, arXiv 2402.17152, sec. 3."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hstu.config.args import NetworkArgs
from hstu.model.recompute import recomputed_in_backward
from hstu.ops.attention import hstu_attention
from hstu.ops.backends import Backend
from hstu.ops.layer_norm import layer_norm
from hstu.ops.layout import JaggedLayout
from hstu.ops.norm_mul_dropout import SplitHeads, norm_mul_dropout
from hstu.ops.relative_bias import NUM_TIME_BUCKETS, RelativeBias
from hstu.ops.uvqk import activate, project_uvqk


class RelativeAttentionBias(nn.Module):
    """Learned bias of a layer by distance and by time, shared by its heads. Initial values: N(0, 0.02²)."""

    def __init__(self, max_tokens: int) -> None:
        super().__init__()
        self.position_weight = nn.Parameter(torch.randn(2 * max_tokens - 1) * 0.02)
        self.time_weight = nn.Parameter(torch.randn(NUM_TIME_BUCKETS) * 0.02)

    def forward(self) -> RelativeBias:
        """The tables, for :func:`hstu.ops.attention.hstu_attention`."""
        return RelativeBias(self.position_weight, self.time_weight)


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
        self.head_dim = network.kv_channels
        self.scaling_seqlen = network.scaling_seqlen if network.scaling_seqlen > 0 else max_tokens
        inner = network.num_attention_heads * network.kv_channels

        self.input_norm = nn.LayerNorm(network.hidden_size, eps=network.norm_epsilon)
        self.uvqk = nn.Linear(network.hidden_size, 4 * inner)
        self.output_norm = nn.LayerNorm(inner, eps=network.norm_epsilon)
        self.out = nn.Linear(inner, network.hidden_size, bias=False)
        self.split_heads: SplitHeads | None = None
        """Where uvqk, output_norm and out hold only some of the heads: how to reach the ranks with the others."""
        self.bias: RelativeAttentionBias | None = None
        if network.position_encoding == "relative_bias":
            self.bias = RelativeAttentionBias(max_tokens)

        nn.init.normal_(self.uvqk.weight, std=0.02)
        nn.init.zeros_(self.uvqk.bias)
        nn.init.xavier_uniform_(self.out.weight)

    def forward(self, x: Tensor, layout: JaggedLayout) -> Tensor:
        """x: [T, D] → [T, D]."""
        if self.network.recompute_layer and torch.is_grad_enabled():
            output: Tensor = checkpoint(self._forward, x, layout, use_reentrant=False)
            return output
        return self._forward(x, layout)

    def _forward(self, x: Tensor, layout: JaggedLayout) -> Tensor:
        network = self.network
        y = self._normalise(x)
        with self._maybe_recomputed(network.recompute_input_layernorm, y, self._normalise, x):
            u, v, q, k, projected = project_uvqk(y, self.uvqk, self.head_dim, self.backend)
        with self._maybe_recomputed(network.recompute_input_silu, u, self._activate, projected):
            attended = hstu_attention(
                q,
                k,
                v,
                layout,
                alpha=self.head_dim**-0.5,
                scaling_seqlen=self.scaling_seqlen,
                is_causal=network.is_causal,
                contextual_mask=not network.disable_contextual_mask,
                bias=None if self.bias is None else self.bias(),
                backend=self.backend,
            )
            gated = norm_mul_dropout(
                attended,
                u,
                self.output_norm.weight,
                self.output_norm.bias,
                eps=network.norm_epsilon,
                dropout=network.hidden_dropout,
                training=self.training,
                backend=self.backend,
                split_heads=self.split_heads,
            )
        return x + self.out(gated)

    def _normalise(self, x: Tensor) -> Tensor:
        """LayerNorm(x) in the type that the projection computes in, so that what backward keeps is this very tensor."""
        device, norm = x.device.type, self.input_norm
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return layer_norm(x, norm.weight, norm.bias, norm.eps, dtype, self.backend)

    def _activate(self, projected: Tensor) -> Tensor:
        return activate(projected, self.backend)

    def _maybe_recomputed(
        self, wanted: bool, output: Tensor, function: Callable[[Tensor], Tensor], given: Tensor
    ) -> recomputed_in_backward | nullcontext[None]:
        # Recomputing the layer covers all; the hooks of both would only keep each other's tensors.
        if wanted and not self.network.recompute_layer:
            return recomputed_in_backward(output, function, given)
        return nullcontext()
