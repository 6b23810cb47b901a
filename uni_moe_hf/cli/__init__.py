"""
The command `uni-moe`: one file per command, with its options and what it does.
May import every other folder, but only when a command has work to do.
"""

from .main import main


__all__ = ["main"]
