"""A model in evaluation mode meanwhile."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """
    Args:
        model (`nn.Module`): In evaluation mode inside; each of its modules is as it was afterwards.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


__all__ = ["evaluating"]
