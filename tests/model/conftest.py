"""A small LLaVA in a folder, and something to say to it, for the tests of adapters."""

from __future__ import annotations

import pytest
import tiny
import tiny_models


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_models.save("llava_vicuna", tmp_path_factory.mktemp("base"))


@pytest.fixture
def example(base, tmp_path):
    """An encoded conversation and its image."""
    _, template = tiny.load(base, adapted=False)
    record = tiny.triples(tmp_path)[1]
    (preferred, _), images = template.encode((record.preferred, record.dispreferred), record.image, record.id)
    return images, preferred
