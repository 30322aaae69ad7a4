from __future__ import annotations

import pytest
import torch

from povid.run.processes import device


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, 0),
        ({"LOCAL_RANK": "3"}, 3),
        ({"SLURM_LOCALID": "5"}, 1),  # a task that sees four GPUs
        ({"LOCAL_RANK": "2", "SLURM_LOCALID": "7"}, 2),
    ],
    ids=str,
)
def test_each_process_loads_onto_its_own_gpu(monkeypatch, environment, place):
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert device() == torch.device("cuda", place)


def test_without_gpus_it_is_the_cpu():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert device() == torch.device("cpu")
