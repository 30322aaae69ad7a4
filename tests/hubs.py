"""A Hugging Face hub on this machine, with one data set."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import pytest
from servers import Files

REPOSITORY = "somebody/pairs"
OLD, NEW = "a1" * 20, "b2" * 20  # commits


def publish(files: Files, commit: str, content: Mapping[str, bytes], *revisions: str, **card: str) -> None:
    """Let ``files`` hold a commit of the data set, under its own name and those of branches."""
    listed = [
        {
            "rfilename": name,
            "size": len(data),
            "blobId": "0" * 40,
            "lfs": {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 130},
        }
        for name, data in content.items()
    ]
    info = {"_id": "0", "id": REPOSITORY, "sha": commit, "siblings": listed, "cardData": card, "tags": []}
    for revision in (commit, *revisions):
        files.content[f"/api/datasets/{REPOSITORY}/revision/{revision}"] = json.dumps(info).encode()
    for name, data in content.items():
        files.content[f"/datasets/{REPOSITORY}/resolve/{commit}/{name}"] = data


def use(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let huggingface_hub take a server for the hub."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
