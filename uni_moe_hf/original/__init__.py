"""
The published checkpoints: their formats, read, converted into one folder and back, two joined into one.
Imports `hub` and `mixtures`.
"""
