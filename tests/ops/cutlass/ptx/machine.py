"""An interpreter of PTX that runs one CTA at a time, to compute the results of a kernel without a GPU.

It follows the PTX ISA for registers, branches, mbarriers, TMA loads with their swizzles, and WGMMA with its shared
memory descriptors. Its timing is adversarial: a TMA load completes at once, and an asynchronous product is computed
only when an instruction waits for it. A buffer released too early or a result used too early therefore gives a wrong
number, and a missing arrival gives a deadlock. Threads of a warp that diverge before an instruction that all must
execute are an error. Proxies, caches, the order of ordinary memory accesses, and the host's TMA descriptors are not
modelled: on a GPU, tests/ops/test_self_check.py checks the results.

Temporary: once the self check has passed on GPUs of compute capability 9.0, delete this folder, and the rows
about it in docs/benchmarks/kernels/README.md.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.ops.cutlass.ptx.registers import WIDTH, Instruction, Program, Values, from_bits16

LANES = 32
CONVERGENT = {"shfl", "bar", "wgmma", "elect"}
"""Instructions that all threads of a warp execute together."""


@dataclass
class TensorMap:
    """A TMA descriptor: a tensor [T, H, d] of 16-bit numbers, and the box that one instruction loads."""

    bits: np.ndarray
    """uint16 [T, H, d]."""
    rows: int
    columns: int


@dataclass
class Barrier:
    """An mbarrier."""

    count: int
    pending: int
    bytes: int = 0
    phase: int = 0

    def settle(self) -> None:
        """Begin the next phase if all threads and all bytes have arrived."""
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.count


@dataclass
class Cta:
    """A CTA: the state that its warps share."""

    program: Program
    params: dict[str, Any]
    memory: dict[int, np.ndarray]
    """Address → bytes of each global array."""
    index: int
    num_ctas: int
    num_threads: int
    shared: np.ndarray = field(default_factory=lambda: np.zeros(232448, np.uint8))
    barriers: dict[int, Barrier] = field(default_factory=dict)
    arrived: dict[int, int] = field(default_factory=dict)

    def run(self) -> None:
        """Run all warps to their end. Raises RuntimeError if all of them wait."""
        warps = [Warp(self, i) for i in range(self.num_threads // LANES)]
        alive = warps
        while alive:
            progress = [warp.run() for warp in alive]
            alive = [warp for warp in alive if not warp.done]
            if alive and not any(progress):
                raise RuntimeError(f"deadlock: {[str(warp.program[warp.at].opcode) for warp in alive]}")

    def global_bytes(self, address: int, size: int) -> np.ndarray:
        """The bytes at an address. Raises IndexError outside all arrays."""
        for start, data in self.memory.items():
            if start <= address and address + size <= start + len(data):
                return data[address - start : address - start + size]
        raise IndexError(f"address {address:#x} of {size} bytes")


class Warp:
    """32 threads that execute together; after a divergent branch, those at the lowest instruction go first.

    As on a GPU, threads wait for the others of the warp at an instruction that all of them must execute.
    """

    def __init__(self, cta: Cta, index: int) -> None:
        self.cta, self.index = cta, index
        self.program, self.labels = cta.program.instructions, cta.program.labels
        self.values = Values(cta, index)
        self.pc = np.zeros(LANES, np.int64)
        self.at = 0
        self.done = False
        self.waiting_at_barrier = False
        self.groups: list[list[Callable[[], None]]] = []
        self.open: list[Callable[[], None]] = []

    def run(self) -> bool:
        """Run to the end or to an instruction that must wait. Returns whether any instruction was executed."""
        progress = False
        end = len(self.program)
        while True:
            self.at = at = self._next()
            if at >= end:
                self.done = True
                return True
            active = self.pc == at
            instruction = self.program[at]
            if instruction.guard is not None:
                chosen = active & (self.values.predicate(instruction.guard) ^ instruction.negated)
            else:
                chosen = active
            target = self._execute(instruction, chosen) if chosen.any() else None
            if target == "wait":
                return progress
            progress = True
            self.pc[active] = at + 1
            if target is not None:
                self.pc[chosen] = end if target == "end" else self.labels[target]

    def _next(self) -> int:
        """The instruction to execute: the lowest, but threads wait for the others at one that all must execute."""
        first = int(self.pc.min())
        if first == self.pc.max():
            return first
        for at in np.unique(self.pc):
            if at < len(self.program) and self.program[at].parts[0] not in CONVERGENT:
                return int(at)
        raise AssertionError("the warp has diverged")

    def _execute(self, instruction: Instruction, mask: np.ndarray) -> str | None:
        """Execute one instruction. Returns a label to jump to, "end", "wait", or None to continue."""
        name = instruction.parts[0]
        if name == "bra":
            return instruction.operands[0]
        if name == "ret":
            return "end"
        special = getattr(self, f"_{name}", None)
        if special is None:
            self.values.compute(instruction, mask)
            return None
        return special(instruction, mask)

    # -- memory ------------------------------------------------------------------------------------------------

    def _ld(self, instruction: Instruction, mask: np.ndarray) -> None:
        target, memory = instruction.operands
        targets = target if isinstance(target, list) else [target]
        kind = instruction.parts[-1]
        size = WIDTH[kind]
        if "param" in instruction.parts:
            data = self.cta.params[memory[1]]
            raw = np.frombuffer(data[memory[2] : memory[2] + size], f"u{size}")
            self.values.write(targets[0], np.repeat(raw, LANES), mask)
            return
        for i, register in enumerate(targets):
            out = np.zeros(LANES, f"i{size}" if kind[0] == "s" else f"u{size}")
            for lane, data in self._bytes_at(instruction, memory, i * size, size, mask):
                out[lane] = data.view(out.dtype)[0]
            self.values.write(register, out, mask)

    def _st(self, instruction: Instruction, mask: np.ndarray) -> None:
        memory, source = instruction.operands
        size = WIDTH[instruction.parts[-1]]
        for i, register in enumerate(source if isinstance(source, list) else [source]):
            value = self.values.read(register, f"u{8 * size}")
            for lane, data in self._bytes_at(instruction, memory, i * size, size, mask):
                data.view(value.dtype)[0] = value[lane]

    def _bytes_at(
        self, instruction: Instruction, memory: tuple, offset: int, size: int, mask: np.ndarray
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Each thread of the mask, and the bytes at its address in shared or global memory."""
        is_global = "global" in instruction.parts
        assert is_global or any(part.startswith("shared") for part in instruction.parts), instruction
        address = self.values.read(memory[1], "s64" if is_global else "u32").astype(np.int64) + memory[2] + offset
        for lane in np.flatnonzero(mask):
            start = int(address[lane]) % 2 ** (64 if is_global else 32)
            yield int(lane), self.cta.global_bytes(start, size) if is_global else self.cta.shared[start : start + size]

    def _cvta(self, instruction: Instruction, mask: np.ndarray) -> None:
        self.values.alias(*instruction.operands)

    # -- synchronisation ---------------------------------------------------------------------------------------

    def _bar(self, instruction: Instruction, mask: np.ndarray) -> str | None:
        if instruction.parts[1] == "warp":
            assert mask.all(), "the warp has diverged"
            return None
        arrived = self.cta.arrived
        if not self.waiting_at_barrier:
            self.waiting_at_barrier = True
            arrived[0] = arrived.get(0, 0) + 1
            self.goal = -(-arrived[0] // (self.cta.num_threads // LANES)) * (self.cta.num_threads // LANES)
        if arrived[0] < self.goal:
            return "wait"
        self.waiting_at_barrier = False
        return None

    def _elect(self, instruction: Instruction, mask: np.ndarray) -> None:
        first = np.arange(LANES) == np.flatnonzero(mask)[0]
        register, _, predicate = instruction.operands[0].partition("|")
        self.values.write(register, np.full(LANES, np.flatnonzero(mask)[0], np.uint32), mask)
        self.values.write(predicate, first, mask)

    def _mbarrier(self, instruction: Instruction, mask: np.ndarray) -> str | None:
        lanes = np.flatnonzero(mask)
        memory = next(operand for operand in instruction.operands if isinstance(operand, tuple))
        address = int(self.values.read(memory[1], "u32")[lanes[0]]) + memory[2]
        last = instruction.operands[-1]
        if "init" in instruction.parts:
            count = int(self.values.read(last, "u32")[lanes[0]])
            self.cta.barriers[address] = Barrier(count, count)
            return None
        barrier = self.cta.barriers[address]
        if "try_wait" in instruction.parts:
            parity = int(self.values.read(instruction.operands[2], "u32")[lanes[0]]) & 1
            if barrier.phase % 2 == parity:
                return "wait"
            self.values.write(instruction.operands[0], np.ones(LANES, bool), mask)
            return None
        assert "arrive" in instruction.parts, instruction
        assert len(lanes) == 1, "more than one thread arrives"
        if "expect_tx" in instruction.parts:
            barrier.bytes += int(self.values.read(last, "u32")[lanes[0]])
        barrier.pending -= 1
        assert barrier.pending >= 0
        barrier.settle()
        return None

    # -- TMA and WGMMA -----------------------------------------------------------------------------------------

    def _cp(self, instruction: Instruction, mask: np.ndarray) -> None:
        assert instruction.opcode.startswith("cp.async.bulk.tensor.3d"), instruction
        lane = np.flatnonzero(mask)
        assert len(lane) == 1, "TMA by more than one thread"
        target, source, barrier = instruction.operands[:3]
        tensor: TensorMap = self.cta.params[self.values.aliases[source[1]]]
        column, row, head = (int(self.values.read(c, "s32")[lane[0]]) for c in source[3])
        address = int(self.values.read(target[1], "u32")[lane[0]]) + target[2]
        box = np.zeros((tensor.rows, tensor.columns), np.uint16)
        inside = tensor.bits[row : row + tensor.rows, head, column : column + tensor.columns]
        box[: len(inside)] = inside
        pitch = tensor.columns * 2
        where = address + np.arange(tensor.rows)[:, None] * pitch + np.arange(tensor.columns) * 2
        self.cta.shared.view(np.uint16)[swizzled(where, pitch) // 2] = box
        number = int(self.values.read(barrier[1], "u32")[lane[0]]) + barrier[2]
        self.cta.barriers[number].bytes -= box.nbytes
        self.cta.barriers[number].settle()

    def _wgmma(self, instruction: Instruction, mask: np.ndarray) -> None:
        assert mask.all(), "the warp has diverged"
        if instruction.parts[1] == "mma_async":
            self.open.append(self._product(instruction))
        else:
            self._group(instruction)

    def _group(self, instruction: Instruction) -> None:
        """Commit the open group, or execute all but the latest groups. A kernel uses only one kind of group."""
        if "commit_group" in instruction.parts:
            self.groups.append(self.open)
            self.open = []
        elif "wait_group" in instruction.parts:
            while len(self.groups) > int(instruction.operands[0]):
                for work in self.groups.pop(0):
                    work()

    def _fragment(self, registers: list) -> np.ndarray:
        """The left operand [16, 16] that a warp holds in registers, two 16-bit numbers in each."""
        bits, lane = np.zeros((16, 16), np.uint16), np.arange(LANES)
        for r, register in enumerate(registers):
            pair = self.values.read(register, "u32")
            for c in (0, 1):
                bits[lane // 4 + r % 2 * 8, lane % 4 * 2 + c + r // 2 * 8] = pair >> 16 * c & 0xFFFF
        return bits

    def _product(self, instruction: Instruction) -> Callable[[], None]:
        """The product as a function. Descriptors and predicate are read now, registers and memory when it is called."""
        sums, left, right, adds, _, _, *transposed = instruction.operands
        columns = int(instruction.parts[4].split("n")[1].split("k")[0])
        dtype = instruction.parts[-1]
        b = self._descriptor(right, int(transposed[-1]))
        a = left if isinstance(left, list) else self._descriptor(left, int(transposed[0]))
        accumulates = bool(self.values.predicate(adds)[0])
        lane, i = np.arange(LANES)[:, None], np.arange(columns // 2)
        rows, columns_of = lane // 4 + i // 2 % 2 * 8, i // 4 * 8 + lane % 4 * 2 + i % 2

        def run() -> None:
            k = np.arange(16)
            right_bits = self._operand(b, np.arange(columns)[:, None], k)
            if isinstance(a, list):
                left_bits = self._fragment(a)
            else:
                left_bits = self._operand(a, (np.arange(16) + self.index % 4 * 16)[:, None], k)
            product = from_bits16(left_bits, dtype) @ from_bits16(right_bits, dtype).T
            everyone = np.ones(LANES, bool)
            for e, register in enumerate(sums):
                old = self.values.read(register, "f32") if accumulates else 0
                self.values.write(register, (old + product[rows[:, e], columns_of[:, e]]).astype(np.float32), everyone)

        return run

    def _descriptor(self, register: str, transposed: int) -> tuple[int, int, int, int, int]:
        word = int(self.values.read(register, "u64")[0])
        assert (word >> 49) & 7 == 0, "base offset"
        start, leading, stride = (((word >> shift) & 0x3FFF) << 4 for shift in (0, 16, 32))
        return start, leading, stride, {1: 128, 2: 64, 3: 32, 0: 16}[word >> 62], transposed

    def _operand(self, descriptor: tuple[int, int, int, int, int], mn: np.ndarray, k: np.ndarray) -> np.ndarray:
        """16-bit numbers of an operand in shared memory. The canonical layouts of the PTX ISA."""
        start, leading, stride, width, transposed = descriptor
        if transposed:
            per = width // 2
            where = mn % per * 2 + mn // per * leading + k % 8 * width + k // 8 * stride
        else:
            where = mn % 8 * width + mn // 8 * stride + k * 2
        return self.cta.shared.view(np.uint16)[swizzled(start + where, width) // 2]


def swizzled(address: np.ndarray, width: int) -> np.ndarray:
    """Byte addresses under the swizzle of 128, 64 or 32 bytes."""
    return address ^ ((address >> 7 & (width // 16 - 1)) << 4)
