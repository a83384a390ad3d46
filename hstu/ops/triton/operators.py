"""The Triton kernels by operator."""

from typing import Any

from hstu.ops.kernels import AddLayerNormKernels, AttentionKernels, GateKernels, ProjectionKernels
from hstu.ops.triton import attention, linear, norm
from hstu.ops.triton.rows import add_positions, jagged_concat
from hstu.ops.triton.softmax_loss import sampled_softmax_loss

OPERATORS: dict[str, Any] = {
    "attention": AttentionKernels(attention.forward, attention.backward, serves_ranges=True),
    "add_layer_norm": AddLayerNormKernels(norm.residual_forward, norm.residual_backward),
    "project_uvqk": ProjectionKernels(linear.project, linear.silu),
    "norm_mul_dropout": GateKernels(norm.gate_forward, norm.gate_backward),
    "sampled_softmax_loss": sampled_softmax_loss,
    "jagged_concat": jagged_concat,
    "add_positions": add_positions,
}
