"""Tests of several processes: a worker script runs its cases on every rank, and pytest reads the outcomes."""
