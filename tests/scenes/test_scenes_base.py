"""The shipped base model: loads like any LLaVA, sees, speaks and answers, and hallucinates for the stated reason."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from povid.fault import Fault
from povid.scenes import build as making
from povid.scenes.architecture import FOLDER, make_model, make_processor
from povid.scenes.measure import answers_of, measure
from povid.scenes.painter import paint
from povid.scenes.scene import BASE_PARTNER, HARD_PARTNER, Scene, Thing, draw_scene
from povid.scenes.training import GRID, Course, pack, patch_labels, pixels, teach
from povid.scenes.vocabulary import KINDS, NAMES
from povid.scenes.world import prepare

FEW = Course(see=3, align=2, speak=2, answer=2, pictures=4, spoken=3)


def scenes(number: int) -> list[Scene]:
    rng = np.random.default_rng(8)
    return [draw_scene(rng, BASE_PARTNER) for _ in range(number)]


def test_base_loads_as_any_llava_in_float32_from_a_file_of_a_few_megabytes():
    model, processor = AutoModelForImageTextToText.from_pretrained(FOLDER), AutoProcessor.from_pretrained(FOLDER)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert 2_300_000 < sum(parameter.numel() for parameter in model.parameters()) < 2_400_000
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert (FOLDER / "model.safetensors").stat().st_size < 6e6
    assert processor.tokenizer.padding_side == "left"
    inputs = processor(
        images=[paint(scene) for scene in scenes(2)],
        padding=True,
        return_tensors="pt",
        text=["USER: <image>\nDescribe this image. ASSISTANT:", "USER: <image>\nHi. ASSISTANT:"],
    )
    assert (inputs["input_ids"] == model.config.image_token_id).sum(1).tolist() == [GRID**2] * 2
    assert inputs["input_ids"][1, 0] == processor.tokenizer.pad_token_id
    assert model(**inputs).logits.shape[0] == 2


def test_training_sees_what_the_processor_shows():
    processor, drawn = AutoProcessor.from_pretrained(FOLDER), scenes(3)
    shown = processor.image_processor([paint(scene) for scene in drawn], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels(drawn), shown, atol=1e-5, rtol=0)


def test_every_name_is_as_many_tokens_as_words_and_the_tokenizer_can_be_rebuilt():
    shipped, made = AutoProcessor.from_pretrained(FOLDER).tokenizer, make_processor().tokenizer
    assert shipped.get_vocab() == made.get_vocab()
    for kind in KINDS.values():
        for word in kind.names:
            assert len(shipped(" " + word, add_special_tokens=False).input_ids) == len(word.split())
    text = "USER: \nIs there a zebra? ASSISTANT: No, naïvely."
    assert shipped.decode(shipped(text).input_ids, skip_special_tokens=True) == text


def test_patch_labels_name_what_each_patch_shows():
    """A book of 32 pixels, whose glyph fills its square, at the top left covers the first two patches of two rows."""
    labels = patch_labels(Scene("", (Thing("book", ((0, 0, 32),)),), 0)).reshape(GRID, GRID)
    expected = np.full((GRID, GRID), len(NAMES))
    expected[:2, :2] = NAMES.index("book")
    assert (labels == expected).all()


def test_packed_conversations_are_scored_as_if_each_were_alone():
    torch.manual_seed(0)
    processor = make_processor()
    model = make_model(processor.tokenizer).eval()
    prefix, first, second = [1, 4, 9], ([10, 11], [12, 13, 2]), ([20, 21, 22], [23, 2])
    packed = pack(prefix, [[first, second], [second]], pad=3)
    with torch.no_grad():
        together = model.model.language_model(
            input_ids=packed["ids"], attention_mask=packed["mask"], position_ids=packed["positions"]
        ).last_hidden_state
        for row, number, (prompt, response) in ((0, 0, first), (0, 1, second), (1, 0, second)):
            alone = model.model.language_model(input_ids=torch.tensor([prefix + prompt + response])).last_hidden_state
            places = packed["segments"][row] == number
            torch.testing.assert_close(together[row, places], alone[0, len(prefix) :], atol=1e-5, rtol=1e-5)
            assert packed["labels"][row, places].tolist() == [-100] * (len(prompt) - 1) + response + [-100]


def test_the_course_is_repeatable_and_freezes_the_vision_tower():
    def lines_of_a_run() -> list[str]:
        lines: list[str] = []
        processor, vision = make_processor(), {}
        torch.manual_seed(1)
        model = make_model(processor.tokenizer)
        for part in teach(processor, model, 1, FEW, lines.append):
            now = {name: weight.clone() for name, weight in model.model.vision_tower.state_dict().items()}
            assert part == "see" or all(torch.equal(now[name], vision[name]) for name in now)
            vision = now
        return [line.rsplit(",", 1)[0] for line in lines]  # without the seconds it took

    first = lines_of_a_run()
    assert len(first) == 4 and first == lines_of_a_run()


def test_base_hallucinates_where_habit_fails_and_hardly_elsewhere(tmp_path):
    """60 new scenes of each kind; a standard error of CHAIR_S is about 6 points."""
    answers = answers_of()
    hard, habitual = (
        measure(
            answers,
            prepare(tmp_path / str(partner), seed=9, preferences=0, tuning=60, evaluation=0, partner=partner)
            / "tuning",
        )
        for partner in (HARD_PARTNER, BASE_PARTNER)
    )
    assert 45 < hard["CHAIR_S"] < 90 and habitual["CHAIR_S"] < 30
    assert hard["coverage"] > 55 and habitual["coverage"] > 75
    assert 75 < hard["POPE_F1"] < habitual["POPE_F1"] and habitual["POPE_F1"] > 85
    assert 12 < hard["words"] < 30


def test_build_refuses_a_folder_that_exists(tmp_path):
    with pytest.raises(Fault, match="already exists"):
        making.build(tmp_path)


def test_short_build_writes_what_is_shipped(tmp_path, capsys, monkeypatch):
    """Nine steps teach nothing worth measuring, so the shipped model's figures replace the measurement, but the files
    must be complete and their weights must load."""
    shipped = json.loads((FOLDER / "figures.json").read_text())
    monkeypatch.setattr(making, "measure_base", lambda folder: answers_of(folder) and shipped)
    figures = making.build(tmp_path / "base", seed=3, course=FEW)
    assert {file.name for file in (tmp_path / "base").iterdir()} == {file.name for file in FOLDER.iterdir()} - {
        "CARD.md"
    }
    assert set(figures) == {"tuning", "habitual"}
    assert "shipped" in capsys.readouterr().out


@pytest.mark.slow
def test_rebuilt_base_is_like_the_shipped_one(tmp_path):
    """The whole course with the shipped seed. Threads add floats in a different order on other machines, so figures may
    differ by a few standard errors (2.8 points of CHAIR_S at 300 captions)."""
    made, shipped = making.build(tmp_path / "base"), json.loads((FOLDER / "figures.json").read_text())
    for split, bounds in (
        ("tuning", {"CHAIR_S": 10, "coverage": 7, "POPE_F1": 4}),
        ("habitual", {"CHAIR_S": 10, "coverage": 7, "POPE_F1": 4}),
    ):
        for key, bound in bounds.items():
            assert abs(made[split][key] - shipped[split][key]) < bound, (split, key)
