"""Contracts products and sums to FMAs, as the assembler (ptxas) may.

PTX ISA, "Floating Point Instructions: mul" and "add": without a rounding modifier, a product whose result
is added may be fused with the sum. LLVM has fused what it could. This fuses nearly all that is left: sums
that read the product itself, in the same basic block, or anywhere if its registers never change.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from .parser import Immediate, Name, Operand, Program, Statement, Vector

NO_RESULT = ("st.", "stmatrix.", "bra", "bar.", "ret")
Factors = tuple[Operand, Operand]


def contracted(program: Program) -> Program:
    """Return the program with an FMA in place of each `add` or `sub` that reads a known product.

    A branch may come from a place where registers have other values. So at its target, only those products
    stay known whose registers are written by one statement of the program. The `mul` stays, because others
    may read the product. If both terms are products, the first is fused.
    """
    targets = program.targets
    products: dict[str, Factors] = {}  # by the register that holds the product
    statements: list[Statement] = []
    moved = []  # new index of each statement
    writes = Counter(name for statement in program.statements for name in results(statement))

    def constant(name: str, factors: Factors) -> bool:
        return all(writes[x] <= 1 for x in (name, *(f.name for f in factors if isinstance(f, Name))))

    for index, statement in enumerate(program.statements):
        if index in targets:
            products = {name: factors for name, factors in products.items() if constant(name, factors)}
        moved.append(len(statements))
        statements += fused(statement, products)
        for name in results(statement):
            products.pop(name, None)
            for product in [p for p, factors in products.items() if Name(name) in factors]:
                del products[product]
        if statement.opcode in ("mul.f32", "mul.f64") and statement.predicate is None:
            product, *factors = statement.operands
            if product not in factors:
                products[product.name] = tuple(factors)
    moved.append(len(statements))
    registers = program.registers | {"negated32_": "f32", "negated64_": "f64"}
    labels = {label: moved[index] for label, index in program.labels.items()}
    return program._replace(statements=statements, labels=labels, registers=registers)


def fused(statement: Statement, products: dict[str, Factors]) -> Iterator[Statement]:
    """Yield what replaces the statement. Negations are exact, and go to a register of their own."""
    operation, _, kind = statement.opcode.partition(".")
    if operation not in ("add", "sub") or kind not in ("f32", "f64"):
        yield statement
        return
    result, *terms = statement.operands
    place = next(
        (i for i, term in enumerate(terms) if isinstance(term, Name) and term.name in products), None
    )
    if place is None:
        yield statement
        return
    first, second = products[terms[place].name]
    addend = terms[1 - place]
    if operation == "sub":  # a * b - c = fma(a, b, -c), and c - a * b = fma(-a, b, c)
        register = Name(f"%negated{kind[1:]}_0")
        negated = first if place == 1 else addend
        yield statement._replace(opcode=f"neg.{kind}", operands=(register, negated))
        first, addend = (register, addend) if place == 1 else (first, register)
    yield statement._replace(opcode=f"fma.rn.{kind}", operands=(result, first, second, addend))


def results(statement: Statement) -> Iterator[str]:
    """Yield the registers that the statement writes."""
    if statement.operands and not statement.opcode.startswith(NO_RESULT):
        target = statement.operands[0]
        for element in target.elements if isinstance(target, Vector) else (target,):
            if not isinstance(element, Immediate):
                yield element.name
