"""The C++ kernels by operator, and the table optimizers among them (csrc/rows.cpp). PyTorch serves other operators."""

import ctypes
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hstu.ops import row_update
from hstu.ops.cpu import attention, norm_mul_dropout, softmax_loss
from hstu.ops.cpu.build import Arguments, fields, float32, int32, int64, library, pointer
from hstu.ops.kernels import AttentionKernels, GateKernels
from hstu.ops.pytorch.softmax_loss import pool_softmax_loss
from hstu.ops.row_update import RowUpdate

_OPTIMIZERS = ("sgd", "adagrad", "adam", "partial_rowwise_adam")  # in the order of HstuRowOptimizer of csrc/rows.cpp


class _Arguments(Arguments):
    """HstuRowUpdate of csrc/rows.cpp."""

    _fields_ = fields(
        (pointer, "rows gradients weight first second"),
        (int64, "count width"),
        (float32, "rate eps beta1 beta2 correction1 correction2 max_gradient"),
        (int32, "optimizer threads"),
    )


def update_rows(
    gradient: Tensor, weight: Tensor, states: Sequence[Tensor], update: RowUpdate, found_inf: Tensor | None = None
) -> None:
    """See :data:`hstu.ops.row_update.UpdateRows`. PyTorch serves dense gradients, ``found_inf`` and what C++ lacks."""
    tensors = (weight, *states)
    served = gradient.is_sparse and all(each.dtype == torch.float32 and each.is_contiguous() for each in tensors)
    if not served or found_inf is not None or update.optimizer not in _OPTIMIZERS:
        row_update.update_rows(gradient, weight, states, update, found_inf)
        return
    rows, gradients = gradient._indices()[0].contiguous(), gradient._values().contiguous()
    first, second = (*states, None, None)[:2]
    arguments = _Arguments(
        count=len(rows),
        width=weight.shape[1],
        rate=update.learning_rate,
        eps=update.eps,
        beta1=update.betas[0],
        beta2=update.betas[1],
        correction1=1 - update.betas[0] ** update.step,
        correction2=1 - update.betas[1] ** update.step,
        max_gradient=math.inf if update.max_gradient is None else update.max_gradient,
        optimizer=_OPTIMIZERS.index(update.optimizer),
    )
    arguments.set(rows=rows, gradients=gradients, weight=weight.detach(), first=first, second=second)
    library().hstu_update_rows(ctypes.byref(arguments))


OPERATORS: dict[str, Any] = {
    "attention": AttentionKernels(attention.forward, attention.backward, differentiates_silu=False, serves_ranges=True),
    "norm_mul_dropout": GateKernels(norm_mul_dropout.forward, norm_mul_dropout.backward, differentiates_silu=False),
    "sampled_softmax_loss": softmax_loss.sampled_softmax_loss,
    "pool_softmax_loss": partial(pool_softmax_loss, softmax_loss.in_blocks),
    "l2_normalize": softmax_loss.l2_normalize,
    "update_rows": update_rows,
}
