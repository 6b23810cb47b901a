"""Progress bars: on a terminal, with an estimate; nowhere else, and not where the library's own bars are off."""

from typing import Any

from transformers.utils import logging


def progress_bar(*args: Any, shown: bool = True, **settings: Any) -> Any:
    """
    Args:
        args, settings: As `tqdm` takes them.
        shown (`bool`, *optional*, defaults to `True`): Whether there may be one.

    Returns:
        A bar of `tqdm`, on stderr; without output where stderr is no terminal, or after
        `transformers.utils.logging.disable_progress_bar()`.
    """
    return logging.tqdm(*args, **{"disable": None if shown else True, "dynamic_ncols": True, **settings})


__all__ = ["progress_bar"]
