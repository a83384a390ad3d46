"""The kernels in the variants that training uses: compiled without a GPU, with what their machine code needs.

:func:`variants` lists Triton's. :func:`record` runs the host functions of one and records their launches.
:func:`compile_launch` compiles a recorded launch exactly as it would be launched, and reads registers, spills and
instructions from the machine code; :func:`read_cutlass_kernel` reads those of a CUTLASS kernel.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor
from triton.compiler import ASTSource

from hstu.ops.comm import LayerComm
from hstu.ops.functional import add_layer_norm, hstu_attention, norm_mul_dropout, project_uvqk, softmax_loss
from hstu.ops.kernels import (
    AddLayerNormInputs,
    AttentionConfig,
    AttentionInputs,
    GateConfig,
    GateInputs,
    Negatives,
    RelativeBias,
    SeenItems,
)
from hstu.ops.layout import NUM_TIME_BUCKETS, JaggedLayout, build_layout, token_order
from hstu.ops.triton.compile_ahead import bound_arguments, compile_kernel, describe_config, run_slots
from hstu.ops.triton.launch import Launch, recorded_launches
from hstu.ops.triton.operators import OPERATORS

HEADS = 2
LENGTHS = np.array([48, 16])
HIDDEN = 1024


@dataclass(frozen=True)
class Variant:
    """An example of one operator, forward and backward."""

    op: str
    head_dim: int
    """0 for an operator without heads."""
    description: str
    run: Callable[[], None]


def record(variant: Variant, capability: int) -> list[Launch]:
    """The launches of a variant on a GPU of compute capability ``capability`` (90 for 9.0)."""
    with recorded_launches(divmod(capability, 10)) as launches:
        variant.run()
    return launches


def variants() -> list[Variant]:
    """All operators in the variants that training uses."""
    return [
        *(_attention(width, torch.bfloat16, *parts) for width in (16, 32, 64, 128, 256) for parts in ATTENTION_PARTS),
        *(_attention(width, torch.float32, *parts) for width in (64, 128) for parts in ATTENTION_PARTS[::2]),
        *(_attention(64, torch.bfloat16, *parts) for parts in WINDOW_PARTS),
        *(_add_layer_norm(residual) for residual in (torch.float32, torch.bfloat16)),
        *(_norm(width, split) for width in (64, 256) for split in (False, True)),
        Variant("uvqk", 256, f"{HIDDEN} → {HEADS} × 4 × 256, bfloat16", lambda: _run_uvqk(torch.bfloat16)),
        Variant("uvqk", 256, f"{HIDDEN} → {HEADS} × 4 × 256, float32", lambda: _run_uvqk(torch.float32)),
        Variant("activate", 256, f"{HEADS} × 4 × 256, bfloat16", _run_activate),
        Variant("jagged_concat", 0, f"[T, {HIDDEN}], float32", _run_jagged),
        Variant("add_positions", 0, f"[T, {HIDDEN}], float32", _run_positions),
        *(
            Variant(
                "sampled_softmax_loss",
                0,
                f"[M, {width}], float32{', seen items masked' if masks else ''}",
                lambda width=width, masks=masks: _run_softmax(width, masks),  # type: ignore[misc]
            )
            for width in (64, 256)
            for masks in (False, True)
        ),
        Variant("slots", 0, "of dynamic tables", run_slots),
    ]


ATTENTION_PARTS = (("causal",), ("causal", "context", "candidates"), ("causal", "bias"), ("bidirectional", "bias"))
WINDOW_PARTS = (("causal", "context", "candidates", "window"), ("causal", "window", "bias"))


def _attention(head_dim: int, dtype: torch.dtype, *parts: str) -> Variant:
    description = f"{', '.join(parts)}, {str(dtype).removeprefix('torch.')}"
    return Variant("hstu_attention", head_dim, description, lambda: _run_attention(head_dim, dtype, parts))


def _run_attention(head_dim: int, dtype: torch.dtype, parts: tuple[str, ...]) -> None:
    layout = _layout(contextuals=2 * ("context" in parts), candidates=4 * ("candidates" in parts))
    _, v, q, k = _zeros(layout.num_tokens, HEADS, 4, head_dim, dtype=dtype).unbind(2)
    bias = None
    if "bias" in parts:
        bias = RelativeBias(*(torch.zeros(n, requires_grad=True) for n in (2 * 64 - 1, NUM_TIME_BUCKETS)))
    window = {"max_span": 20, "full_tokens": 9} if "window" in parts else {}
    config = AttentionConfig(head_dim**-0.5, 64, "causal" in parts, True, **window)
    inputs = AttentionInputs(q, k, v, layout, config, bias)
    out = hstu_attention(inputs, OPERATORS["attention"], _zeros(HEADS, 3, head_dim))
    out.backward(torch.zeros_like(out))


class _TwoEqualRanks(LayerComm):
    """Stands in for two ranks with equal values, to compile the kernels of tensor parallelism in one process."""

    tp_size = 2

    def all_gather(self, own: Tensor) -> Tensor:
        """See :class:`LayerComm`."""
        return torch.stack([own, own])


def _norm(head_dim: int, split: bool) -> Variant:
    where = "heads on 2 ranks" if split else "one rank"
    return Variant("norm_mul_dropout", head_dim, f"{HEADS} heads, {where}", lambda: _run_norm(head_dim, split))


def _run_norm(head_dim: int, split: bool) -> None:
    _, x, u, _ = _zeros(64, HEADS, 4, head_dim, dtype=torch.bfloat16).unbind(2)
    shift, weight, bias = _zeros(HEADS, head_dim), _zeros(HEADS * head_dim), _zeros(HEADS * head_dim)
    config = GateConfig(1e-5, 0.2, _TwoEqualRanks() if split else LayerComm())
    inputs = GateInputs(x, u, weight, bias, config)
    norm_mul_dropout(inputs, OPERATORS["norm_mul_dropout"], shift).float().sum().backward()


def _add_layer_norm(residual: torch.dtype) -> Variant:
    description = f"[T, {HIDDEN}], {str(residual).removeprefix('torch.')} residual, bfloat16 update"
    return Variant("add_layer_norm", 0, description, lambda: _run_add_layer_norm(residual))


def _run_add_layer_norm(residual: torch.dtype) -> None:
    x, update = _zeros(64, HIDDEN, dtype=residual), _zeros(64, HIDDEN, dtype=torch.bfloat16)
    for added in (None, update):  # the first layer has nothing to add
        inputs = AddLayerNormInputs(x, added, _zeros(HIDDEN), _zeros(HIDDEN), 1e-5, torch.bfloat16)
        both = add_layer_norm(inputs, OPERATORS["add_layer_norm"])
        torch.cat(both).sum().backward()


def _run_uvqk(dtype: torch.dtype) -> None:
    width = HEADS * 4 * 256
    x, weight, bias = (_zeros(*shape, dtype=dtype) for shape in ((64, HIDDEN), (width, HIDDEN), (width,)))
    project_uvqk(x, weight, bias, OPERATORS["project_uvqk"]).sum().backward()


def _run_activate() -> None:
    OPERATORS["project_uvqk"].activate(_zeros(64, HEADS * 4 * 256, dtype=torch.bfloat16))


def _run_jagged() -> None:
    layout = _layout(contextuals=1, candidates=0)
    items = _zeros(int(layout.num_items.sum()), HIDDEN)
    OPERATORS["jagged_concat"]([_zeros(len(LENGTHS), HIDDEN), items], token_order(layout)).sum().backward()


def _run_positions() -> None:
    layout = _layout(contextuals=0, candidates=0)
    x, table = _zeros(layout.num_tokens, HIDDEN), _zeros(8192, HIDDEN)
    OPERATORS["add_positions"](x, table, layout.positions).sum().backward()


def _run_softmax(width: int, masks: bool) -> None:
    vectors = _zeros(64, width), _zeros(64, width), _zeros(48, width)
    targets, ids = torch.zeros(64, dtype=torch.int64), torch.zeros(48, dtype=torch.int64)
    of_queries = torch.zeros(64, dtype=torch.int32)
    seen = SeenItems(torch.zeros(2, 48, dtype=torch.int32), of_queries, of_queries) if masks else None
    draws = torch.zeros(64, 128, dtype=torch.int64)
    softmax_loss(*vectors, Negatives(targets, ids, 0.05, _zeros(48), seen, draws), OPERATORS["sampled_softmax_loss"])


def _zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype, requires_grad=True)


def _layout(contextuals: int, candidates: int) -> JaggedLayout:
    return build_layout(
        item_lengths=LENGTHS,
        num_sequences=len(LENGTHS),
        num_contextuals=contextuals,
        num_candidates=np.full(len(LENGTHS), candidates),
        tokens_per_item=1,
        target_group_size=2,
        device=torch.device("cpu"),
        item_times=torch.zeros(int(LENGTHS.sum()), dtype=torch.int64),
    )


@dataclass(frozen=True)
class Compiled:
    """Resources and instructions of one kernel in one configuration."""

    kernel: str
    capability: int
    """90 for compute capability 9.0."""
    config: str
    registers: int
    """Per thread."""
    shared_bytes: int
    """Per program."""
    spill_instructions: int
    """Loads and stores of registers that did not fit."""
    stack_bytes: int
    """Local memory per thread."""
    instructions: int
    wgmma: int
    """Matrix products of warp groups (HGMMA)."""
    mma: int
    """Matrix products of warps (HMMA)."""
    tensor_memory_mma: int
    """Matrix products into tensor memory, from sm_100 on (UTCHMMA)."""
    wgmma_waits: int
    """Instructions that wait for products of warp groups."""


def compile_launch(launch: Launch, config: triton.Config, capability: int) -> Compiled:
    """Compile one configuration of a recorded launch for sm_{capability} and read its machine code.

    Raises:
        RuntimeError: the tools that read machine code fail.
        triton.CompilationError: the kernel does not compile.
    """
    built = compile_kernel(launch, config, capability)
    return Compiled(
        kernel=launch.kernel.fn.__name__,
        capability=capability,
        config=describe_config(config),
        shared_bytes=built.metadata.shared,
        **read_cubin(built.asm["cubin"]),
    )


def source_of(launch: Launch, config: triton.Config, capability: int) -> tuple[ASTSource, Any]:
    """What Triton compiles for one configuration of a recorded launch: the source, and the options of the backend."""
    kernel = launch.kernel
    backend, bound, specialization, options = bound_arguments(launch, config, capability)
    parsed, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, options)
    return ASTSource(kernel, signature, constants, attributes), parsed


def read_cubin(cubin: bytes) -> dict[str, int]:
    """The fields of :class:`Compiled` that machine code contains."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage = _output(tools / "cuobjdump", "--dump-resource-usage", file)
        opcodes = _opcodes(_output(tools / "nvdisasm", "-c", file))
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    roots = [opcode.split(".")[0] for opcode in opcodes]
    return {
        "registers": numbers["REG"],
        "spill_instructions": roots.count("LDL") + roots.count("STL"),
        "stack_bytes": numbers["STACK"] + numbers["LOCAL"],
        "instructions": len(roots),
        "wgmma": roots.count("HGMMA"),
        "mma": roots.count("HMMA"),
        "tensor_memory_mma": roots.count("UTCHMMA"),
        "wgmma_waits": sum(opcode.startswith("WARPGROUP.DEPBAR") for opcode in opcodes),
    }


def _opcodes(assembly: str) -> list[str]:
    return re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", assembly, re.MULTILINE)


def _output(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed: {done.stderr.strip()}")
    return done.stdout


LARGEST_SHARED_BYTES = 232448
"""Most shared memory of a CTA on an H100."""
BARRIER_BYTES = 1024
"""Space of the mbarriers of sm_90: the buffers behind them are aligned to 1024 bytes."""


def read_cutlass_kernel(variant: Any, ptx: str, cubin: bytes) -> Compiled:
    """What the machine code of a :class:`hstu.ops.cutlass.attention.Variant` needs.

    Raises:
        RuntimeError: the kernel needs more shared memory than the GPU has, or the compiler has serialized the
            asynchronous products, as it does when registers run out.
    """
    from hstu.ops.cutlass.attention import kernel_name  # CUTLASS is not installed everywhere

    shape = variant.shape
    stationary = 1 if variant.num_inputs == 3 else 2
    numbers = (stationary * shape.block + 2 * shape.stages * shape.tile) * shape.head_dim
    of_slopes = shape.stages * shape.block * shape.tile * 2 if variant.is_split else 0
    compiled = Compiled(
        kernel=kernel_name(variant),
        capability=90,
        config=f"{shape.block} × {shape.tile}",
        shared_bytes=numbers * variant.dtype.itemsize + of_slopes + BARRIER_BYTES,
        **read_cubin(cubin),
    )
    if compiled.shared_bytes > LARGEST_SHARED_BYTES:
        raise RuntimeError(f"{variant}: {compiled.shared_bytes} bytes of shared memory exceed {LARGEST_SHARED_BYTES}")
    if compiled.wgmma_waits > 2 * ptx.count("wgmma.wait_group"):
        raise RuntimeError(f"{variant}: the compiler has serialized the products of warp groups")
    return compiled
