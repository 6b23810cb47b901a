"""Converted checkpoints that the tests of this folder share."""

from pathlib import Path

import pytest
from golden import FIXTURES, VARIANTS, towers_of

from uni_moe_hf import convert_checkpoint


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> dict[tuple[str, str], Path]:
    """The fixtures, (variant, LoRA mode) -> folder."""
    root, folders = tmp_path_factory.mktemp("converted"), {}
    for variant in VARIANTS:
        for lora in ("merge", "keep"):
            folder = folders[variant, lora] = root / f"{variant}-{lora}"
            fixture = FIXTURES / variant
            convert_checkpoint(
                fixture / "base", folder, finetuned=fixture / "finetuned", lora=lora, **towers_of(variant)
            )
    return folders
