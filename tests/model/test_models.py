"""Every supported architecture, tiny and random, through the same code: a step, an adapter on disk, a caption."""

from __future__ import annotations

import functools
import inspect
import json
import math
import re
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import tiny_models
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file

from povid.fault import Fault
from povid.method.objectives.dpo import DPO
from povid.method.objectives.povid import POVID
from povid.model.architectures import KNOWN, architecture_of, layer_kinds, lora_targets
from povid.model.generation import Answers
from povid.model.loading import LocalModel
from povid.model.packing import Encoded
from povid.model.policy import Policy
from povid.model.question import Decoding, Question
from povid.training.datamodule import PreferenceDataset, collate
from povid.training.scoring import score

NAMES = ["llava", *tiny_models.MODELS]
STYLES = {"llava": "vicuna_v1", "instructblip": "bare"}
STAGE = tiny.stage("text", "noise")
EQ_5 = POVID()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return functools.cache(lambda name: tiny_models.save(name, tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return tmp_path_factory.mktemp("pictures")


def load(folders, name, **changes):
    return tiny.load(folders(name), style=STYLES.get(name, "chat"), max_length=256, **changes)


def batch_of(pictures, policy, template, *, which=(0, 1, 3), noise=True):
    dataset = PreferenceDataset(
        [tiny.triples(pictures)[i] for i in which], template, tiny.noise() if noise else None, seed=3
    )
    examples = [dataset[i, 0] for i in range(len(which))]
    return examples, collate(examples, POVID.needs if noise else DPO.needs, packable=policy.packable, padding_id=2)


def whole(policy, images, encoded: Encoded):
    """One sequence through transformers' own forward: log-probability of the response and the logits, [T - 1, V]."""
    ids = torch.tensor([encoded.input_ids])
    kinds = {"mm_token_type_ids": (ids == 3).int()} if policy.model_type.startswith("qwen") else {}
    kinds |= {"token_type_ids": (ids == 3).int()} if policy.model_type == "gemma3" else {}
    images = {
        key: value.to(policy.network.dtype) if value.is_floating_point() else value for key, value in images.items()
    }
    logits = policy.network(input_ids=ids, attention_mask=torch.ones_like(ids), **kinds, **images).logits[0, :-1]
    mask, targets = torch.tensor(encoded.response[1:]), ids[0, 1:]
    return (logits.float().log_softmax(-1).gather(-1, targets[:, None])[:, 0] * mask).sum(), logits


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_those_of_the_plain_way(folders, pictures, name):
    """Packed or not, each log-probability is that of a forward pass of its own; with and without its projector."""
    for projector in (True, False):
        policy, template = load(folders, name, train_projector=projector)
        check_scores(policy.eval(), template, pictures)


def check_scores(policy, template, pictures):
    examples, batch = batch_of(pictures, policy, template)
    assert policy.packable
    tokens_N = torch.arange(len(batch.preferred.preferred.token_N)) % 200 + 10  # near ties of random weights flip
    fast = score(policy, batch, POVID.needs, noise_tokens_N=tokens_N)
    with torch.no_grad():
        for context, found in ((None, fast[0]), (policy.reference, fast[1])):
            with context() if context else torch.no_grad():
                for i, example in enumerate(examples):
                    expected = whole(policy, example.images, example.preferred)[0]
                    torch.testing.assert_close(found.preferred[i].detach(), expected, rtol=1e-5, atol=1e-4)
                    expected = whole(policy, example.images, example.dispreferred)[0]
                    torch.testing.assert_close(found.text[i].detach(), expected, rtol=1e-5, atol=1e-4)
                    _, noised = whole(policy, example.noised, example.preferred)
                    rows = torch.tensor(example.preferred.response[1:])
                    chosen = tokens_N[batch.preferred.preferred.example_N == i]
                    expected = noised[rows].log_softmax(-1).gather(-1, chosen[:, None]).sum()
                    torch.testing.assert_close(found.noise[i].detach(), expected, rtol=1e-5, atol=1e-4)
    assert not torch.allclose(fast[0].preferred, fast[1].preferred, atol=1e-3)


SEVERAL = [name for name in NAMES if name != "instructblip"]  # which has a place for one picture


def mixed(pictures):
    """Records with two pictures of different shapes, with none, and with one."""
    short, long, _, uneven = tiny.triples(pictures)
    wide = tiny.picture(pictures, "wide", 9, (64, 24))
    return [replace(short, image=(short.image, wide)), replace(long, image=None), uneven]


@pytest.mark.parametrize("name", SEVERAL)
def test_several_pictures_or_none_give_the_plain_scores_and_gradients(folders, pictures, name):
    """In one batch: log-probabilities and gradients of policy and reference are those of passes of their own."""
    policy, template = load(folders, name)
    policy.eval()
    dataset = PreferenceDataset(mixed(pictures), template, None, seed=3)
    examples = [dataset[i, 0] for i in range(3)]
    batch = collate(examples, DPO.needs, packable=True, padding_id=2)
    lora, projector = policy.trained_parameters()
    ours, reference = score(policy, batch, DPO.needs)
    found = torch.autograd.grad((ours.preferred - 0.5 * ours.text).sum(), lora + projector)
    plain = []
    for side in ("preferred", "dispreferred"):
        plain.append(torch.stack([whole(policy, e.images, getattr(e, side))[0] for e in examples]))
        with policy.reference():
            kept = torch.stack([whole(policy, e.images, getattr(e, side))[0] for e in examples])
        torch.testing.assert_close(reference[side != "preferred"], kept, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close((ours.preferred, ours.text), tuple(plain), rtol=1e-5, atol=1e-4)
    expected = torch.autograd.grad((plain[0] - 0.5 * plain[1]).sum(), lora + projector)
    size = max(gradient.abs().max() for gradient in expected)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-5 * size.item())

    alone = collate([examples[1]], DPO.needs, packable=True, padding_id=2)  # no picture in the whole batch
    only = score(policy, alone, DPO.needs)[0]
    torch.testing.assert_close(only.text, plain[1][1:2], rtol=1e-5, atol=1e-4)
    gradients = torch.autograd.grad(only.text.sum(), projector)  # none missing, for which other devices would wait
    assert all(not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("name", SEVERAL)
def test_a_caption_of_several_pictures_is_that_of_the_plain_way(folders, pictures, name):
    policy, template = load(folders, name)
    policy.eval()
    shown = (tiny.picture(pictures, "a", 1), tiny.picture(pictures, "b", 2, (64, 24)))
    texts, expected = ["What is it", "Describe this image."], []
    for text in texts:
        prompt = template.prompt(text, pictures=2)
        inputs = policy.processor(
            text=[prompt],
            images=[[Image.open(picture) for picture in shown]],
            return_tensors="pt",
            add_special_tokens=not prompt.startswith("<s>"),
        )
        with torch.inference_mode():
            output = policy.network.generate(**inputs, do_sample=False, max_new_tokens=8)
        tokens = output[0, inputs["input_ids"].shape[1] :]
        expected.append(policy.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip())
    questions = [Question(number, shown, text) for number, text in enumerate(texts)]
    assert dict(Answers(policy, template)(questions, Decoding(8))) == dict(enumerate(expected))


def test_several_pictures_are_one_too_many_for_a_style_with_one_place(folders, pictures):
    _, template = load(folders, "instructblip", adapted=False)
    with pytest.raises(Fault, match="record 'short' has 2 pictures, and model.style=bare has a place for one"):
        PreferenceDataset(mixed(pictures), template, None, seed=3)[0, 0]


@pytest.mark.parametrize("name", NAMES)
def test_first_step_starts_at_log_two_and_has_a_gradient(folders, pictures, name):
    policy, template = load(folders, name, perturb=False)
    policy.train()
    module = tiny.module(policy, EQ_5, STAGE, EQ_5.needs)
    _, batch = batch_of(pictures, policy, template)
    loss = module.outcome(batch)[0].loss_B.mean()
    assert loss.item() == pytest.approx(math.log(2), abs=1e-5)
    loss.backward()
    lora, projector = policy.trained_parameters()
    assert projector and any(p.grad is not None and p.grad.norm() > 0 for p in projector)
    assert sum(p.grad.norm() > 0 for p in lora) >= len(lora) // 2  # lora_A has none while lora_B is zero
    trained = {id(p) for p in (*lora, *projector)}
    assert all(p.grad is None for p in policy.parameters() if id(p) not in trained)
    with torch.no_grad():
        for parameter in (*lora, *projector):
            parameter -= 0.05 * parameter.grad
    assert module.outcome(batch)[0].loss_B.mean() < loss


@pytest.mark.parametrize("name", NAMES)
def test_adapter_is_loaded_by_plain_peft_and_merges(folders, pictures, tmp_path, name):
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    policy, template = load(folders, name)
    policy.eval()
    policy.save_adapter(tmp_path / "adapter")
    examples, _ = batch_of(pictures, policy, template, noise=False)
    with torch.no_grad():
        expected = whole(policy, examples[1].images, examples[1].preferred)[1]
        base = AutoModelForImageTextToText.from_pretrained(folders(name))
        plain = Policy(
            PeftModel.from_pretrained(base, tmp_path / "adapter").eval().get_base_model(),
            policy.processor,
            policy.settings,
            adapted=False,
        )
        torch.testing.assert_close(
            whole(plain, examples[1].images, examples[1].preferred)[1], expected, rtol=1e-5, atol=1e-5
        )
        merged = Policy(
            policy.settings.load_model([tmp_path / "adapter"]), policy.processor, policy.settings, adapted=False
        )
        torch.testing.assert_close(
            whole(merged, examples[1].images, examples[1].preferred)[1], expected, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "instructblip"])
def test_earlier_adapters_are_not_rounded_away_in_bfloat16(folders, pictures, tmp_path, name):
    """Two earlier adapters, products a thousandth of the weights: beside them they work, merged they vanish.

    What they add to the queries of the first layer, for 64 random inputs: exactly in float32, then from the bfloat16
    network's products, and from the bfloat16 weights into which they were merged.
    """
    style = {"style": STYLES.get(name, "chat"), "max_length": 256}
    adapters = [tmp_path / "one", tmp_path / "two"]
    for number, adapter in enumerate(adapters):
        policy, template = load(folders, name, perturb=False)
        generator = torch.Generator().manual_seed(number)
        for key, parameter in policy.named_parameters():
            if "lora_B" in key:
                parameter.data += 3e-4 * torch.randn(parameter.shape, generator=generator)
        policy.save_adapter(adapter)
    example = batch_of(pictures, policy, template, noise=False)[0][1]

    def queries(dtype, *earlier, merged=False):
        model = tiny.settings(folders(name), **style, dtype=dtype).load_model(earlier, merged=merged)
        return model, model.get_decoder().layers[0].self_attn.q_proj

    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(9)).bfloat16().float()
    added = queries("float32", *adapters)[1](x) - queries("float32")[1](x)
    assert added.norm() > 0
    model, layer = queries("bfloat16", *adapters)
    products = sum(
        x @ layer.get_buffer(f"earlier_{n}_a").float().T @ layer.get_buffer(f"earlier_{n}_b").float().T for n in (0, 1)
    )
    assert (products - added).norm() < 0.02 * added.norm()
    bare = queries("bfloat16")[1]
    torch.testing.assert_close(layer(x.bfloat16()).float(), bare(x.bfloat16()).float() + added, rtol=0.02, atol=0.02)
    merged = queries("bfloat16", *adapters, merged=True)[1].weight.float() - bare.weight.float()
    assert (x @ merged.T - added).norm() > 0.5 * added.norm()

    policy = Policy(model, template.processor, tiny.settings(folders(name), **style, dtype="bfloat16"), adapted=True)
    with torch.no_grad(), policy.reference():  # the earlier adapters belong to the reference
        found = whole(policy, example.images, example.preferred)[0]
    assert found.isfinite()
    policy.save_adapter(tmp_path / "three")
    assert not any("earlier" in key for key in load_file(tmp_path / "three" / "adapter_model.safetensors"))


def test_earlier_adapters_merged_in_float16_as_the_released_scripts_do(folders, tmp_path):
    """Weights in float16 plus the product, rounded to float16 and then to bfloat16; nothing stays beside them."""
    policy, _ = load(folders, "llava", perturb=False)
    for key, parameter in policy.named_parameters():
        if "lora_B" in key:
            parameter.data += 3e-2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    policy.save_adapter(tmp_path / "one")

    def loaded(*earlier, **changes):
        model = tiny.settings(folders("llava"), **changes).load_model(earlier)
        return model, model.get_decoder().layers[0].self_attn.q_proj.weight

    bare, product = loaded()[1], loaded(tmp_path / "one")[1] - loaded()[1]
    model, found = loaded(tmp_path / "one", dtype="bfloat16", merge="float16")
    expected = (bare.half().float() + product).half().bfloat16()
    assert found.dtype == torch.bfloat16 and not any("earlier" in name for name, _ in model.named_buffers())
    assert (found == expected).float().mean() > 0.99
    assert (found == (bare + product).bfloat16()).float().mean() < 1  # the rounding to float16 shows
    assert (found == loaded(dtype="bfloat16", merge="float16")[1]).float().mean() < 0.9
    assert all(buffer.dtype == torch.float32 for name, buffer in model.named_buffers() if "inv_freq" in name)
    with pytest.raises(ValueError, match="merge and quantize exclude each other"):
        tiny.settings(folders("llava"), merge="float16", quantize="4bit")


@pytest.mark.parametrize("name", NAMES)
def test_captions_are_those_of_the_plain_way(folders, pictures, name):
    policy, template = load(folders, name)
    policy.eval()
    asked = [
        ("p0", (40, 32), "Describe this image."),
        ("p1", (32, 64), "Is there a dog near the bus"),
        ("p0", (40, 32), "What is it"),
    ]
    questions = [
        Question(i, tiny.picture(pictures, f"c{image}", int(image[1]), size), text, {})
        for i, (image, size, text) in enumerate(asked)
    ]
    expected = []
    for question in questions:
        text = template.prompt(question.text)
        special = {"add_special_tokens": not text.startswith("<s>")}
        inputs = policy.processor(text=[text], images=[Image.open(question.image)], return_tensors="pt", **special)
        with torch.inference_mode():
            output = policy.network.generate(**inputs, do_sample=False, max_new_tokens=10)
        tokens = output[0].tolist()
        tokens = tokens[inputs["input_ids"].shape[1] :]
        expected.append(policy.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip())
    assert len(set(expected)) == 3
    answers = dict(Answers(policy, template, batch_size=3)(questions, Decoding(10)))
    assert [answers[i] for i in range(3)] == expected


@pytest.mark.parametrize("name", NAMES)
def test_a_step_in_bfloat16_is_near_float32(folders, pictures, name):
    losses, policies = [], []
    for dtype in ("float32", "bfloat16"):
        torch.manual_seed(1)
        settings = tiny.settings(folders(name), style=STYLES.get(name, "chat"), max_length=256, dtype=dtype)
        policy = settings.policy(adapted=True)
        _, template = load(folders, name)
        _, batch = batch_of(pictures, policy, template)
        generator = torch.Generator().manual_seed(5)
        for parameter in (p for group in policy.trained_parameters() for p in group):
            assert parameter.dtype == torch.float32  # steps of 1e-7 and 2e-5 would be rounded away in bfloat16
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
        tokens_N = torch.arange(len(batch.preferred.preferred.token_N)) % 200 + 10
        outcome = EQ_5(*score(policy, batch, EQ_5.needs, noise_tokens_N=tokens_N), batch.tokens)
        outcome.loss_B.mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for g in policy.trained_parameters() for p in g)
        losses.append(outcome.loss_B.mean().item())
        policies.append(policy)
    assert policies[1].network.get_input_embeddings().weight.dtype == torch.bfloat16
    assert losses[1] == pytest.approx(losses[0], abs=0.1 * losses[0])


@pytest.mark.parametrize("name", ["llava", "llava_onevision", "qwen3_vl", "gemma3"])
def test_gradient_checkpointing_changes_no_digit(folders, pictures, name):
    found = []
    for recompute in (False, True):
        policy, template = load(folders, name, gradient_checkpointing=recompute)
        policy.train()
        _, batch = batch_of(pictures, policy, template)
        module = tiny.module(policy, EQ_5, STAGE, EQ_5.needs)
        passes = []
        policy.network.get_decoder().layers[0].self_attn.register_forward_hook(lambda *_: passes.append(1))  # noqa: B023
        loss = module.outcome(batch)[0].loss_B.mean()
        before = len(passes)
        parameters = [p for group in policy.trained_parameters() for p in group]
        found.append((loss, torch.autograd.grad(loss, parameters)))
        assert (len(passes) > before) == recompute
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_every_known_architecture_is_tested():
    assert set(KNOWN) <= set(NAMES)


def test_an_unknown_architecture_is_scored_the_plain_way(folders, pictures, monkeypatch, caplog):
    monkeypatch.delitem(KNOWN, "llava_next")
    with pytest.raises(Fault, match="projector of 'llava_next' models is not known.*train_projector=false"):
        load(folders, "llava_next")
    policy, template = load(folders, "llava_next", train_projector=False)
    assert not policy.packable and caplog.text.count("cannot be packed") == 1
    check_text_scores(policy.eval(), template, pictures)


def test_a_language_model_is_packed_only_if_a_mask_is_all_it_takes():
    known = KNOWN["llava"]
    kinds = {"full": ["full_attention"], "windows": ["sliding_attention", "full_attention"]}
    packed = {**dict.fromkeys(kinds, True), "linear": False, "chunks": False}
    kinds |= {"linear": ["full_attention", "linear_attention"], "chunks": ["chunked_attention"]}
    assert {name: known.packs(SimpleNamespace(layer_types=kind)) for name, kind in kinds.items()} == packed
    assert known.packs(SimpleNamespace(sliding_window=16)) and layer_kinds(SimpleNamespace()) == ["full_attention"]
    assert not architecture_of("unheard_of").packs(SimpleNamespace())


def test_a_model_with_a_window_in_every_layer_gives_the_plain_scores(folders, pictures, tmp_path):
    """LLaVA-NeXT with Mistral, which takes one mask for all of its layers."""
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration, MistralConfig

    base, processor = tiny_models.llava_next()
    shape = {
        k: v for k, v in base.config.text_config.to_dict().items() if k in inspect.signature(MistralConfig).parameters
    }
    config = base.config.to_dict() | {"text_config": MistralConfig(**shape | {"sliding_window": 12})}
    LlavaNextForConditionalGeneration(LlavaNextConfig(**config)).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    policy, template = tiny.load(tmp_path, style="chat", max_length=256)
    assert policy.packable
    check_text_scores(policy.eval(), template, pictures)


def test_an_architecture_can_come_from_the_settings(folders, pictures, monkeypatch):
    """As keys or as a ``_target_``; without it the model type would be unknown."""
    monkeypatch.delitem(KNOWN, "llava_next")
    keys = {"projector": "multi_modal_projector", "packable": True}
    for node in (keys, {"_target_": "povid.model.architectures.Architecture", **keys}):
        policy, template = load(folders, "llava_next", architecture=node)
        assert policy.packable and policy.trained_parameters()[1]
        check_text_scores(policy.eval(), template, pictures)
    assert policy.settings.model_dump()["architecture"].items() >= keys.items()


def check_text_scores(policy, template, pictures):
    examples, batch = batch_of(pictures, policy, template, noise=False)
    ours, _ = score(policy, batch, DPO.needs)
    for i, example in enumerate(examples):
        expected = whole(policy, example.images, example.dispreferred)[0]
        torch.testing.assert_close(ours.text[i], expected, rtol=1e-5, atol=1e-4)


def test_four_bits_need_bitsandbytes(folders, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(Fault, match="bitsandbytes, which is not installed"):
        tiny.settings(folders("llava"), quantize="4bit").load_model()


def test_four_bits_are_for_the_language_models_layers_alone(folders):
    from transformers.quantizers.quantizers_utils import should_convert_module

    for name in NAMES:
        model = load(folders, name, adapted=False)[0].network
        patterns = architecture_of(model.config.model_type).unquantized()
        linear = [place for place, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        converted = [place for place in linear if should_convert_module(place, patterns)]
        assert converted and converted == [place for place in linear if re.fullmatch(lora_targets(model), place)], name


def test_four_bits_train_and_keep_their_adapter(pictures, tmp_path):
    """On a CPU, with bitsandbytes' own products, which want widths of at least 64: the embedded world's model."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (pip install 'povid[quantize]')")
    policy, template = tiny.load("package:scenes/base", perturb=False, quantize="4bit", max_length=256)
    policy.train()
    kinds = {type(module.get_base_layer()).__name__ for module in policy.network.modules() if hasattr(module, "lora_A")}
    assert kinds == {"Linear4bit"}
    _, batch = batch_of(pictures, policy, template)
    with torch.no_grad():
        score_one(policy.eval(), batch)  # captions are made before training
    ours, theirs = score(policy.train(), batch, DPO.needs)
    torch.testing.assert_close(ours.preferred, theirs.preferred)  # a new adapter changes nothing
    weights = policy.trained_parameters()[0]
    optimizer = torch.optim.AdamW(weights, lr=1e-2)
    before = ours.preferred.sum().item()
    for _ in range(5):
        optimizer.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # torch warns of operators that have no gradient
            (-score(policy, batch, DPO.needs)[0].preferred.sum()).backward()
        assert all(weight.grad is None or weight.grad.isfinite().all() for weight in weights)
        optimizer.step()
    assert score(policy, batch, DPO.needs)[0].preferred.sum().item() > before + 1
    assert torch.equal(score(policy, batch, DPO.needs)[1].preferred, theirs.preferred)
    policy.save_adapter(tmp_path / "adapter")
    again = Policy(
        policy.settings.load_model([tmp_path / "adapter"]), policy.processor, policy.settings, adapted=False
    ).eval()
    with torch.no_grad():  # the adapter's product is added to the layer's in another order
        torch.testing.assert_close(score_one(again, batch), score_one(policy.eval(), batch), rtol=1e-4, atol=1e-3)


def score_one(policy, batch):
    return policy.predict(batch.pairs, policy.look(batch.images))


def test_models_that_need_an_image_say_so(folders):
    policy, template = load(folders, "instructblip", adapted=False)
    with pytest.raises(Fault, match="'text only' has no image, and 'instructblip'"):
        list(Answers(policy, template)([Question("text only", None, "What is it", {})], Decoding(4)))


def test_questions_without_an_image(folders):
    texts = ["What is it", "Is there a dog near the bus in town"]
    questions = [Question(i, None, text, {}) for i, text in enumerate(texts)]
    for name in (name for name in tiny_models.MODELS if name != "instructblip"):
        policy, template = load(folders, name, adapted=False)
        tokenizer, expected = policy.processor.tokenizer, []
        for text in texts:
            prompt = template.prompt(text, pictures=0)
            inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
            with torch.inference_mode():
                output = policy.eval().network.generate(**inputs, do_sample=False, max_new_tokens=8)
            tokens = output[0, inputs["input_ids"].shape[1] :]
            expected.append(tokenizer.decode(tokens, skip_special_tokens=True).strip())
        answers = dict(Answers(policy, template)(questions, Decoding(8)))
        assert [answers[0], answers[1]] == expected, name


def test_a_model_that_is_not_there_is_a_fault(tmp_path):
    with pytest.raises(Fault, match="is neither a folder nor the name of something on the hub"):
        tiny.settings(tmp_path / "absent").policy(adapted=False)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(Fault, match="no image and text processor for 'llama'"):
        tiny.settings(tmp_path / "text").load_processor()


def test_settings_are_checked():
    """A wrong type, a value out of bounds, an unknown key: none passes, and the dump is plain JSON."""
    good = tiny.settings("somewhere")
    assert json.loads(json.dumps(good.model_dump())) == good.model_dump()
    assert LocalModel(**good.model_dump()) == good
    for changes in (
        {"max_length": 0},
        {"max_length": True},
        {"max_length": "128"},
        {"dtype": "int8"},
        {"style": "vicuna"},
        {"quantize": "8bit"},
        {"fused": 1},
        {"lora": {"r": 0}},
        {"lora": {"alpha": 0}},
        {"lora": {"dropout": 1.0}},
        {"lora": {"rank": 4}},
        {"path": "package:scenes/absent"},
        {"architecture": {"projectors": "x"}},
        {"architecture": {"_target_": "povid.model.architectures.Absent"}},
        {"train_projektor": False},
    ):
        with pytest.raises(ValidationError):
            tiny.settings("somewhere", **changes)
            pytest.fail(f"accepted {changes}")


@pytest.mark.parametrize("kind", ["several layers", "a SigLIP tower"])
def test_a_llava_that_reads_its_tower_in_another_way(tmp_path, pictures, kind):
    """Not LLaVA-1.5, whose tower is cut short, but its model type: the features come from transformers' own code."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, SiglipVisionConfig

    base, processor = tiny_models.llava_vicuna()
    changes = (
        {"vision_feature_layer": [-2, -3]}
        if kind == "several layers"
        else {
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "full",
            "vision_config": SiglipVisionConfig(
                hidden_size=24,
                intermediate_size=48,
                num_hidden_layers=3,
                num_attention_heads=2,
                image_size=32,
                patch_size=8,
                vision_use_head=False,
            ),
        }
    )
    config = {
        "vision_config": base.config.vision_config,
        "text_config": base.config.text_config,
        "image_token_id": base.config.image_token_id,
        "vision_feature_select_strategy": "default",
        **changes,
    }
    LlavaForConditionalGeneration(LlavaConfig(**config)).save_pretrained(tmp_path)
    if kind == "a SigLIP tower":
        processor = LlavaProcessor(
            processor.image_processor,
            processor.tokenizer,
            patch_size=8,
            vision_feature_select_strategy="full",
            num_additional_image_tokens=0,
        )
    processor.save_pretrained(tmp_path)
    policy, template = tiny.load(tmp_path)
    check_text_scores(policy.eval(), template, pictures)


def test_a_served_model_is_evaluated_like_any_other(tmp_path):
    """train.py's own route: no policy is loaded, the benchmarks are answered, results.json names the model."""
    from hydra import compose, initialize_config_dir
    from servers import ChatServer, Say

    from povid.run.experiment import run

    conf = str(Path(__file__).resolve().parents[2] / "conf")
    with ChatServer(lambda body, n: Say("Yes")) as server, initialize_config_dir(conf, version_base="1.3"):
        cfg = compose(
            "config",
            overrides=[
                "model=served",
                "model.model=somebody",
                f"model.base_url={server.url}",
                f"outputs={tmp_path}/out",
                "data.prepare.preferences=4",
                "data.prepare.evaluation=2",
                "data.prepare.tuning=2",
                "samples=0",
                "logger=csv",
                "benchmarks=[pope]",
            ],
        )
        results = run(cfg, tmp_path / "run")
        asked = len(server.requests)
    assert results["model"] == "somebody" and results["ablation"] == "none"
    assert results["benchmarks"]["pope"]["yes_ratio"] == 100 and asked > 0
    with initialize_config_dir(conf, version_base="1.3"), pytest.raises(Fault, match="'both' trains and a served"):
        run(compose("config", overrides=["model=served", "ablation=both"]), tmp_path / "other")
