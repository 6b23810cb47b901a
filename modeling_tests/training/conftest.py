"""Parts and filled caches that the tests of this folder share."""

from pathlib import Path

import pytest
from tiny import tiny_model, tiny_processor
from tiny_caches import DENSE
from tiny_training import rows, write_media

from uni_moe_hf import (
    FeatureCache,
    UniMoEDataCollator,
    encode_rows,
)


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> Path:
    return write_media(tmp_path_factory.mktemp("media"))


@pytest.fixture(scope="module")
def parts():
    """A model with all towers, and its processor."""
    model = tiny_model(DENSE)
    return model, tiny_processor(model.config)


@pytest.fixture
def filled(parts, media, tmp_path) -> FeatureCache:
    """A cache of the clips of all rows."""
    cache = FeatureCache(tmp_path / "cache", *parts, fill=True)
    encode_rows(rows(), parts[0], UniMoEDataCollator(parts[1], media_root=media), cache)
    return FeatureCache(tmp_path / "cache", *parts)


@pytest.fixture
def with_cache(parts, filled, media):
    """A collator whose processor has the cache, for the length of a test."""
    parts[1].feature_cache = filled
    yield UniMoEDataCollator(parts[1], media_root=media)
    parts[1].feature_cache = None
