"""Parses a PTX module with one kernel, as Triton emits it. PTX ISA, "Syntax"."""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

from .errors import Unsupported
from .types import DTYPES


class Immediate(NamedTuple):
    """A constant. `kind` is "f32" or "f64" for the bits of a number, or "int"."""

    value: int
    kind: str


class Name(NamedTuple):
    """A register, a label, a parameter, a symbol in shared memory, or `_`, which discards a result."""

    name: str


class Address(NamedTuple):
    """The address `base + offset` in bytes. `base` is a register or a parameter."""

    base: Name
    offset: int


class Vector(NamedTuple):
    """Operands in braces, the one with the lowest bits first."""

    elements: tuple[Immediate | Name, ...]


Operand = Immediate | Name | Address | Vector


class Statement(NamedTuple):
    """One instruction. It runs in the threads whose `predicate` is true, or false if `negated`."""

    opcode: str  # with all modifiers
    operands: tuple[Operand, ...]
    predicate: str | None
    negated: bool
    text: str
    source: str  # file, line and column of the kernel's Python, from the debug information


class Program(NamedTuple):
    """A parsed kernel."""

    name: str
    parameters: dict[str, str]  # type by name, in order
    registers: dict[str, str]  # type by prefix, or by name for registers of a scope in braces
    statements: list[Statement]
    labels: dict[str, int]  # index of the next statement
    threads: int  # of a block
    shared_symbols: frozenset[str]

    @property
    def targets(self) -> frozenset[int]:
        """Statements to which a branch jumps. Most labels are for debuggers only."""
        jumps = {s.operands[:1] for s in self.statements if s.opcode in ("bra", "bra.uni")}
        return frozenset(index for label, index in self.labels.items() if (Name(label),) in jumps)


# Lines outside of the kernel that do not change what it computes: debug information, and the name of a
# switch that libdevice leaves behind.
IGNORED = re.compile(
    r"\.(version|target|address_size|file|section)\b|\.global \.align 1 \.b8 _\$_str|[{}]|\.b\d+ |\$L__"
)
ENTRY = re.compile(r"\.visible \.entry (\w+)\(")
PARAMETER = re.compile(r"\.param \.(\w+)(?: \.ptr \.global \.align \d+)? (\w+),?")
SHARED = re.compile(r"\.extern \.shared \.align \d+ \.b8 (\w+)\[\];")
THREADS = re.compile(r"\.reqntid (\d+)")
LIMITS = re.compile(r"\.(maxnreg|minnctapersm) \d+")  # of registers: they do not change what is computed
REGISTERS = re.compile(r"\.reg \.(\w+)\s+%?(\w+?)(<\d+>)?")
LABEL = re.compile(r"([$\w]+):")
STATEMENT = re.compile(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)(?:\s+(.*))?")
OPERANDS = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")
ADDRESS = re.compile(r"\[\s*([%$\w]+)\s*(?:\+\s*(-?\d+))?\s*\]")


@functools.cache
def parse(ptx: str) -> Program:
    """Parse a module. Raise Unsupported at the first line with an unknown form."""
    parser = Parser()
    for number, line in enumerate(ptx.splitlines(), 1):
        try:
            parser.read(line)
        except Unsupported as error:
            raise Unsupported(f"line {number}: {error}") from None
    return parser.program()


class Parser:
    """Reads lines. `read` is the method for the part of the module that the next line belongs to."""

    def __init__(self) -> None:
        self.name = ""
        self.threads = 0
        self.parameters: dict[str, str] = {}
        self.registers: dict[str, str] = {}
        self.statements: list[Statement] = []
        self.labels: dict[str, int] = {}
        self.shared: set[str] = set()
        self.source = ""
        self.part = self.module

    def read(self, line: str) -> None:
        code, _, comment = line.partition("//")
        code = code.strip()
        if re.match(r"\.loc\s", code):
            self.source = comment.strip() or code
        elif code:
            self.part(code)

    def program(self) -> Program:
        if not self.name or self.part != self.module:
            raise Unsupported("the module has no kernel, or does not end")
        if self.threads == 0 or self.threads % 32:
            raise Unsupported(f"blocks of {self.threads} threads")
        last = self.statements[-1] if self.statements else None
        if last is None or last.opcode not in ("ret", "bra", "bra.uni") or last.predicate:
            raise Unsupported("a kernel that does not return at its end")
        return Program(
            self.name, self.parameters, self.registers, self.statements, self.labels, self.threads,
            frozenset(self.shared),
        )  # fmt: skip

    def module(self, code: str) -> None:
        if found := ENTRY.fullmatch(code):
            if self.name:
                raise Unsupported("a second kernel")
            self.name = found[1]
            self.part = self.parameter
        elif found := SHARED.fullmatch(code):
            self.shared.add(found[1])
        elif not IGNORED.match(code):
            raise Unsupported(code)

    def parameter(self, code: str) -> None:
        if code == ")":
            self.part = self.header
        elif (found := PARAMETER.fullmatch(code)) and found[2] not in self.parameters:
            self.parameters[found[2]] = found[1]
        else:
            raise Unsupported(code)

    def header(self, code: str) -> None:
        if found := THREADS.fullmatch(code):
            self.threads = int(found[1])
        elif code == "{":
            self.part = self.body
        elif not LIMITS.fullmatch(code):
            raise Unsupported(code)

    def body(self, code: str) -> None:
        if code == "}":
            self.part = self.module
        elif (found := LABEL.fullmatch(code)) and found[1] not in self.labels:
            self.labels[found[1]] = len(self.statements)
        else:
            if code.startswith("{") and code.endswith("}"):
                code = code[1:-1]  # a scope, whose registers have the same type wherever the name occurs
            for text in filter(None, map(str.strip, code.split(";"))):
                self.statement(text)

    def statement(self, text: str) -> None:
        if (found := REGISTERS.fullmatch(text)) and found[1] in DTYPES:
            if self.registers.setdefault(found[2], found[1]) != found[1]:
                raise Unsupported(f"two types of register {found[2]}")
        elif found := STATEMENT.fullmatch(text):
            operands = tuple(map(operand, OPERANDS.findall(found[4] or "")))
            self.statements.append(
                Statement(found[3], operands, found[2], found[1] == "!", text, self.source)
            )
        else:
            raise Unsupported(text)


def operand(text: str) -> Operand:
    """Parse one operand. PTX ISA, "Instruction Operands" and "Constants"."""
    if text.startswith("{"):
        return Vector(tuple(map(scalar, OPERANDS.findall(text[1:-1]))))
    if found := ADDRESS.fullmatch(text):
        return Address(Name(found[1]), int(found[2] or 0))
    return scalar(text)


def scalar(text: str) -> Immediate | Name:
    """Parse an operand without braces or brackets."""
    if found := re.fullmatch(r"0([fd])([0-9A-Fa-f]{8}|[0-9A-Fa-f]{16})", text):
        if len(found[2]) == {"f": 8, "d": 16}[found[1]]:
            return Immediate(int(found[2], 16), {"f": "f32", "d": "f64"}[found[1]])
    elif re.fullmatch(r"-?(0x[0-9A-Fa-f]+|0|[1-9]\d*)", text):
        return Immediate(int(text, 0), "int")
    elif re.fullmatch(r"[%$A-Za-z_][$\w.]*", text):
        return Name(text)
    raise Unsupported(f"operand {text}")
