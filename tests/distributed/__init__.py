"""Tests of several processes: a worker script runs on every rank, pytest reads what became of its cases."""
