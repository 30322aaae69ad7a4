"""The fused modules give the numbers that transformers, peft and autograd give for the same weights."""

import copy
import sys
from types import ModuleType, SimpleNamespace

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from pydantic import ValidationError
from torch.nn.functional import silu
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from povid.model.fused import FUSED, fuse
from povid.model.packing import pack

SIZES = {
    "vocab_size": 30,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def random(*shape, seed, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).requires_grad_()


def pair(kind, *, dropout=0.0, bias=False, dtype=torch.float32, checkpointing=False):
    """The same network with LoRA as peft made it, and fused."""
    torch.manual_seed(0)
    if kind == "llama":
        network = LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=bias, mlp_bias=bias)).to(dtype)
    else:
        network = Qwen2ForCausalLM(Qwen2Config(**SIZES)).to(dtype)
    for parameter in network.parameters():
        parameter.data = 0.2 * torch.randn_like(parameter) + (parameter.dim() == 1) * 1.0
    adapted = get_peft_model(
        network.requires_grad_(False), LoraConfig(r=3, lora_alpha=5, lora_dropout=dropout, target_modules="all-linear")
    )
    for parameter in (p for p in adapted.parameters() if p.requires_grad):
        parameter.data += 0.1 * torch.randn_like(parameter)
    if checkpointing:
        network.gradient_checkpointing_enable({"use_reentrant": False})
    fused = copy.deepcopy(adapted)
    fuse(fused.get_base_model(), FUSED)
    return adapted.train(), fused.train()


def test_modules_become_subclasses_and_keep_the_names_of_their_weights():
    for kind in ("llama", "qwen2"):
        stock, fused = pair(kind)
        assert list(fused.state_dict()) == list(stock.state_dict())
        changed = [
            (type(one), type(two)) for one, two in zip(stock.modules(), fused.modules()) if type(one) is not type(two)
        ]
        assert len(set(changed)) == 4 and all(issubclass(two, one) for one, two in changed)


def test_what_has_no_fused_subclass_stays_what_it_is():
    from peft.tuners.lora.layer import Linear as LoraLinear
    from transformers.models.llama.modeling_llama import LlamaMLP

    torch.manual_seed(0)
    network = LlamaForCausalLM(LlamaConfig(**SIZES, hidden_act="gelu"))
    dora = get_peft_model(network, LoraConfig(r=2, use_dora=True, target_modules="all-linear"))
    fuse(dora.get_base_model(), FUSED)
    kinds = {type(module) for module in dora.modules()}
    assert {LlamaMLP, LoraLinear} <= kinds and not {FUSED[LlamaMLP], FUSED[LoraLinear]} & kinds


def test_norm_is_transformers_digit_for_digit_and_its_gradient_is_autograds():
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.03)):
        stock, fused = (network.get_base_model().model.norm for network in pair("llama", dtype=dtype))
        x = random(3, 7, SIZES["hidden_size"], seed=1, dtype=dtype)
        grad = torch.randn(3, 7, SIZES["hidden_size"], generator=torch.Generator().manual_seed(2)).to(dtype)
        assert type(fused) is FUSED[type(stock)] and torch.equal(fused(x), stock(x))
        gradients = [torch.autograd.grad(norm(x), x, grad)[0] for norm in (fused, stock)]
        torch.testing.assert_close(*gradients, rtol=tolerance, atol=tolerance)


def test_mlp_with_lora_has_autograds_gradients_in_float64():
    """Gate, up, their product computed again, and the low-rank products, far below the error of float32."""
    outcomes = []
    for network in pair("llama", bias=True, dtype=torch.float64):
        mlp = network.double().get_base_model().model.layers[0].mlp
        x = random(2, 5, SIZES["hidden_size"], seed=1, dtype=torch.float64)
        weights = [x, *(p for p in mlp.parameters() if p.requires_grad)]
        outcomes.append([mlp(x), *torch.autograd.grad(mlp(x).pow(2).sum(), weights)])
    for stock, fused in zip(*outcomes, strict=True):
        torch.testing.assert_close(fused, stock, rtol=1e-12, atol=1e-12)


def outcome(network, *, embeds=None, autocast=False):
    """Logits, and the gradients of all that is trained."""
    ids = torch.randint(0, 30, (2, 9), generator=torch.Generator().manual_seed(5))
    torch.manual_seed(7)  # dropout
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        inputs = {"input_ids": ids} if embeds is None else {"inputs_embeds": embeds}
        logits = network(**inputs, use_cache=False).logits
    weights = [p for p in network.parameters() if p.requires_grad] + ([] if embeds is None else [embeds])
    return logits, torch.autograd.grad(logits.float().pow(2).mean(), weights)


def close(one, other, rtol, atol):
    torch.testing.assert_close(one[0], other[0], rtol=rtol, atol=atol)
    for ours, theirs in zip(one[1], other[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


def test_network_with_adapter_equals_peft_and_transformers():
    embeds = random(2, 9, SIZES["hidden_size"], seed=3)
    for kind, bias in (("llama", False), ("llama", True), ("qwen2", True)):
        for checkpointing in (False, True):
            stock, changed = pair(kind, bias=bias, checkpointing=checkpointing)
            close(outcome(changed), outcome(stock), 1e-4, 1e-6)
            close(outcome(changed, embeds=embeds), outcome(stock, embeds=embeds), 1e-4, 1e-6)


def test_dropout_is_pefts():
    stock, changed = pair("llama", dropout=0.3)
    close(outcome(changed), outcome(stock), 1e-4, 1e-6)
    torch.manual_seed(8)
    assert not torch.allclose(outcome(changed.eval())[0], outcome(changed.train())[0], atol=1e-3)


def test_mixed_precision_gives_what_peft_gives_within_its_rounding():
    """Frozen weights in bfloat16, the adapter in float32, under autocast, as bf16-mixed trains."""
    stock, changed = pair("llama", dtype=torch.bfloat16)
    assert {p.dtype for p in changed.parameters() if p.requires_grad} == {torch.float32}
    ours, theirs = outcome(changed, autocast=True), outcome(stock, autocast=True)
    torch.testing.assert_close(ours[0], theirs[0], rtol=0.05, atol=0.05)
    for one, other in zip(ours[1], theirs[1], strict=True):
        assert one.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), 0) > 0.99


def test_several_and_merged_adapters_are_left_to_peft():
    stock, changed = pair("llama")
    for network in (stock, changed):
        torch.manual_seed(3)
        network.add_adapter("second", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        network.base_model.set_adapter(["default", "second"])
    close(outcome(changed), outcome(stock), 1e-4, 1e-6)
    ids = torch.arange(6)[None]
    with torch.no_grad():
        expected = stock(ids).logits
        for network in (stock, changed):
            network.merge_adapter()
        torch.testing.assert_close(changed(ids).logits, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(changed(ids).logits, stock(ids).logits)
        for network in (stock, changed):
            network.unmerge_adapter()
        with stock.disable_adapter(), changed.disable_adapter():
            assert torch.equal(changed(ids).logits, stock(ids).logits)


def test_generation_with_a_key_value_cache_is_untouched():
    stock, changed = pair("llama")
    ids = torch.arange(4)[None]
    one, other = (
        network.eval().generate(input_ids=ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
        for network in (stock, changed)
    )
    assert torch.equal(one, other)


def test_attention_weights_can_still_be_seen():
    stock, changed = pair("llama")
    for network in (stock, changed):
        network.get_base_model().set_attn_implementation("eager")
    ids = torch.arange(5)[None]
    with torch.no_grad():
        one, other = (network(ids, output_attentions=True).attentions for network in (stock, changed))
    assert len(one) == len(other) == SIZES["num_hidden_layers"]
    for ours, theirs in zip(other, one):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_the_setting_decides_and_changes_no_score(tmp_path):
    folder = tiny.save_tiny_llava(tmp_path / "tiny")
    (triple,) = tiny.triples(tmp_path)[1:2]
    scores = []
    for fused in (True, False):
        policy, template = tiny.load(folder, fused=fused)
        encoded, images = template.encode((triple.preferred, triple.dispreferred), triple.image, triple.id)
        assert any(type(module) in FUSED.values() for module in policy.modules()) == fused
        with torch.no_grad():
            scores.append(policy.eval().predict(pack([encoded[0]], [encoded[1]]), policy.look(images)))
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-4)


def test_liger_gives_what_transformers_gives(monkeypatch):
    """Its kernels need a GPU; plain functions with their names, arguments and in-place writes stand in for them."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    def norm(x, weight, eps, offset=0.0, casting_mode="llama", in_place=True):
        assert (offset, casting_mode, in_place) == (0.0, "llama", False)
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)

    def rope(query, key, cos, sin, position_ids=None, unsqueeze_dim=1, rotary_dim=None):
        assert query.shape[2] == key.shape[2] == cos.shape[1]
        return apply_rotary_pos_emb(query, key, cos, sin)

    functions = {"liger_rms_norm": norm, "liger_rope": rope, "liger_swiglu": lambda gate, up: silu(gate) * up}
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", SimpleNamespace(**functions))
    from povid.model.liger import LIGER

    monkeypatch.delitem(sys.modules, "povid.model.liger")
    for kind in ("llama", "qwen2"):
        stock, _ = pair(kind)
        changed = copy.deepcopy(stock)
        fuse(changed.get_base_model(), LIGER)
        assert len({type(module) for module in changed.modules()} & set(LIGER.values())) == 4
        close(outcome(changed), outcome(stock), 1e-4, 1e-6)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"fused": "liger"}, "liger-kernel, which is not installed.*povid.liger.*fused=true"),
        ({"fused": "liger", "compile": True}, "exclude each other"),
        ({"compile": True}, "needs a C.. compiler on a CPU"),
    ],
)
def test_what_cannot_run_here_is_said_before_anything_loads(tmp_path, monkeypatch, changes, said):
    monkeypatch.setattr("povid.model.loading.find_spec", lambda name: None)
    monkeypatch.setattr("povid.model.loading.shutil.which", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValidationError, match=said):
        tiny.settings(tmp_path, **changes)
