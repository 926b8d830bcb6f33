"""An experimental kernel that splits a row over several blocks (experiment 4 of docs/dev/tuning.md)."""
