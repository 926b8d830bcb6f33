"""Adapters to trainers. Each one imports its trainer only when it is imported itself."""
