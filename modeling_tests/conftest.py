"""Models that several test files share, made once for each."""

import pytest
from tiny import tiny_model

from uni_moe_hf import UniMoEForConditionalGeneration


@pytest.fixture(scope="module", params=[False, True], ids=["own", "shared"])
def model(request) -> UniMoEForConditionalGeneration:
    """Not to be changed by tests."""
    return tiny_model({"shared_expert_base": request.param})


@pytest.fixture(scope="module")
def own_model() -> UniMoEForConditionalGeneration:
    """Not to be changed by tests."""
    return tiny_model()
