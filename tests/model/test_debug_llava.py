"""Both stages on real photographs, with LLaVA-1.5's architecture in small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from shared import shared

from povid.method.objectives.dpo import DPO
from povid.run.data import load_triples
from povid.run.experiment import run
from povid.run.settings import build
from povid.training.scoring import score

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    sample = shared("real_sample")
    folder = tmp_path_factory.mktemp("debug")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose(
            "config",
            overrides=[
                "data=povid_17k",
                f"data.root={sample}",
                "data.file=preferences.json",
                "data.workers=0",
                "model=llava_debug",
                "stages.1.max_steps=3",
                "stages.2.max_steps=2",
                "stages.1.lr=1e-3",
                "stages.2.lr=1e-3",
                f"outputs={folder}/outputs",
                "benchmarks=[pope]",
                "samples=2",
            ],
        )
    return cfg, folder / "run", run(cfg, folder / "run")


def test_both_stages_train_and_save(ran):
    _, folder, results = ran
    assert [results["stages"][stage]["steps"] for stage in ("1", "2")] == [3, 2]
    assert results["stages"]["2"]["init_from"] == ["stage_1/adapter"]
    lines = (folder / "stage_1" / "metrics.csv").read_text().splitlines()
    first = dict(zip(lines[0].split(","), lines[1].split(",")))
    assert float(first["loss"]) == pytest.approx(0.6931472, abs=1e-4)  # log 2: the policy is its reference


def test_it_is_llava_1_5_in_small(ran):
    cfg, _, _ = ran
    settings = build(cfg)
    policy = settings.model.policy(adapted=False)
    template = settings.model.template(policy.processor)
    config = policy.network.config
    assert (config.model_type, config.vision_config.image_size, config.vision_feature_layer) == ("llava", 336, -2)
    triple = load_triples(settings)[0]
    (encoded, _), images = template.encode((triple.preferred, triple.dispreferred), triple.image, triple.id)
    assert encoded.input_ids.count(config.image_token_id) == 576 and images["pixel_values"].shape == (1, 3, 336, 336)
    assert template.prompt("What?").startswith("A chat between a curious user and an artificial intelligence assistant")


def test_the_adapter_comes_back(ran):
    """The policy of stage 2, loaded from disk, scores differently from the base."""
    from povid.training.datamodule import PreferenceDataset, collate

    cfg, _folder, results = ran
    settings = build(cfg)
    scored = []
    for adapters in ([], [Path(adapter) for adapter in results["adapters"]]):
        policy = settings.model.policy(adapters, adapted=True)
        template = settings.model.template(policy.processor)
        dataset = PreferenceDataset(load_triples(settings)[:1], template, None, 0)
        batch = collate([dataset[0, 0]], DPO.needs, packable=True, padding_id=2)
        with torch.no_grad():
            scored.append(score(policy.eval(), batch, DPO.needs)[0].preferred)
    assert not torch.allclose(*scored)


def test_photographs_are_captioned_and_missing_benchmarks_reported(ran):
    _, folder, results = ran
    page = (folder / "captions.html").read_text()
    assert page.count("data:image/") == 4  # two photographs and their noised pictures
    assert results["benchmarks"]["pope"]["missing"] and "fetch pope" in results["benchmarks"]["pope"]["cure"]
    assert json.loads((folder / "results.json").read_text())["model"] == "llava_debug"
