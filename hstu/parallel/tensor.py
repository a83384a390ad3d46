"""Tensor parallelism of the dense part: each rank of a group has some of the heads of every HSTU layer.

A model is built whole, with the weights that a single process would have, and cut afterwards: W_uvqk by its outputs,
the output norm by its channels and W_o by its inputs, all in whole heads (layout [head, (u v q k), channel]). The rest
is the same on all ranks of the group, and gets the same gradients.

With sequence parallelism the tokens between the projections are split, too: gathered before W_uvqk, and scattered
where the group's shares of W_o's output are summed. Megatron's own collectives for that need CUDA; ours do not.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from hstu.model.layer import HSTULayer
from hstu.model.stack import HSTUStack, SequenceEncoder
from hstu.ops.layout import JaggedLayout, pad_tokens
from hstu.ops.norm_mul_dropout import SplitHeads
from hstu.parallel.collectives import gather_copies, join_rows, reduce_scatter, split_rows, sum_over_ranks
from hstu.parallel.mesh import Mesh

with warnings.catch_warnings():  # importing Megatron warns about optional CUDA packages that are not used here
    warnings.simplefilter("ignore")
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.tensor_parallel.layers import (
        ColumnParallelLinear,
        LinearWithGradAccumulationAndAsyncCommunication,
        RowParallelLinear,
        set_tensor_model_parallel_attributes,
    )


def split_encoder(encoder: SequenceEncoder, mesh: Mesh) -> None:
    """Cut an encoder that is still on the host, in place, over the tensor-parallel group; at size 1 nothing is done.

    NetworkArgs.sequence_parallel: split the tokens between the projections, too.
    """
    if mesh.tp_size == 1:
        return
    by_tokens = encoder.network.sequence_parallel
    for layer in encoder.stack.layers:
        assert isinstance(layer, HSTULayer)
        _split_layer(layer, mesh, by_tokens)
    if by_tokens:
        encoder.stack = TokenSplitStack(encoder.stack, mesh.tp_group)


def _split_layer(layer: HSTULayer, mesh: Mesh, by_tokens: bool) -> None:
    group = mesh.tp_group
    uvqk, out, norm = layer.uvqk, layer.out, layer.output_norm
    assert isinstance(uvqk, nn.Linear) and isinstance(out, nn.Linear)
    layer.uvqk = ColumnLinear(uvqk, group, by_tokens)
    layer.out = RowLinear(out, group, by_tokens)
    layer.output_norm = nn.LayerNorm(norm.weight.numel() // mesh.tp_size, eps=norm.eps)
    for name, whole in norm.named_parameters():
        part = nn.Parameter(whole.detach().chunk(mesh.tp_size)[mesh.tp_rank].clone())
        set_tensor_model_parallel_attributes(part, is_parallel=True, dim=0, stride=1)
        setattr(layer.output_norm, name, part)
    layer.split_heads = SplitHeads(mesh.tp_rank, partial(gather_copies, group=group))
    # Used on this rank's heads, or tokens, alone: the gradient is the sum over the group.
    shared = [layer.bias, layer.input_norm if by_tokens else None]
    for parameter in (parameter for module in shared if module is not None for parameter in module.parameters()):
        parameter.register_hook(partial(sum_over_ranks, group=group))


def _megatron_config(group: dist.ProcessGroup) -> ModelParallelConfig:
    return ModelParallelConfig(
        tensor_model_parallel_size=dist.get_world_size(group),
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
    )


class ColumnLinear(ColumnParallelLinear):
    """This rank's outputs of a linear layer: Megatron's, with plain tensors in and out, also under autocast.

    ``by_tokens``: the input is this rank's tokens, [T / ranks, in_width]; the output is of all tokens either way.
    """

    get_extra_state = nn.Module.get_extra_state  # Megatron's puts an empty entry into every state_dict

    def __init__(self, whole: nn.Linear, group: dist.ProcessGroup, by_tokens: bool) -> None:
        super().__init__(
            whole.in_features,
            whole.out_features,
            config=_megatron_config(group),
            init_method=partial(_copy, source=whole.weight),
            bias=True,
            disable_grad_reduce=by_tokens,
            tp_group=group,
        )
        self.by_tokens = by_tokens
        with torch.no_grad():
            self.bias.copy_(whole.bias.chunk(dist.get_world_size(group))[dist.get_rank(group)])

    def forward(self, x: Tensor) -> Tensor:
        """[T, in_width] (``by_tokens``: this rank's part of them) → [T, out_width / ranks]."""
        output: Tensor = super().forward(x)[0]
        return output

    def _forward_impl(self, input: Tensor, weight: Tensor, bias: Tensor, **options: Any) -> Tensor:
        if not self.by_tokens:
            return _linear(input, weight, bias, options["allreduce_dgrad"], self.tp_group)
        output: Tensor = _GatheredLinear.apply(*_in_compute_type(input, weight, bias), self.tp_group)
        return output


class RowLinear(RowParallelLinear):
    """A linear layer from this rank's inputs: Megatron's, with plain tensors in and out, also under autocast.

    ``by_tokens``: the output is this rank's tokens, [T / ranks, out_width], else all tokens.
    """

    get_extra_state = nn.Module.get_extra_state

    def __init__(self, whole: nn.Linear, group: dist.ProcessGroup, by_tokens: bool) -> None:
        super().__init__(
            whole.in_features,
            whole.out_features,
            config=_megatron_config(group),
            init_method=partial(_copy, source=whole.weight),
            bias=False,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_group=group,
        )
        self.by_tokens = by_tokens

    def forward(self, x: Tensor) -> Tensor:
        """[T, in_width / ranks] → [T, out_width], or this rank's part of the T tokens."""
        if self.by_tokens:
            return reduce_scatter(_linear(x, self.weight, None, False, self.tp_group), self.tp_group)
        output: Tensor = super().forward(x)[0]
        return output

    def _forward_impl(self, input: Tensor, weight: Tensor, bias: None, **options: Any) -> Tensor:
        return _linear(input, weight, bias, False, self.tp_group)


class TokenSplitStack(HSTUStack):
    """HSTU layers between which each rank has an equal part of the tokens.

    The tokens are filled up to a multiple of the ranks with a further sequence of zeros that no one reads.
    """

    def __init__(self, whole: HSTUStack, group: dist.ProcessGroup) -> None:
        nn.Module.__init__(self)
        self.layers = whole.layers
        self.group = group

    def forward(self, x: Tensor, layout: JaggedLayout) -> Tensor:
        """x: [T, D] → [T, D]."""
        ranks = dist.get_world_size(self.group)
        padding = max(len(x), 1) + -max(len(x), 1) % ranks - len(x)
        padded = F.pad(x, (0, 0, 0, padding))
        tokens = super().forward(split_rows(padded, self.group), pad_tokens(layout, padding))
        return join_rows(tokens, self.group)[: len(x)]


def _copy(target: Tensor, source: Tensor) -> None:
    target.copy_(source.detach())


def _in_compute_type(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """What autocast would do to a linear layer; it does not look into autograd functions on a CPU."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, sum_grad_x: bool, group: dist.ProcessGroup) -> Tensor:
    """Megatron's linear layer, which sums the gradient of x over the group while it computes that of the weight."""
    x, weight, bias = _in_compute_type(x, weight, bias)
    with torch.autocast(x.device.type, enabled=False):
        output: Tensor = LinearWithGradAccumulationAndAsyncCommunication.apply(
            x, weight, bias, False, sum_grad_x, False, None, None, group
        )
    return output


class _GatheredLinear(torch.autograd.Function):
    """Linear layer on the tokens of all ranks; keeps this rank's tokens alone and gathers again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.group = group
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(gather_copies(x, group).flatten(0, 1), weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        (gradient,) = gradients
        gradient = gradient.contiguous()
        every_x = x.new_empty((dist.get_world_size(ctx.group) * len(x), x.shape[1]))
        gathering = dist.all_gather_into_tensor(every_x, x.contiguous(), group=ctx.group, async_op=True)
        grad_every_x = gradient @ weight
        gathering.wait()
        grad_x = torch.empty_like(x)
        scattering = dist.reduce_scatter_tensor(grad_x, grad_every_x, group=ctx.group, async_op=True)
        grad_weight, grad_bias = gradient.t() @ every_x, gradient.sum(0)
        scattering.wait()
        return grad_x, grad_weight, grad_bias, None
