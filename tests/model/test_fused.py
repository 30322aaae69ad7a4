"""What povid.model.fused computes against what transformers, peft and autograd make of the same modules."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from povid.model.fused import _Gated, _LowRank, _Normed, _Turned, lighten

SIZES = {
    "vocab_size": 30,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def random(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).requires_grad_()


def test_low_rank_product_has_the_right_gradient():
    wide, x, a, b = random(5, 6, seed=0), random(5, 4, seed=1), random(2, 4, seed=2), random(6, 2, seed=3)

    def product(wide, x, a, b):
        return _LowRank.apply(wide.clone(), x, a, b, 0.7)

    torch.testing.assert_close(product(wide, x, a, b), wide + 0.7 * x @ a.T @ b.T)
    assert torch.autograd.gradcheck(product, (wide, x, a, b))


def test_low_rank_product_makes_its_input_again_from_gate_and_up():
    gate, up, a, b = random(5, 4, seed=0), random(5, 4, seed=1), random(2, 4, seed=2), random(6, 2, seed=3)

    def product(gate, up, a, b):
        return _LowRank.apply(
            torch.zeros(5, 6, dtype=gate.dtype), _Gated.apply(gate, up), a, b, 0.7, gate.detach(), up.detach()
        )

    torch.testing.assert_close(product(gate, up, a, b), 0.7 * (nn.functional.silu(gate) * up) @ a.T @ b.T)
    assert torch.autograd.gradcheck(product, (gate, up, a, b))


def test_rotary_embedding_has_the_right_gradient():
    x, cos, sin = random(2, 3, 5, 8, seed=0), random(2, 1, 5, 8, seed=1).detach(), random(2, 1, 5, 8, seed=2).detach()
    assert torch.autograd.gradcheck(lambda x: _Turned.apply(x, cos, sin), (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_is_transformers_digit_for_digit_and_its_gradient_is_autograds(dtype):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = LlamaRMSNorm(16).to(dtype)
    norm.weight.data.copy_(random(16, seed=0))
    norm.requires_grad_(False)
    x = random(3, 7, 16, seed=1, dtype=dtype)
    grad = random(3, 7, 16, seed=2, dtype=dtype).detach()
    expected = norm(x)
    ours = _Normed.apply(x, norm.weight, norm.variance_epsilon)
    assert torch.equal(ours, expected)
    tolerance = 1e-5 if dtype is torch.float32 else 0.03
    torch.testing.assert_close(
        torch.autograd.grad(ours, x, grad)[0], torch.autograd.grad(expected, x, grad)[0], rtol=tolerance, atol=tolerance
    )


def pair(kind, *, dropout=0.0, bias=False, dtype=torch.float32, checkpointing=False):
    """The same network with LoRA as peft made it, and changed."""
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
    other = copy.deepcopy(adapted)
    lighten(other.get_base_model())
    assert any("forward" in vars(module) for module in other.modules())
    return adapted.train(), other.train()


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


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind, bias", [("llama", False), ("llama", True), ("qwen2", True)])
def test_network_with_adapter_equals_peft_and_transformers(kind, bias, checkpointing):
    stock, changed = pair(kind, bias=bias, checkpointing=checkpointing)
    embeds = random(2, 9, SIZES["hidden_size"], seed=3, dtype=torch.float32)
    close(outcome(changed), outcome(stock), 1e-4, 1e-6)
    close(outcome(changed, embeds=embeds), outcome(stock, embeds=embeds), 1e-4, 1e-6)


def test_dropout_drops_what_pefts_does():
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


def test_more_adapters_than_one_or_merged_ones_are_left_to_peft():
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
