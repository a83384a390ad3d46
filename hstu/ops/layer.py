"""One HSTU layer as one autograd function, on one rank or with its heads on several.

    y = LayerNorm(x);  U, V, Q, K = split(SiLU(W_uvqk y + b));  out = x + W_o · Dropout(LayerNorm(attention) ⊙ U)

Each operator gives its forward and its backward; what is kept in between is decided here, in :class:`Kept`, and
nowhere else. Source: HSTU, arXiv 2402.17152, sec. 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hstu.ops.attention import AttentionRule, as_bias, attention_kernels
from hstu.ops.backends import Backend
from hstu.ops.layer_norm import normalise, normalise_backward
from hstu.ops.layout import JaggedLayout
from hstu.ops.norm_mul_dropout import GateRule, gate_kernels
from hstu.ops.ranks import Ranks
from hstu.ops.uvqk import activate, parts, project, through_silu


@dataclass(frozen=True)
class LayerRule:
    """What does not depend on the batch."""

    head_dim: int
    attention: AttentionRule
    eps: float
    dropout: float = 0.0
    """0 in evaluation."""
    recompute_normalised: bool = False
    recompute_activated: bool = False
    recompute_all: bool = False
    """Which fields of :class:`Kept` backward computes again; all: nothing but the input is kept."""
    backend: Backend = Backend.PYTORCH
    ranks: Ranks = field(default_factory=Ranks)


class LayerWeights(NamedTuple):
    """Parameters, in any type; those with heads are this rank's. The layout of rows is [head, (u v q k), channel]."""

    input_norm_weight: Tensor
    """[D]; the next its bias."""
    input_norm_bias: Tensor
    uvqk_weight: Tensor
    """[H · 4 · d, D]; the next its bias."""
    uvqk_bias: Tensor
    position_weight: Tensor | None
    """Of :class:`hstu.ops.relative_bias.RelativeBias`, and the next; None twice: no bias."""
    time_weight: Tensor | None
    output_norm_weight: Tensor
    """[H · d]; the next its bias."""
    output_norm_bias: Tensor
    out_weight: Tensor
    """[D, H · d]."""


@dataclass
class Kept:
    """What backward needs besides the input, in this order; None: is computed again, or there is none.

    Backward deletes what it is done with, so that the memory can be used again.
    """

    input_statistics: Tensor
    """Mean and inverse deviation of this rank's tokens, [2, T]."""
    normalised: Tensor | None
    """This rank's tokens, [T, D]."""
    projected: Tensor
    """[T, H · 4 · d], as is SiLU of it, the next."""
    activated: Tensor | None
    attended: Tensor
    """[T, H, d]."""
    output_statistics: Tensor
    """Mean and inverse deviation over the heads of all ranks, [2, T]."""
    pattern: Tensor | None
    """Of dropout: a byte an element [T, H · d], or a seed."""


def hstu_layer(x: Tensor, weights: LayerWeights, layout: JaggedLayout, rule: LayerRule) -> Tensor:
    """x [T, D] → [T, D]. Matrix products and attention compute in autocast's type, where that is on, else in x's."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    out: Tensor = _Layer.apply(x, layout, rule, dtype, *weights)
    return out


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layout: JaggedLayout, rule: LayerRule, dtype: torch.dtype, *weights: Tensor | None
    ) -> Tensor:
        ctx.layout, ctx.rule, ctx.dtype = layout, rule, dtype
        ctx.random = torch.get_rng_state() if rule.recompute_all and rule.dropout > 0 else None
        layer = _Computation(weights, layout, rule, dtype)
        with torch.autocast(x.device.type, enabled=False):
            kept, gated = layer.up_to_the_gate(x)
            if rule.recompute_normalised:
                kept.normalised = None
            if rule.recompute_activated:
                kept.activated = None
            ctx.save_for_backward(x, *weights, *(() if rule.recompute_all else vars(kept).values()))
            return x + rule.ranks.summed(F.linear(gated, layer.weights.out_weight.to(dtype)))()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        ctx.maybe_clear_saved_tensors()  # not under retain_graph: autograd would hold them until the end
        count = len(LayerWeights._fields)
        layer = _Computation(saved[:count], ctx.layout, ctx.rule, ctx.dtype)
        with torch.autocast(x.device.type, enabled=False):
            kept = _again(layer, x, ctx.random) if ctx.rule.recompute_all else Kept(*saved[count:])
            del saved
            grad_x, grad_weights = layer.backward(grad, x, kept)
        return grad_x, None, None, None, *grad_weights


def _again(layer: _Computation, x: Tensor, random: Tensor | None) -> Kept:
    """What forward had, with the dropout that it drew."""
    with torch.random.fork_rng(devices=[], enabled=random is not None):
        if random is not None:
            torch.set_rng_state(random)
        return layer.up_to_the_gate(x)[0]


class _Computation:
    """A layer's arithmetic on one batch; ``dtype`` is what matrix products and attention compute in."""

    def __init__(self, weights: Sequence[Any], layout: JaggedLayout, rule: LayerRule, dtype: torch.dtype) -> None:
        self.weights, self.layout, self.rule, self.dtype = LayerWeights(*weights), layout, rule, dtype
        self.bias = as_bias(self.weights.position_weight, self.weights.time_weight, layout)
        self.attention = attention_kernels(rule.head_dim, dtype, rule.backend, has_bias=self.bias is not None)
        self.gate = gate_kernels(len(self.weights.output_norm_weight), dtype, rule.backend)
        self.gate_rule = GateRule(rule.eps, rule.dropout, rule.ranks)

    def up_to_the_gate(self, x: Tensor) -> tuple[Kept, Tensor]:
        """All that could be kept, and what W_o multiplies."""
        weights, rule = self.weights, self.rule
        normalised, input_statistics = self._normalise(x)
        every_token = rule.ranks.every_token(normalised)()
        uvqk, shift = weights.uvqk_weight.to(self.dtype), weights.uvqk_bias.to(self.dtype)
        projected, activated = project(every_token, uvqk, shift, rule.backend)
        u, v, q, k = parts(activated, rule.head_dim)
        attended = self.attention.forward(q, k, v, self.layout, rule.attention, self.bias)
        gated, output_statistics, pattern = self.gate.forward(
            attended, u, weights.output_norm_weight, weights.output_norm_bias, self.gate_rule
        )
        kept = Kept(input_statistics, normalised, projected, activated, attended, output_statistics, pattern)
        return kept, gated

    def backward(self, grad: Tensor, x: Tensor, kept: Kept) -> tuple[Tensor, LayerWeights]:
        """Gradients of the input and of the weights. grad: [T, D]."""
        weights, rule, ranks = self.weights, self.rule, self.rule.ranks
        grads: dict[str, Any] = dict.fromkeys(LayerWeights._fields)
        grad_projected = self._backward_to_the_projection(grad, kept, grads)
        del kept.projected
        normalised = self._normalise(x)[0] if kept.normalised is None else kept.normalised
        every_token = ranks.every_token(normalised)
        grad_normalised = ranks.summed(grad_projected @ weights.uvqk_weight.to(self.dtype))
        grads["uvqk_weight"] = (grad_projected.t() @ every_token()).to(weights.uvqk_weight.dtype)
        grads["uvqk_bias"] = grad_projected.sum(0).to(weights.uvqk_bias.dtype)
        norm = weights.input_norm_weight, weights.input_norm_bias
        grad_x, *grad_norm = normalise_backward(grad_normalised(), x, *norm, kept.input_statistics, rule.backend)
        grads["input_norm_weight"], grads["input_norm_bias"] = map(ranks.sum_over_tokens, grad_norm)
        return grad_x.add_(grad), LayerWeights(**grads)

    def _backward_to_the_projection(self, grad: Tensor, kept: Kept, grads: dict[str, Any]) -> Tensor:
        """Gradient of W_uvqk's output; those of the weights behind it are put into ``grads``."""
        rule, ranks = self.rule, self.rule.ranks
        activated = activate(kept.projected, rule.backend) if kept.activated is None else kept.activated
        del kept.activated
        u, v, q, k = parts(activated, rule.head_dim)
        grad_activated = torch.empty_like(activated)
        grad_u, grad_v, grad_q, grad_k = parts(grad_activated, rule.head_dim)
        grad_attended = self._backward_through_the_gate(grad, kept, u, grad_u, grads)
        grad_bias = self.attention.backward(
            grad_attended, q, k, v, self.layout, rule.attention, self.bias, (grad_q, grad_k, grad_v)
        )
        if grad_bias is not None:
            grads["position_weight"] = ranks.sum_over_heads(grad_bias.position_weight)
            grads["time_weight"] = ranks.sum_over_heads(grad_bias.time_weight)
        return through_silu(grad_activated, kept.projected)

    def _backward_through_the_gate(
        self, grad: Tensor, kept: Kept, u: Tensor, grad_u: Tensor, grads: dict[str, Any]
    ) -> Tensor:
        """Gradient of the attention's output; that of u is written to ``grad_u``."""
        weights, norm = self.weights, (self.weights.output_norm_weight, self.weights.output_norm_bias)
        grad = self.rule.ranks.every_token(grad.to(self.dtype))()
        gated, grad_attended, grads["output_norm_weight"], grads["output_norm_bias"] = self.gate.backward(
            grad @ weights.out_weight.to(self.dtype),
            kept.attended,
            u,
            *norm,
            self.gate_rule,
            kept.output_statistics,
            kept.pattern,
            grad_u,
        )
        del kept.attended, kept.pattern
        grads["out_weight"] = (grad.t() @ gated).to(weights.out_weight.dtype)
        return grad_attended

    def _normalise(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, rule = self.weights, self.rule
        return normalise(x, weights.input_norm_weight, weights.input_norm_bias, rule.eps, self.dtype, rule.backend)
