"""Reads and writes the CSVs of results, and formats Markdown tables."""
