"""Adapters to trainers; each imports its trainer only when it is imported itself."""
