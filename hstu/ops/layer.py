"""One HSTU layer as one autograd function, on one rank or with its heads or tokens split over several ranks.

    x = x + update;  U, V, Q, K = split(SiLU(W_uvqk LayerNorm(x) + b))
    update = W_o · Dropout(LayerNorm(attention) ⊙ U) + b_o

One function controls what is saved for backward (:class:`SavedActivations`), frees it after its last use, and overlaps
collectives with matrix products. Each layer adds the update of the previous layer, so that the sum and its norm are one
pass over memory. T and H count the tokens and heads that this rank projects. Context-parallel ranks exchange them for
attention (:meth:`LayerComm.tokens_to_heads`). Source: HSTU, arXiv 2402.17152, sec. 3.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hstu.ops.comm import LayerComm
from hstu.ops.kernels import (
    AddLayerNormInputs,
    AttentionConfig,
    AttentionInputs,
    GateConfig,
    GateInputs,
    Gradient,
    Kernels,
    Preactivation,
    RelativeBias,
)
from hstu.ops.layout import JaggedLayout
from hstu.ops.pytorch.operators import linear, matmul


@dataclass(frozen=True)
class HSTULayerConfig:
    """Settings of a layer that depend on neither the batch nor the weights."""

    head_dim: int
    attention: AttentionConfig
    eps: float
    """Epsilon of both norms."""
    kernels: Kernels
    dropout: float = 0.0
    """Probability; 0 in evaluation."""
    recompute_normalized: bool = False
    """Backward recomputes ``SavedActivations.normalized``."""
    recompute_activated: bool = False
    """Backward recomputes ``SavedActivations.activated``."""
    recompute_all: bool = False
    """Backward recomputes everything; only the input is saved."""
    comm: LayerComm = field(default_factory=LayerComm)
    """Communication with the ranks that hold the other heads or tokens."""


class LayerWeights(NamedTuple):
    """Parameters of a layer, in any dtype, with this rank's heads. uvqk rows are ordered [head, (u v q k), channel]."""

    input_norm_weight: Tensor  # [D]
    input_norm_bias: Tensor  # [D]
    uvqk_weight: Tensor  # [H · 4 · d, D]
    uvqk_bias: Tensor  # [H · 4 · d]
    position_weight: Tensor | None  # Field of :class:`RelativeBias`; None: the layer has no bias
    time_weight: Tensor | None  # Field of :class:`RelativeBias`; None: the layer has no bias
    output_norm_weight: Tensor  # [H · d]
    output_norm_bias: Tensor  # [H · d]
    out_weight: Tensor  # [D, H · d]
    out_bias: Tensor | None  # [D]; None: the output projection has no bias


@dataclass
class SavedActivations:
    """Saved for backward, besides x + update. None: recomputed or absent. Backward frees each field after use."""

    input_statistics: Tensor  # Mean and rstd of this rank's tokens, [2, T]
    normalized: Tensor | None  # This rank's tokens, [T, D]
    projected: Tensor  # [T, H · 4 · d]
    u: Tensor | None  # [T, H, d]; views of SiLU(projected), unless context parallelism exchanges v, q and k
    vqk: Tensor | None  # Input of attention, [T, H, 3, d]; with context parallelism: some heads of all tokens
    q: Tensor | None  # With ranges of queries: q of the range; ``vqk`` then is v and k of its keys, [., H, 2, d]
    attended: Tensor  # [T, H, d]
    output_statistics: Tensor  # Mean and rstd over the heads of all ranks, [2, T]
    dropout_mask: Tensor | None  # bool [T, H · d], or a seed int64 []


def split_gate(uvqk: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Views u [T, H, d] and vqk [T, H, 3, d] of [T, H · 4 · d], whose columns are [head, (u v q k), channel]."""
    by_head = uvqk.unflatten(1, (-1, 4, head_dim))
    return by_head[:, :, 0], by_head[:, :, 1:]


class HSTULayerFunction(torch.autograd.Function):
    """``apply(x, update, layout, config, *weights)`` → (x + update, the update of this layer), all [T, D].

    The result update has the dtype of matrix products and attention: autocast's if enabled, else the dtype of x.
    update: None for the first layer. weights: the fields of :class:`LayerWeights`; gradients have their dtypes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        update: Tensor | None,
        layout: JaggedLayout,
        config: HSTULayerConfig,
        *weights: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """See the class."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        ctx.layout, ctx.config, ctx.dtype = layout, config, dtype
        ctx.update_dtype = None if update is None else update.dtype
        ctx.rng_state = torch.get_rng_state() if config.recompute_all and config.dropout > 0 else None
        layer = _Computation(weights, layout, config, dtype)
        with torch.autocast(device, enabled=False):
            x, saved, gated = layer.forward_to_gate(x, update)
            if config.recompute_normalized:
                saved.normalized = None
            if config.recompute_activated or not layer.share.keeps:
                saved.u = saved.vqk = saved.q = None
            ctx.save_for_backward(x, *weights, *(() if config.recompute_all else vars(saved).values()))
            return x, layer.project_out(gated)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_update: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, of the update and of the weights."""
        x, *tensors = ctx.saved_tensors
        ctx.maybe_clear_saved_tensors()  # autograd would hold them until the end; no effect under retain_graph
        count = len(LayerWeights._fields)
        layer = _Computation(tensors[:count], ctx.layout, ctx.config, ctx.dtype)
        with torch.autocast(x.device.type, enabled=False):
            if ctx.config.recompute_all:
                with torch.random.fork_rng(devices=[], enabled=ctx.rng_state is not None):
                    if ctx.rng_state is not None:
                        torch.set_rng_state(ctx.rng_state)
                    saved = layer.forward_to_gate(x, None)[1]
            else:
                saved = SavedActivations(*tensors[count:])
            del tensors
            grad_x, grad_of_update, grad_weights = layer.backward(grad, grad_update, x, saved, ctx.update_dtype)
        return grad_x, grad_of_update, None, None, *grad_weights


class _Computation:
    """Arithmetic of a layer on one batch. ``dtype``: of matrix products and attention."""

    def __init__(
        self, weights: Sequence[Any], layout: JaggedLayout, config: HSTULayerConfig, dtype: torch.dtype
    ) -> None:
        self.weights, self.layout, self.config, self.dtype = LayerWeights(*weights), layout, config, dtype
        position, time = self.weights.position_weight, self.weights.time_weight
        self.bias = None if position is None or time is None else RelativeBias(position, time)
        heads, kernels = len(self.weights.uvqk_bias) // (4 * config.head_dim), config.kernels.attention
        has_bias = self.bias is not None
        self.share = config.comm.share_attention(layout, config.attention, heads, has_bias, kernels.serves_ranges)

    def _norm_of(self, x: Tensor, update: Tensor | None = None) -> AddLayerNormInputs:
        weights, eps = self.weights, self.config.eps
        return AddLayerNormInputs(x, update, weights.input_norm_weight, weights.input_norm_bias, eps, self.dtype)

    def _attention_of(self, vqk: Sequence[Tensor]) -> AttentionInputs:
        v, q, k = self.share.unpack(vqk)
        return AttentionInputs(q, k, v, self.share.layout, self.share.config, self.bias, self.share.queries)

    def _gate_of(self, attended: Tensor, u: Tensor) -> GateInputs:
        gate = GateConfig(self.config.eps, self.config.dropout, self.config.comm)
        return GateInputs(attended, u, self.weights.output_norm_weight, self.weights.output_norm_bias, gate)

    def forward_to_gate(self, x: Tensor, update: Tensor | None) -> tuple[Tensor, SavedActivations, Tensor]:
        """Return x + update, all activations, and the input [T, H · d] of W_o."""
        weights, config, kernels = self.weights, self.config, self.config.kernels
        x, normalized, input_statistics = kernels.add_layer_norm.forward(self._norm_of(x, update))
        all_tokens = config.comm.all_gather_tokens(normalized)()
        uvqk, shift = weights.uvqk_weight.to(self.dtype), weights.uvqk_bias.to(self.dtype)
        projected, activated = kernels.project_uvqk.forward(all_tokens, uvqk, shift)
        u, exchanged_vqk = self._exchange(activated)
        vqk = exchanged_vqk()
        del activated, exchanged_vqk  # the last references to their memory under context parallelism
        attended = kernels.attention.forward(self._attention_of(vqk))
        attended = config.comm.heads_to_tokens(attended, self.share.queries_of)()
        gated, output_statistics, dropout_mask = kernels.norm_mul_dropout.forward(self._gate_of(attended, u))
        first, second = vqk[0], vqk[1] if len(vqk) > 1 else None
        saved = SavedActivations(
            input_statistics, normalized, projected, u, first, second, attended, output_statistics, dropout_mask
        )
        return x, saved, gated

    def project_out(self, gated: Tensor) -> Tensor:
        """Return W_o gated + b_o. Each tensor-parallel rank adds an equal part of b_o to its partial product."""
        weight, bias, comm = self.weights.out_weight, self.weights.out_bias, self.config.comm
        own_bias = None if bias is None else (bias / comm.tp_size).to(self.dtype)
        return comm.reduce_tokens(linear(gated, weight.to(self.dtype), own_bias))()

    def _exchange(self, activated: Tensor) -> tuple[Tensor, Callable[[], list[Tensor]]]:
        """u of this rank's tokens, and the pending exchange of v, q and k for attention (AttentionShare.parts)."""
        u, vqk = split_gate(activated, self.config.head_dim)
        comm = self.config.comm
        exchanged = [comm.tokens_to_heads(vqk[:, :, part], tokens) for part, tokens in self.share.parts]
        return (u.contiguous() if comm.cp_size > 1 else u), lambda: [each() for each in exchanged]

    def backward(
        self, grad: Tensor, grad_update: Tensor, x: Tensor, saved: SavedActivations, update_dtype: torch.dtype | None
    ) -> tuple[Tensor, Tensor | None, LayerWeights]:
        """Gradients of x, of the update and of the weights; x: x + update; grad, grad_update: of both results."""
        weights, comm, norm = self.weights, self.config.comm, self.config.kernels.add_layer_norm
        grads: dict[str, Any] = dict.fromkeys(LayerWeights._fields)
        grad_projected = self._backward_to_projection(grad_update, saved, grads)
        del saved.projected
        normalized = norm.forward(self._norm_of(x))[1] if saved.normalized is None else saved.normalized
        all_tokens = comm.all_gather_tokens(normalized)
        grad_normalized = comm.reduce_tokens(matmul(grad_projected, weights.uvqk_weight.to(self.dtype)))
        grads["uvqk_weight"] = matmul(grad_projected.t(), all_tokens()).to(weights.uvqk_weight.dtype)
        grad_x, grad_of_update, *grad_norm = norm.backward(
            grad_normalized(), grad, self._norm_of(x), saved.input_statistics, update_dtype
        )
        grads["input_norm_weight"], grads["input_norm_bias"] = map(comm.all_reduce_over_tokens, grad_norm)
        return grad_x, grad_of_update, LayerWeights(**grads)

    def _backward_to_projection(self, grad: Tensor, saved: SavedActivations, grads: dict[str, Any]) -> Tensor:
        """Return the gradient of ``saved.projected``; write gradients of its bias and of later weights to ``grads``."""
        config, kernels, comm, shift = self.config, self.config.kernels, self.config.comm, self.weights.uvqk_bias
        u, vqk, exchanged_vqk = saved.u, [part for part in (saved.vqk, saved.q) if part is not None], None
        if u is None:  # the exchange runs beside the products of the gate
            u, exchanged_vqk = self._exchange(kernels.project_uvqk.activate(saved.projected))
        del saved.u, saved.vqk, saved.q
        gradient = torch.empty_like(saved.projected)
        grad_shift = torch.empty(len(shift), dtype=torch.promote_types(self.dtype, torch.float32), device=shift.device)
        grad_u, grad_own_vqk = split_gate(gradient, config.head_dim)
        differentiates_silu = (
            kernels.attention.differentiates_silu
            and kernels.norm_mul_dropout.differentiates_silu
            and comm.cp_size == 1  # else the rows of attention differ from the rows of the pre-activations
        )
        before: list[Preactivation | None] = [None] * 4
        if differentiates_silu:
            values = saved.projected.unflatten(1, (-1, 4, config.head_dim)).unbind(2)
            before = [*map(Preactivation, values, grad_shift.unflatten(0, (-1, 4, config.head_dim)).unbind(1))]
        grad_attended = self._backward_through_gate(grad, saved, u, Gradient(grad_u, before[0]), grads)
        grad_attended = comm.tokens_to_heads(grad_attended, self.share.queries_of)()
        if exchanged_vqk is not None:
            vqk = exchanged_vqk()
        del u, exchanged_vqk  # the last references to their memory under context parallelism, as is vqk below
        grad_vqk = [*map(torch.empty_like, vqk)] if comm.cp_size > 1 else [grad_own_vqk]
        of_v, of_q, of_k = map(Gradient, self.share.unpack(grad_vqk), before[1:])
        grad_bias = kernels.attention.backward(grad_attended, self._attention_of(vqk), (of_q, of_k, of_v))
        del vqk, grad_attended
        if comm.cp_size > 1:
            for (part, tokens), each in zip(self.share.parts, grad_vqk, strict=True):
                comm.heads_to_tokens(each, tokens, out=grad_own_vqk[:, :, part])()
        if grad_bias is not None:
            grads["position_weight"] = comm.all_reduce_over_heads(grad_bias.position_weight)
            grads["time_weight"] = comm.all_reduce_over_heads(grad_bias.time_weight)
        if not differentiates_silu:
            torch.ops.aten.silu_backward.grad_input(gradient, saved.projected, grad_input=gradient)
            grad_shift = gradient.sum(0)
        grads["uvqk_bias"] = grad_shift.to(shift.dtype)
        return gradient

    def _backward_through_gate(
        self, grad: Tensor, saved: SavedActivations, u: Tensor, grad_u: Gradient, grads: dict[str, Any]
    ) -> Tensor:
        """Return the gradient of the attention output; write the gradient of u or its pre-activation to ``grad_u``."""
        out_weight, out_bias = self.weights.out_weight, self.weights.out_bias
        grad = self.config.comm.all_gather_tokens(grad)()
        gated, grad_attended, *grad_norm = self.config.kernels.norm_mul_dropout.backward(
            matmul(grad, out_weight.to(self.dtype)),
            self._gate_of(saved.attended, u),
            saved.output_statistics,
            saved.dropout_mask,
            grad_u,
        )
        del saved.attended, saved.dropout_mask
        grads["output_norm_weight"], grads["output_norm_bias"] = grad_norm
        grads["out_weight"] = matmul(grad.t(), gated).to(out_weight.dtype)
        if out_bias is not None:  # of all tokens of the tensor-parallel group, so equal on its ranks
            grads["out_bias"] = grad.sum(0, dtype=out_bias.dtype)
        return grad_attended
