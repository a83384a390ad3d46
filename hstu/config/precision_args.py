"""The options of number formats beside NetworkArgs.dtype_str."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from hstu.config.option import Args, option


@dataclass(frozen=True, kw_only=True)
class PrecisionArgs(Args):
    """How numbers are kept from vanishing and overflowing, and which shortcuts are allowed."""

    loss_scale: Optional[float | str] = option(None, above=0, words=("dynamic",))
    """float16 only: the loss is multiplied by this before backward, so that small gradients do not vanish, and the
    gradients are divided by it again, in float32. dynamic: from 65536 on; a step whose gradients overflow is skipped on
    all ranks and halves it (at 1 the run ends), growth_interval steps without double it. A number: that one; an
    overflow then ends the run. None: dynamic with float16, no scaling with other types."""
    growth_interval: int = option(2000, minimum=1)
    """loss_scale = "dynamic": steps in a row without an overflow after which the scale is doubled."""
    allow_tf32: bool = option(False)
    """GPUs: PyTorch may compute products of float32 matrices in TF32, with 10 bits of mantissa. Our own kernels keep
    float32's accuracy either way."""
    fp32_master_grads: bool = option(True)
    """Gradients of the dense weights, which are float32, are averaged over the data-parallel ranks in float32. False:
    they are sent as NetworkArgs.dtype_str, half the bytes, and rounded to it. Micro-batches are summed in float32
    either way, and the tables' gradients are sent in float32."""
