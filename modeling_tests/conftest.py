"""Models that several test files share, made once for each; and what holds in every test."""

import logging
import sys
import warnings

import pytest
from tiny import PACKAGE, tiny_model

from uni_moe_hf import UniMoEForConditionalGeneration


def our_line() -> str | None:
    """The file and line of ours that called into the library last; `None` where somebody else did."""
    frame = sys._getframe(2)
    passed = ("/transformers/", "/logging/", "/conftest.py", "/warnings.py", "/typing_extensions.py")
    while frame is not None and any(name in frame.f_code.co_filename for name in passed):
        frame = frame.f_back
    if frame is not None and frame.f_code.co_filename.startswith(str(PACKAGE)):
        return f"{frame.f_code.co_filename}:{frame.f_lineno}"
    return None


class Deprecations(logging.Handler):
    """What the library warns of and logs of names that will go, where a line of ours used them."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "deprecat" in record.getMessage().lower() and (line := our_line()):
            self.found.append(f"{line}: {record.getMessage()}")

    def warn(self, message, category=None, *args, **kwargs) -> None:
        kinds = (DeprecationWarning, FutureWarning, PendingDeprecationWarning)
        kind = type(message) if isinstance(message, Warning) else category
        if isinstance(kind, type) and issubclass(kind, kinds) and (line := our_line()):
            self.found.append(f"{line}: {message}")


@pytest.fixture(scope="session")
def deprecations():
    handler, warn = Deprecations(), warnings.warn

    def noted(message, category=None, stacklevel=1, *args, **kwargs):
        handler.warn(message, category)
        return warn(message, category, stacklevel + 1, *args, **kwargs)

    logging.getLogger("transformers").addHandler(handler)
    warnings.warn = noted
    yield handler
    warnings.warn = warn
    logging.getLogger("transformers").removeHandler(handler)


@pytest.fixture(autouse=True)
def no_line_of_ours_uses_a_name_that_will_go(deprecations):
    logging.getLogger("transformers").setLevel(logging.WARNING)  # commands make it quieter
    deprecations.found.clear()
    yield
    assert deprecations.found == []


@pytest.fixture(scope="module", params=[False, True], ids=["own", "shared"])
def model(request) -> UniMoEForConditionalGeneration:
    """Not to be changed by tests."""
    return tiny_model({"shared_expert_base": request.param})


@pytest.fixture(scope="module")
def own_model() -> UniMoEForConditionalGeneration:
    """Not to be changed by tests."""
    return tiny_model()
