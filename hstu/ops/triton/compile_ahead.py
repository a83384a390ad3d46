"""Compile kernels for a GPU that is not there, exactly as their wrappers would launch them, and read what came out."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hstu.ops.triton.launch import Launch

WARP_SIZE = 32
TYPE_NAMES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
    torch.uint8: "u8",
}


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one kernel in one configuration."""

    kernel: str
    capability: int
    """90 for compute capability 9.0."""
    config: str
    registers: int
    """A thread's."""
    shared_bytes: int
    """A program's."""
    spill_instructions: int
    """Loads and stores of registers that did not fit."""
    stack_bytes: int
    """A thread's local memory."""
    instructions: int
    wgmma: int
    """Products by warp group (HGMMA)."""
    mma: int
    """Products by warp (HMMA)."""
    wgmma_waits: int
    """Places where warp-group products are waited for."""

    @property
    def wgmma_share(self) -> float:
        """Warp-group products of all instructions."""
        return self.wgmma / max(1, self.instructions)


def compile_launch(launch: Launch, config: triton.Config, capability: int) -> Compiled:
    """Compile one configuration of a recorded launch for sm_{capability}.

    Raises:
        RuntimeError: more shared memory than such a GPU has, or tools that fail.
        triton.CompilationError: the kernel does not compile.
    """
    source = _source(launch.kernel, {**launch.arguments, **config.kwargs})
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    built = triton.compile(source, target=GPUTarget("cuda", capability, WARP_SIZE), options=options)
    return _inspect(built, launch.kernel.fn.__name__, capability, _described(config))


def _source(kernel: Any, values: Mapping[str, Any]) -> ASTSource:
    """The types of the values, what is known of them (None, 1, multiples of 16), and the constants."""
    signature, constants, known = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        varies = parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and not varies):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        signature[parameter.name] = _type_name(value)
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0 and not varies):
            known[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, known)


def _type_name(value: Tensor | int | float) -> str:
    if isinstance(value, Tensor):
        return "*" + TYPE_NAMES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _described(config: triton.Config) -> str:
    tile = " × ".join(str(value) for value in config.kwargs.values())
    return f"{tile or 'one'}, {config.num_warps} warps, {config.num_stages} stages"


def _inspect(built: Any, name: str, capability: int, config: str) -> Compiled:
    return Compiled(
        kernel=name,
        capability=capability,
        config=config,
        shared_bytes=built.metadata.shared,
        **read_cubin(built.asm["cubin"]),
    )


def read_cubin(cubin: bytes) -> dict[str, int]:
    """The fields of :class:`Compiled` that machine code tells."""
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
        "wgmma_waits": sum(opcode.startswith("WARPGROUP.DEPBAR") for opcode in opcodes),
    }


def _opcodes(assembly: str) -> list[str]:
    return re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", assembly, re.MULTILINE)


def _output(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed: {done.stderr.strip()}")
    return done.stdout
