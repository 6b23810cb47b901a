"""
The three stages through TRL: rows, batches, trainer, and what to resume from.
Imports `hub`, `mixtures` and `original`.
"""
