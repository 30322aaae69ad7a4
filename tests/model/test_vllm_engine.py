"""vLLM as an engine, against a stand-in that has its names and signatures and records what it is given.

vLLM itself is not installed here, so these tests say what would be sent to it, not what it answers.
"""

from __future__ import annotations

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny
import torch
from forks import composed, finish, settings

from povid.fault import Fault
from povid.files import digest
from povid.model.generation import Answers
from povid.model.question import Decoding, Question, Share
from povid.run.settings import build

STAND_IN = """
import os
from types import SimpleNamespace

engines = []


class SamplingParams:
    def __init__(self, *, n=1, temperature=1.0, top_p=1.0, top_k=0, seed=None, stop=None, stop_token_ids=None,
                 include_stop_str_in_output=False, ignore_eos=False, max_tokens=16, detokenize=True,
                 skip_special_tokens=True):
        vars(self).update(temperature=temperature, seed=seed, stop=stop, stop_token_ids=stop_token_ids,
                          include_stop_str_in_output=include_stop_str_in_output, max_tokens=max_tokens)


class LLM:
    def __init__(self, model, *, tokenizer=None, dtype="auto", quantization=None, seed=0, tensor_parallel_size=1,
                 gpu_memory_utilization=0.9, enforce_eager=False, mm_processor_kwargs=None, **engine_args):
        known = {"max_num_seqs", "limit_mm_per_prompt", "enable_lora", "max_lora_rank", "max_loras", "max_model_len"}
        assert set(engine_args) <= known, set(engine_args) - known
        self.made = {"model": model, "dtype": dtype, "seed": seed, **engine_args}
        self.environment = dict(os.environ)
        self.calls = []
        engines.append(self)

    def generate(self, prompts, sampling_params=None, *, use_tqdm=True, lora_request=None, priority=None):
        assert len(prompts) == len(sampling_params)
        self.calls.append((prompts, sampling_params, lora_request))
        if any(len(prompt["prompt_token_ids"]) > 100 for prompt in prompts):
            raise ValueError("The decoder prompt is longer than the maximum model length")
        return [SimpleNamespace(outputs=[SimpleNamespace(text="", token_ids=prompt["prompt_token_ids"][-4:-1])])
                for prompt in prompts]
"""
REQUEST = """
from dataclasses import dataclass


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str = ""
"""


@pytest.fixture
def vllm(monkeypatch, tmp_path):
    place = tmp_path / "stand_in" / "vllm"
    (place / "lora").mkdir(parents=True)
    (place / "__init__.py").write_text(STAND_IN)
    (place / "lora" / "__init__.py").write_text("")
    (place / "lora" / "request.py").write_text(REQUEST)
    monkeypatch.syspath_prepend(place.parent)
    import vllm

    yield vllm
    for name in ("vllm", "vllm.lora", "vllm.lora.request"):
        sys.modules.pop(name, None)


@pytest.fixture
def engine(vllm, tmp_path):
    from povid.model.vllm_engine import VLLM

    return VLLM(folder=tmp_path / "merged", arguments={"max_model_len": 300})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.save_tiny_llava(tmp_path_factory.mktemp("vllm") / "tiny")


def adapter(folder: Path, place: Path, **changes) -> Path:
    policy, _ = tiny.load(folder, **changes)
    policy.save_adapter(place)
    return place


@pytest.mark.parametrize("style", [{"style": "vicuna_v1", "system": "A chat.", "pad_square": True}, {}])
def test_prompts_are_those_of_the_models_own_generation(engine, vllm, folder, tmp_path, style):
    """The same tokens once the picture's one is replaced by as many as the processor makes, and the same pixels."""
    model = tiny.settings(folder, **style)
    pictures = [tiny.picture(tmp_path, f"p{n}", n, (40, 24)) for n in range(2)]
    questions = [Question(n, pictures[n % 2], f"Is there a dog {'near it ' * n}") for n in range(4)]
    questions.append(Question("none", None, "What is it"))
    answers = engine.answerer(model, batch_size=2, seed=3)
    texts = dict(answers(questions, Decoding(7, stop=".")))

    own = Answers(*tiny.load(folder, adapted=False, **style))
    groups = {i: (g, n) for g in own._prepare(questions, [[0], [1], [2], [3], [4]]) for n, i in enumerate(g.indices)}
    processor, (made,) = own.template.processor, vllm.engines
    (prompts, sampling, lora), *_ = made.calls
    for index, prompt in enumerate(prompts):
        group, row = groups[index]
        image = processor.image_token_id
        count = group.prompts[row].count(image)
        assert prompt["prompt_token_ids"].count(image) == min(count, 1)
        expanded = [t for token in prompt["prompt_token_ids"] for t in [token] * (count if token == image else 1)]
        assert expanded == group.prompts[row]
        if "multi_modal_data" in prompt:
            seen = processor.image_processor(images=[prompt["multi_modal_data"]["image"]], return_tensors="pt")
            assert torch.equal(seen["pixel_values"], group.images["pixel_values"])
        tokens = prompt["prompt_token_ids"][-4:-1]
        assert texts[index] == processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()
    assert [("multi_modal_data" in prompt) for prompt in prompts] == [True] * 4 + [False]
    assert made.made == {
        "model": str(folder), "dtype": "float32", "seed": 3, "max_num_seqs": 2, "limit_mm_per_prompt": {"image": 1},
        "max_model_len": 300,
    }  # fmt: skip
    assert lora is None and vars(sampling[0]) == {
        "temperature": 0.0, "seed": None, "stop": ["."], "include_stop_str_in_output": True, "max_tokens": 7,
        "stop_token_ids": [processor.tokenizer.eos_token_id],
    }  # fmt: skip


def test_sampling_shares_and_a_prompt_that_is_refused(engine, vllm, folder, tmp_path):
    pictures = [tiny.picture(tmp_path, f"p{n}", n) for n in range(3)]
    questions = [Question(n, pictures[n % 3], f"Q{n}") for n in range(6)]
    answers = engine.answerer(tiny.settings(folder), batch_size=2, seed=3, share=Share(1, 2))
    assert [index for index, _ in answers(questions, Decoding(7, temperature=0.5))] == [1, 4], "the second picture's"
    seeds = [sampling.seed for sampling in vllm.engines[-1].calls[0][1]]
    assert seeds == [questions[n].seed(3) for n in (1, 4)] and len(set(seeds)) == 2
    with pytest.raises(Fault, match="vLLM refuses a question among the 1 from 'long' on: The decoder prompt is longer"):
        list(answers([*questions[:1], Question("long", pictures[1], "dog " * 200)], Decoding(7)))


def test_one_adapter_is_added_and_several_are_merged_once(engine, vllm, folder, tmp_path):
    from safetensors.torch import load_file

    model, plain = tiny.settings(folder), {"train_projector": False}
    one, two = adapter(folder, tmp_path / "one", **plain), adapter(folder, tmp_path / "two", **plain)
    trained = adapter(folder, tmp_path / "trained")
    engine.answerer(model, [one], batch_size=2)
    assert vllm.engines[-1].made["model"] == str(folder)
    answers = engine.answerer(model, [one], batch_size=2)
    list(answers([Question(0, None, "Q")], Decoding(3)))
    (_, _, lora), *_ = vllm.engines[-1].calls
    assert (lora.lora_int_id, lora.lora_path) == (1, str(one)) and vllm.engines[-1].made["max_lora_rank"] == 8
    assert not (tmp_path / "merged").exists()
    for chain in ([one, two], [trained]):
        engine.answerer(model, chain, batch_size=2)
        merged = Path(vllm.engines[-1].made["model"])
        assert "enable_lora" not in vllm.engines[-1].made and merged.parent == tmp_path / "merged"
        wanted = model.load_model(chain, merged=True).state_dict()
        written = load_file(merged / "model.safetensors")
        name = next(name for name in written if "q_proj" in name and "language_model" in name)
        torch.testing.assert_close(written[name], next(wanted[n] for n in wanted if n.endswith(name.split("layers")[1])
                                                       and "language_model" in n))  # fmt: skip
        assert (merged / "tokenizer.json").exists()
        before = digest(merged / "model.safetensors"), (merged / "model.safetensors").stat().st_mtime_ns
        engine.answerer(model, chain, batch_size=2)
        assert before == (digest(merged / "model.safetensors"), (merged / "model.safetensors").stat().st_mtime_ns)
    assert len([place for place in (tmp_path / "merged").iterdir() if place.is_dir()]) == 2


def test_each_process_starts_its_engine_on_its_own_gpu(engine, vllm, folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for visible, seen in ((None, "1"), ("4,6", "6")):
        monkeypatch.setenv("LOCAL_RANK", "1")
        if visible:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        else:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        engine.answerer(tiny.settings(folder), batch_size=2, device=torch.device("cuda", 1), share=Share(1, 2))
        environment = vllm.engines[-1].environment
        assert environment["CUDA_VISIBLE_DEVICES"] == seen and "LOCAL_RANK" not in environment
        assert os.environ["LOCAL_RANK"] == "1" and os.environ.get("CUDA_VISIBLE_DEVICES") == visible


def test_a_run_answers_through_the_engine_under_an_identity_of_its_own(vllm, folder, tmp_path):
    common = (f"model.path={folder}", "ablation=none", "benchmarks=[pope]")
    command = [*settings(tmp_path, *common), "generation.engine=vllm", "generation.batch_size=5"]
    assert finish(command, tmp_path / "run") == 0, (tmp_path / "run.log").read_text()
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    parts = results["identity"]["parts"]
    assert parts["generation.engine._target_"] == "povid.model.vllm_engine.VLLM"
    assert parts["generation.batch_size"] == results["decoding"]["pope"]["batch_size"] == 5
    assert "versions.vllm" in parts and "generation.engine.folder" not in parts
    assert results["benchmarks"]["pope"]["decoding"]["max_new_tokens"]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["model=served"], "generation.engine: model 'default' is not loaded here and answers by itself"),
        (["model.quantize=4bit"], "generation.engine: vLLM would load whole weights, which are another model"),
        (["model.dtype=float64"], "generation.engine: vLLM computes in float32 at most; set model.dtype=float32"),
        (["model=instructblip"], "generation.engine: vLLM needs a prompt that marks the picture"),
        (["+generation.engine.arguments.seed=3"], "generation.engine.arguments: the run sets seed itself"),
    ],
)
def test_what_the_engine_cannot_do_is_said_before_anything_loads(vllm, overrides, sentence):
    with pytest.raises(Fault) as fault:
        build(composed("generation.engine=vllm", "ablation=none", *overrides))
    assert sentence in str(fault.value)


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_one_sentence_says_how_to_install_it():
    with pytest.raises(Fault) as fault:
        build(composed("generation.engine=vllm", "ablation=none"))
    assert "generation.engine: vLLM is not installed: pip install 'povid[vllm]'" in str(fault.value)
