"""PTX text as instructions, the registers of a warp, and the arithmetic on them: as much as CUTLASS kernels use."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from tests.ops.cutlass.ptx.machine import Cta


@dataclass
class Instruction:
    """``@guard opcode operands``."""

    opcode: str
    operands: list[Any]
    """Strings; a list for ``{a, b}``; ("memory", base, offset) for ``[base + offset]`` with whatever else it holds."""
    guard: str | None = None
    negated: bool = False

    def __post_init__(self) -> None:
        self.parts = self.opcode.split(".")


@dataclass
class Program:
    """A kernel."""

    instructions: list[Instruction]
    labels: dict[str, int]
    params: list[tuple[str, int]]
    """Name and bytes of each."""


def parse(text: str) -> Program:
    """The only kernel of a PTX module."""
    text = re.sub(r"//[^\n]*", "", text)
    head, body = text.split(".entry", 1)[1].split("\n{", 1)
    sizes = {"u64": 8, "b64": 8, "u32": 4, "b32": 4, "f32": 4}
    params = []
    for declaration in re.findall(r"\.param ([^,\n]*)", head):
        array = re.search(r"(\S+)\[(\d+)\]", declaration)
        words = declaration.split()
        params.append((array[1], int(array[2])) if array else (words[-1], sizes[words[0][1:]]))
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    scopes: list[int] = []
    num_scopes = 0
    body = re.sub(r"mma\.sync[^;]*;", lambda statement: " ".join(statement[0].split()), body)
    # One statement a line, braces of inline assembly on lines of their own.
    body = re.sub(r"\n\s*\{(\s*\.reg)", r"\n{\n\1", body)
    for line in body.replace(";", ";\n").split("\n"):
        line = line.strip()
        if line in ("{", "}"):
            if line == "{":
                num_scopes += 1
                scopes.append(num_scopes)
            elif scopes:
                scopes.pop()
            continue
        scope = f"@{scopes[-1]}" if scopes else ""
        label = re.match(r"([$\w]+):\s*(.*)", line)
        if label:
            labels[label[1] + (scope if not label[1].startswith("$") else "")] = len(instructions)
            line = label[2]
        if line.endswith(";") and not line.startswith("."):
            instructions.append(_instruction(line[:-1].strip(), scope))
    return Program(instructions, labels, params)


def _instruction(line: str, scope: str) -> Instruction:
    guard, negated = None, False
    if line.startswith("@"):
        word, line = line.split(None, 1)
        negated, guard = word.startswith("@!"), word.lstrip("@!")
    opcode, _, rest = line.partition(" ") if " " in line else line.partition("\t")
    operands = _operands(rest.replace("\t", " "))
    if opcode.startswith("bra") and not operands[0].startswith("$"):
        operands[0] += scope
    return Instruction(opcode.strip().rstrip("."), operands, guard, negated)


def _operands(text: str) -> list[Any]:
    found, depth, start = [], 0, 0
    for i, sign in enumerate(text + ","):
        depth += (sign in "[{") - (sign in "]}")
        if sign == "," and depth == 0:
            if text[start:i].strip():
                found.append(_operand(text[start:i].strip()))
            start = i + 1
    return found


def _operand(text: str) -> Any:
    if text.startswith("{"):
        return [part.strip() for part in text[1:-1].split(",")]
    if text.startswith("["):
        inner = _operands(text[1:-1])
        base, _, offset = str(inner[0]).partition("+")
        return ("memory", base.strip(), int(offset or 0), *inner[1:])
    return text


LANES = 32
WIDTH = {"pred": 1, "b8": 1} | {f"{kind}{8 * size}": size for kind in "busf" for size in (2, 4, 8)}
COMPARE = {name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}


def _divided(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Rounded towards zero."""
    a, b = a.astype(np.int64), np.where(b == 0, 1, b).astype(np.int64)
    return np.abs(a) // np.abs(b) * np.sign(a) * np.sign(b)


ARITHMETIC: dict[str, Callable[..., np.ndarray]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "and": operator.and_, "or": operator.or_,
    "xor": operator.xor, "not": operator.invert, "neg": operator.neg, "min": np.minimum, "max": np.maximum,
    "abs": np.abs, "rcp": np.reciprocal, "ex2": np.exp2, "div": _divided,
    "rem": lambda a, b: np.fmod(a, np.where(b == 0, 1, b)),
    "mad": lambda a, b, c: a * b + c,
    "fma": lambda a, b, c: a.astype(np.float64) * b + c,
    "tanh": lambda a: np.tanh(a) * np.float32(1 - 2**-11),  # towards zero, by up to what the ISA allows
}  # fmt: skip
"""Results are rounded to the operands' type."""


def numpy_type(kind: str) -> str:
    """``s32`` → ``i4``; bits count as unsigned."""
    return {"s": "i", "u": "u", "b": "u", "f": "f"}[kind[0]] + str(int(kind[1:]) // 8)


def from_bits16(bits: np.ndarray, dtype: str) -> np.ndarray:
    """bf16 or f16 bits as float32."""
    if dtype == "f16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bits16(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 rounded to the nearest bf16 or f16."""
    if dtype == "f16":
        return values.astype(np.float16).view(np.uint16)
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


class Values:
    """The registers of a warp, an array of 32 each, typed by the instruction that reads them."""

    def __init__(self, cta: Cta, warp: int) -> None:
        self.registers: dict[str, np.ndarray] = {}
        self.aliases: dict[str, str] = {}
        self.params = cta.params
        self.constants = {
            "%tid.x": np.arange(LANES, dtype=np.uint32) + warp * LANES,
            "%laneid": np.arange(LANES, dtype=np.uint32),
            "%ctaid.x": np.full(LANES, cta.index, np.uint32),
            "%nctaid.x": np.full(LANES, cta.num_ctas, np.uint32),
            "__dynamic_shmem__0": np.zeros(LANES, np.uint32),
        }

    def predicate(self, name: str) -> np.ndarray:
        """bool [32]."""
        return self.registers[name]

    def read(self, operand: str, kind: str) -> np.ndarray:
        """A register or a number as 32 values of this kind."""
        if kind == "pred":
            return self.registers[operand]
        dtype = numpy_type(kind)
        if re.match(r"-?\d", operand):
            if operand[:2] in ("0f", "0F"):
                return np.full(LANES, int(operand[2:], 16), np.uint32).view(np.float32)
            number = int(operand, 0)
            return np.full(LANES, number % 2 ** (8 * int(dtype[1:])), f"u{dtype[1:]}").view(dtype)
        value = self.constants.get(operand)
        value = self.registers[operand] if value is None else value
        if value.dtype.itemsize != int(dtype[1:]):
            return value.astype(f"{value.dtype.kind}{dtype[1:]}").view(dtype)
        return value.view(dtype)

    def write(self, register: str, value: np.ndarray, mask: np.ndarray) -> None:
        """Set the register in the threads of the mask, in the width it has by its name."""
        if register == "_":
            return
        if value.dtype != bool:
            size = 8 if register.startswith("%rd") else 2 if register.startswith("%rs") else 4
            if value.dtype.itemsize != size:
                value = value.astype(f"{value.dtype.kind}{size}")
        if not mask.all() and register in self.registers:
            old = self.registers[register]
            value = np.where(mask, value.view(old.dtype) if value.dtype != bool else value, old)
        self.registers[register] = value

    def alias(self, register: str, other: str) -> None:
        """A register that holds the address of a kernel parameter."""
        self.aliases[register] = self.aliases.get(other, other)

    def compute(self, instruction: Instruction, mask: np.ndarray) -> None:
        """Arithmetic, comparison, conversion and moves."""
        name, kind, operands = instruction.parts[0], instruction.parts[-1], instruction.operands
        with np.errstate(all="ignore"):
            method = getattr(self, f"_{name}", None)
            if method is not None:
                method(instruction, mask)
            elif {"wide", "hi"} & set(instruction.parts):
                assert name == "mul", instruction
                wide = numpy_type(kind)[0] + str(WIDTH[kind] * 2)
                a, b = (self.read(o, kind).astype(wide) for o in operands[1:])
                self.write(
                    operands[0], a * b >> np.array(8 * WIDTH[kind] if "hi" in instruction.parts else 0, wide), mask
                )
            else:
                result = ARITHMETIC[name](*(self.read(operand, kind) for operand in operands[1:]))
                self.write(operands[0], result.astype(bool if kind == "pred" else numpy_type(kind)), mask)

    def _mov(self, instruction: Instruction, mask: np.ndarray) -> None:
        target, source = instruction.operands
        kind = instruction.parts[-1]
        if isinstance(source, list):
            half = WIDTH[kind] * 4
            low, high = (self.read(part, f"u{half}").astype(numpy_type(f"u{2 * half}")) for part in source)
            self.write(target, low | high << np.array(half, low.dtype), mask)
        elif isinstance(target, list):
            value, half = self.read(source, kind), WIDTH[kind] * 4
            for i, part in enumerate(target):
                self.write(part, (value >> np.array(half * i, value.dtype)).astype(f"u{half // 8}"), mask)
        elif source in self.params or source in self.aliases:
            self.alias(target, source)
        else:
            self.write(target, self.read(source, kind).copy(), mask)

    def _setp(self, instruction: Instruction, mask: np.ndarray) -> None:
        target, a, b = instruction.operands
        kind = instruction.parts[-1]
        self.write(target, COMPARE[instruction.parts[1]](self.read(a, kind), self.read(b, kind)), mask)

    def _selp(self, instruction: Instruction, mask: np.ndarray) -> None:
        target, a, b, choice = instruction.operands
        kind = instruction.parts[-1]
        self.write(target, np.where(self.predicate(choice), self.read(a, kind), self.read(b, kind)), mask)

    def _shl(self, instruction: Instruction, mask: np.ndarray, shift: Callable = operator.lshift) -> None:
        target, a, by = instruction.operands
        value = self.read(a, instruction.parts[-1])
        self.write(target, shift(value, self.read(by, "u32").astype(value.dtype)), mask)

    def _shr(self, instruction: Instruction, mask: np.ndarray) -> None:
        self._shl(instruction, mask, operator.rshift)

    def _shfl(self, instruction: Instruction, mask: np.ndarray) -> None:
        target, source, lane = instruction.operands[:3]
        value, other, own = self.read(source, "u32"), self.read(lane, "u32"), np.arange(LANES)
        assert mask.all(), "the warp has diverged"
        of = {"idx": other % LANES, "down": own + other, "bfly": own ^ other}[instruction.parts[2]]
        self.write(target, value[np.where(of < LANES, of, own)], mask)

    def _cvt(self, instruction: Instruction, mask: np.ndarray) -> None:
        to, of = instruction.parts[-2:]
        target, *sources = instruction.operands
        if to in ("bf16x2", "f16x2"):
            high, low = (to_bits16(self.read(o, "f32"), to[:-2]).astype(np.uint32) for o in sources)
            self.write(target, high << 16 | low, mask)
        elif of in ("bf16", "f16") and to == "f32":
            self.write(target, from_bits16(self.read(sources[0], "u16"), of), mask)
        elif (to, of) == ("s64", "f32"):
            self.write(target, np.trunc(self.read(sources[0], "f32")).astype(np.int64), mask)
        elif of[0] != "f" and to[0] != "f":
            value = self.read(sources[0], "u16" if of[1:] == "8" else of)
            if of[1:] == "8":
                value = value.astype(f"{'i' if of[0] == 's' else 'u'}1")
            self.write(target, value.astype(numpy_type(to)), mask)
        else:
            raise NotImplementedError(instruction)

    def _setmaxnreg(self, instruction: Instruction, mask: np.ndarray) -> None:
        pass

    def _fence(self, instruction: Instruction, mask: np.ndarray) -> None:
        pass
