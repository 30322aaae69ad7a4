"""Reference material that may not be distributed with the project: other people's captions, answers and photographs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

BESIDE = Path(__file__).resolve().parents[2] / "shared"


def shared(name: str) -> Path:
    """The path of a file or folder of the reference material; skip the test if it is missing.

    The material is looked for in the folder that the environment variable ``POVID_SHARED`` names, and without the
    variable in the folder ``shared`` beside the checkout.
    """
    path = Path(os.environ.get("POVID_SHARED") or BESIDE) / name
    if not path.exists():
        pytest.skip(f"{path} does not exist; set POVID_SHARED to the folder that holds {name}")
    return path
