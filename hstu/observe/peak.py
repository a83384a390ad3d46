"""The peak arithmetic rate of a device, against which MFU is reckoned."""

from __future__ import annotations

import math
import re
import time
from typing import NamedTuple

import torch


class PeakTflops(NamedTuple):
    """A device's peak in TFLOPS (10^12 operations a second), and where the number comes from."""

    value: float
    source: str


# Dense rates without sparsity as the maker publishes them: device name → (bfloat16 and float16 with float32
# accumulation, TF32, float32). The first pattern that matches counts; None and names not listed are measured.
_DATA_SHEETS: tuple[tuple[str, tuple[float, float | None, float | None]], ...] = (
    (r"\bB200", (2250, None, None)),
    (r"H100 NVL", (835, None, None)),
    (r"H[18]00 PCIe", (756, 378, 51)),
    (r"(GH200|H200|H100|H800)(?! NVL)", (989, 494.5, 67)),
    (r"A[18]00", (312, 156, 19.5)),
    (r"L40S", (362, 183, 91.6)),
    (r"A40\b", (149.7, 74.8, 37.4)),
    (r"A30\b", (165, 82, 10.3)),
    (r"A10\b", (125, 62.5, 31.2)),
    (r"V100-SXM", (125, 15.7, 15.7)),  # has no TF32
)


def data_sheet_tflops(name: str, dtype: torch.dtype, tf32: bool = False) -> float | None:
    """The peak of the GPU called ``name`` (as torch names it), None where it is not in our table.

    tf32: float32 matrix products run on the tensor cores in TF32.
    """
    for pattern, (half, tensor_float, single) in _DATA_SHEETS:
        if re.search(pattern, name, re.IGNORECASE):
            if dtype in (torch.bfloat16, torch.float16):
                return half
            if dtype == torch.float32:
                return tensor_float if tf32 else single
            return None
    return None


def peak_tflops(device: torch.device, dtype: torch.dtype) -> PeakTflops:
    """Peak of one device for matrix products of ``dtype``.

    From the data sheet for a known GPU; otherwise measured, which takes less than a second. A measured peak is what a
    matrix product reaches now, on the threads torch has: MFU on a CPU tells about efficiency, not about hardware.
    Call it when a run starts: it waits for the device.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = data_sheet_tflops(name, dtype, tf32=torch.backends.cuda.matmul.allow_tf32)
        if known is not None:
            return PeakTflops(known, f"data sheet of {name}")
    return PeakTflops(_measure(device, dtype), f"measured with {_name(dtype)} matrix products on this {device.type}")


def _measure(device: torch.device, dtype: torch.dtype, budget_s: float = 0.3, most_products: int = 10) -> float:
    """Best rate over products of one size that is large enough to keep the device busy."""
    size = 8192 if device.type == "cuda" else 1024
    left = torch.ones(size, size, device=device, dtype=dtype)
    torch.matmul(left, left)  # loads the library and starts its threads, which takes longer than the product
    deadline = time.perf_counter() + budget_s
    shortest_s = math.inf
    for _ in range(most_products):
        begun = time.perf_counter()
        torch.matmul(left, left)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        ended = time.perf_counter()
        shortest_s = min(shortest_s, ended - begun)
        if ended > deadline:
            break
    return 2.0 * size**3 / shortest_s / 1e12


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
