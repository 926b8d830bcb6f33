"""What the emulator raises."""


class Unsupported(Exception):
    """PTX with an instruction, a modifier or an operand that the emulator does not implement."""


class Fault(Exception):
    """An execution that a GPU would abort, or whose result PTX leaves undefined."""
