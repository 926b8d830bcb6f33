"""What the emulator raises."""


class Unsupported(Exception):
    """PTX that the emulator does not know. It never guesses."""


class Fault(Exception):
    """An execution that a GPU would abort, or whose result PTX leaves undefined."""
