"""Builds what users get: wheel and sdist (`make dist`), a layout for the Hugging Face Hub (`make hub`)."""
