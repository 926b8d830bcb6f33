"""An emulator of the PTX that Triton compiles, in NumPy. `emulated` runs calls of this package in it."""

from .errors import Fault, Unsupported
from .launches import Launch, emulated, execute
from .machine import Mode

__all__ = ["Fault", "Launch", "Mode", "Unsupported", "emulated", "execute"]
