"""Figure 4: probabilities against a plain forward pass per token, training's draw of noise, the choice of pictures."""

from __future__ import annotations

import functools
import json

import pytest
import tiny
import tiny_models
import torch

from povid.analysis.subject import as_seen, compose
from povid.analysis.token_uncertainty import Noise, probabilities, traps
from povid.fault import Fault
from povid.method.distortions import distort_picture, generator
from povid.model.question import Question
from povid.preferences.pictures import open_picture
from povid.preferences.triple import Turn
from povid.training.datamodule import PreferenceDataset

STYLES = {"llava": "vicuna_v1", "llava_vicuna": "vicuna_v1", "instructblip": "bare"}
WORDS = ("dog", "cat", "red bus", "umbrella near")


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    folder = functools.cache(lambda name: tiny_models.save(name, tmp_path_factory.mktemp(name)))
    return lambda name, **changes: tiny.load(
        folder(name), adapted=False, style=STYLES.get(name, "chat"), max_length=256, **changes
    )


@pytest.fixture(scope="module")
def question(tmp_path_factory) -> Question:
    return Question("p", tiny.picture(tmp_path_factory.mktemp("pictures"), "p", 0), "Describe this image.")


def noise(*steps: int, **changes) -> Noise:
    return Noise({**compose([])["noise"], **changes}, steps)


@torch.no_grad()
def one_by_one(policy, template, question, prefix, word, images) -> float:
    """The product over the word's tokens, each from a forward pass of transformers' own that ends before it."""

    def ids_of(text: str) -> list[int]:
        (encoded,), _ = template.encode([(Turn("user", question.text), Turn("assistant", text))], question.image, "p")
        last = max(place for place, marked in enumerate(encoded.response) if marked)
        return encoded.input_ids[:last]

    start, whole = len(ids_of(prefix)), ids_of(f"{prefix} {word}")
    product = 1.0
    for place in range(start, len(whole)):
        ids = torch.tensor([whole[:place]])
        logits = policy.network(
            input_ids=ids, attention_mask=torch.ones_like(ids), **policy.token_kinds(ids), **images
        ).logits
        product *= logits[0, -1].softmax(-1)[whole[place]].item()
    return product


@pytest.mark.parametrize("name", ["llava", "llava_vicuna", "llava_next", "qwen2_5_vl", "instructblip"])
def test_probabilities_are_those_of_single_forward_passes(load, question, name):
    policy, template = load(name)
    views = noise(0, 600).views(template, question, seed=1, record=2)
    found, following = probabilities(policy.eval(), template, question, "A dog and", WORDS, views, batch_size=1)
    together, _ = probabilities(policy, template, question, "A dog and", WORDS, views, batch_size=8)
    torch.testing.assert_close(found, together)
    assert found.shape == (2, 4) and not torch.allclose(found[0], found[1])
    for view, row in zip(views, found.tolist(), strict=True):
        expected = [one_by_one(policy, template, question, "A dog and", word, view) for word in WORDS]
        assert row == pytest.approx(expected, rel=1e-3)
    torch.testing.assert_close(following.sum(-1), torch.ones(2))


def test_nothing_before_the_word(load, question):
    """Without a prefix the word is what the response begins with."""
    policy, template = load("llava")
    views = noise(0).views(template, question, seed=0, record=0)
    found, _ = probabilities(policy.eval(), template, question, "", ["two"], views)
    (prompt,), images = template.encode([(Turn("user", question.text),)], question.image, "p")
    with torch.no_grad():
        logits = policy.network(input_ids=torch.tensor([prompt.input_ids]), **{**images, **views[0]}).logits
    (token,) = template.processor.tokenizer(" two", add_special_tokens=False)["input_ids"]
    assert found.item() == pytest.approx(logits[0, -1].softmax(-1)[token].item(), rel=1e-3)


def test_a_word_must_follow_the_prefix(load, question):
    policy, template = load("llava")
    views = noise(0).views(template, question, seed=0, record=0)
    with pytest.raises(Fault, match="'' cannot follow 'A dog'"):
        probabilities(policy, template, question, "A dog", [""], views)
    with pytest.raises(Fault, match=r"cannot follow .* cut at model.max_length"):
        probabilities(policy, template, question, "A dog " * 400, ["cat"], views)


@pytest.mark.parametrize("space", ["normalized", "pixel"])
def test_views_are_what_training_and_show_draw(load, question, tmp_path, space):
    """A record's noised tensors in the first epoch of a run with the same seed, and what ``show`` draws of it."""
    _, template = load("llava")
    triples = tiny.triples(tmp_path)
    trained = PreferenceDataset(triples, template, tiny.noise(500, space=space), seed=7)
    asked = Question(triples[2].id, triples[2].image, triples[2].question)
    clean, noised = noise(0, 500, space=space).views(template, asked, seed=7, record=2)
    assert torch.equal(noised["pixel_values"], trained[2, 0].noised["pixel_values"])
    assert not torch.equal(noised["pixel_values"], trained[2, 1].noised["pixel_values"])
    if space == "pixel":
        shown = distort_picture(
            tiny.noise(500, space="pixel"), open_picture(asked.image), generator(seed=7, epoch=0, record=2)
        )
        assert torch.equal(noised["pixel_values"], template.see(template.prompt("x"), shown)[1]["pixel_values"])
    assert as_seen(template, clean).size == (32, 32)


def test_a_distortion_without_steps_or_a_step_too_many():
    with pytest.raises(Fault, match="Crop has no steps; choose noise=sigmoid"):
        Noise({"_target_": "mine.Crop", "share": 0.2}, (500,)).at(500)
    with pytest.raises(Fault, match="noise.step: found 1000; the scheduler has steps 0 to 999"):
        noise(1000).at(1000)


def test_pictures_in_which_habit_expects_what_is_not_there(tmp_path):
    """The spoon goes with the knife in 3 of 4 pictures, the cup with the pizza in 1 of 2.

    b has the pair; c lacks the likelier of two partners, the spoon; d knows no partner; e has nothing else in it.
    """
    habits = tmp_path / "habits.json"
    scenes = [["knife", "spoon"]] * 3 + [["knife", "pizza"], ["pizza", "cup"]]
    habits.write_text(json.dumps({f"h{number}": scene for number, scene in enumerate(scenes)}))
    synonyms = {
        "knife": "knife",
        "blade": "knife",
        "spoon": "spoon",
        "pizza": "pizza",
        "cup": "cup",
        "umbrella": "umbrella",
    }

    def ask(name: str, *objects: str) -> Question:
        return Question(name, b"", "?", {"objects": frozenset(objects), "synonyms": synonyms})

    questions = [
        ask("b", "knife", "spoon", "pizza", "cup"),
        ask("c", "knife", "pizza", "umbrella"),
        ask("d", "umbrella"),
        ask("e", "knife"),
    ]
    (trap,) = traps(questions, habits)
    assert (trap.record, trap.mentioned, trap.partner, trap.true) == (1, "knife", "spoon", ("pizza", "umbrella"))
    assert trap.words == {"true": ["a pizza", "an umbrella"], "partner": ["a spoon"]}
    with pytest.raises(Fault, match="knows of no object that is missing"):
        traps(questions[2:], habits)
    with pytest.raises(Fault, match="nowhere"):
        traps(questions, tmp_path / "nowhere.json")
