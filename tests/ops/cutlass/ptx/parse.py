"""PTX text to a list of instructions: as much of the language as the kernels of ``hstu.ops.cutlass`` use."""

import re
from dataclasses import dataclass
from typing import Any


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
