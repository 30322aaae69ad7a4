"""Answers in batches, with shared prefixes and finished rows dropped, are token for token the plain way's."""

from __future__ import annotations

import pytest
import tiny
import tiny_models
import torch
from PIL import Image

from povid.fault import Fault
from povid.model.generation import Answers, Group, split
from povid.model.key_values import ROOM, RoomyLayer, bytes_per_token, key_values
from povid.model.question import Decoding, Question

TEXTS = (
    "Is there a dog",
    "Is there a cat near the bus in town , a red bus , and two people with umbrella",
    "What is it",
    "Describe this image.",
    "Is there a dog near a tree",
)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """The tiny LLaVA with an adapter that is not zero."""
    return tiny.load(tiny.save_tiny_llava(tmp_path_factory.mktemp("tiny"), seed=3))


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Three images of different shapes with one, two and five questions, in a mixed order, and one given as bytes."""
    folder = tmp_path_factory.mktemp("pictures")
    pictures = [tiny.picture(folder, f"q{i}", i, size) for i, size in enumerate([(40, 32), (32, 56), (30, 30)])]
    made = [
        Question(f"{p}-{t}", pictures[p], TEXTS[t], {})
        for p, t in [(2, 0), (1, 1), (0, 3), (2, 1), (2, 2), (1, 4), (2, 3), (2, 4)]
    ]
    return [*made, Question("bytes", pictures[1].read_bytes(), TEXTS[3], {})]


def plain_tokens(loaded, question: Question, limit: int) -> list[int]:
    """One question at a time through transformers' own greedy generation, on the whole prompt."""
    policy, template = loaded
    tokenizer = template.processor.tokenizer
    text = (
        f"USER: <image>\n{question.text} ASSISTANT:"
        if question.image is not None
        else (f"USER: {question.text} ASSISTANT:")
    )
    if question.image is None:
        inputs = tokenizer(text, return_tensors="pt")
    elif isinstance(question.image, bytes):
        from io import BytesIO

        inputs = template.processor(text=text, images=Image.open(BytesIO(question.image)), return_tensors="pt")
    else:
        inputs = template.processor(text=text, images=Image.open(question.image), return_tensors="pt")
    policy.eval()
    with torch.inference_mode():
        output = policy.network.generate(**inputs, do_sample=False, max_new_tokens=limit)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


def plain(loaded, question: Question, limit: int, stop: str | None = None) -> str:
    tokenizer, tokens = loaded[1].processor.tokenizer, plain_tokens(loaded, question, limit)
    if stop is not None:
        for end in range(1, len(tokens) + 1):
            if stop in tokenizer.decode(tokens[:end], skip_special_tokens=True):
                tokens = tokens[:end]
                break
    return tokenizer.decode(tokens, skip_special_tokens=True).strip()


def answered(loaded, questions, decoding, **options) -> list[str]:
    found = dict(Answers(*loaded, **options)(questions, decoding))
    assert sorted(found) == list(range(len(questions)))
    return [found[i] for i in range(len(questions))]


def test_answers_are_those_of_the_plain_way(loaded, questions):
    expected = [plain(loaded, question, 24) for question in questions]
    assert len(set(expected)) > 4  # the questions do differ in their answers
    for share in (True, False):
        for batch_size in (1, 3, 4, 16):
            found = answered(loaded, questions, Decoding(24), batch_size=batch_size, share_prefix=share)
            assert found == expected, (share, batch_size)


def test_rows_that_end_early_do_not_change_the_others(loaded, questions, monkeypatch):
    policy, _ = loaded
    free = [plain(loaded, question, 24) for question in questions]
    seen = [plain_tokens(loaded, question, 24) for question in questions]
    ends = {tokens[2 + 3 * number] for number, tokens in enumerate(seen[:4])}  # each row ends at a time of its own
    monkeypatch.setattr(policy.network.generation_config, "eos_token_id", [1, *ends])
    expected = [plain(loaded, question, 24) for question in questions]
    lengths = {len(text) for text in expected}
    assert expected != free and len(lengths) > 2
    assert answered(loaded, questions, Decoding(24), batch_size=9) == expected


def test_generation_ends_after_the_stop_text_even_where_it_spans_tokens(loaded, questions):
    free = [plain(loaded, question, 24) for question in questions]
    tokenizer = loaded[1].processor.tokenizer
    tokens = plain_tokens(loaded, questions[0], 24)
    pairs = [(tokenizer.decode(tokens[i : i + 1])[-1:], tokenizer.decode(tokens[i + 1 : i + 2])[:1]) for i in range(23)]
    stop = next(a + b for a, b in pairs if a.isalpha() and b.isalpha())  # end of one token, start of the next
    expected = [plain(loaded, question, 24, stop) for question in questions]
    assert len(expected[0]) < len(free[0])
    assert answered(loaded, questions, Decoding(24, stop=stop), batch_size=9) == expected


def test_looking_seldom_changes_no_answer(loaded, questions, monkeypatch):
    """Tokens are fetched in blocks; what a row says after its end is thrown away, and rows are dropped later."""
    policy, template = loaded
    ends = {tokens[2 + 3 * n] for n, tokens in enumerate(plain_tokens(loaded, q, 24) for q in questions[:3])}
    stop = template.processor.tokenizer.decode(plain_tokens(loaded, questions[3], 9)[8:])
    monkeypatch.setattr(policy.network.generation_config, "eos_token_id", [1, *ends])
    for decoding in (Decoding(24, stop=stop), Decoding(24, temperature=0.7)):
        expected = answered(loaded, questions, decoding, batch_size=9, fetch_every=1)
        assert len(set(map(len, expected))) > 2
        for every in (2, 7, 100):
            assert answered(loaded, questions, decoding, batch_size=9, fetch_every=every) == expected, (decoding, every)


def test_the_host_waits_once_for_a_block_of_tokens(loaded, questions, monkeypatch):
    """Seen without a GPU: every number that the host asks for is an operator, and tokens are fetched by tolist."""
    fetched, honest = [], torch.Tensor.tolist

    def waits(limit: int) -> tuple[int, int]:
        fetched.clear()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            answered(loaded, questions, Decoding(limit), batch_size=16, fetch_every=8)
        counts = {event.key: event.count for event in profiler.key_averages()}
        return counts.get("aten::_local_scalar_dense", 0), len(fetched)

    monkeypatch.setattr(loaded[0].network.generation_config, "eos_token_id", [])
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: fetched.append(1) or honest(self))
    (short, once), (long, thrice) = waits(8), waits(24)
    assert long == short and thrice == once + 2


def test_very_short_answers(loaded, questions):
    for limit in (1, 2):
        expected = [plain(loaded, question, limit) for question in questions]
        assert answered(loaded, questions, Decoding(limit), batch_size=9) == expected, limit


def test_questions_without_an_image(loaded, questions):
    texts = [Question(f"text {i}", None, text, {}) for i, text in enumerate(TEXTS)]
    mixed = [texts[0], *questions[:3], *texts[1:], questions[3]]
    expected = [plain(loaded, question, 12) for question in mixed]
    assert answered(loaded, mixed, Decoding(12), batch_size=4) == expected


def test_samples_depend_on_seed_and_question_alone(questions, tmp_path):
    for name, style in (("llava", "vicuna_v1"), ("qwen2_5_vl", "chat")):
        loaded = tiny.load(tiny_models.save(name, tmp_path / name), adapted=False, style=style, train_projector=False)
        decoding = Decoding(12, temperature=0.7)
        together = answered(loaded, questions, decoding, batch_size=16)
        assert answered(loaded, questions, decoding, batch_size=2) == together, name
        assert answered(loaded, questions[::-1], decoding, batch_size=5, share_prefix=False)[::-1] == together, name
        assert answered(loaded, questions, decoding, batch_size=16, seed=1) != together, name
        assert answered(loaded, questions, Decoding(12), batch_size=16) != together, name


def test_samples_follow_the_distribution(loaded, questions):
    """The first token's shares over 600 draws against softmax(logits / 0.8) of the plain way."""
    policy, template = loaded
    inputs = template.processor(
        text=f"USER: <image>\n{TEXTS[0]} ASSISTANT:", images=Image.open(questions[0].image), return_tensors="pt"
    )
    policy.eval()
    with torch.inference_mode():
        shares = (policy.network(**inputs).logits[0, -1] / 0.8).softmax(-1)
    many = [Question(i, questions[0].image, TEXTS[0], {}) for i in range(600)]
    found = answered(loaded, many, Decoding(1, temperature=0.8), batch_size=300)
    top = shares.argmax().item()
    word = template.processor.tokenizer.decode([top], skip_special_tokens=True).strip()
    alike = sum(
        share.item()
        for token, share in enumerate(shares)
        if template.processor.tokenizer.decode([token], skip_special_tokens=True).strip() == word
    )
    assert abs(found.count(word) / 600 - alike) < 4 * (alike * (1 - alike) / 600) ** 0.5


def test_prompts_longer_than_the_model_reads_name_the_question(loaded, questions):
    long = Question("endless", questions[0].image, "dog " * 600, {})
    with pytest.raises(Fault, match="'endless'.*at most 512"):
        answered(loaded, [questions[0], long], Decoding(4))


def test_prompts_are_not_cut_to_the_training_length(loaded, questions):
    """max_length is 128: training would cut, an answer needs its whole question."""
    long = Question("long", questions[0].image, "Is there a dog " * 40, {})
    assert answered(loaded, [long], Decoding(8)) == [plain(loaded, long, 8)]


def test_broken_and_absent_images_are_reported(loaded, tmp_path):
    for image, said in ((tmp_path / "none.png", "does not exist"), (b"no picture", "cannot be decoded")):
        with pytest.raises(Fault, match=said):
            answered(loaded, [Question("q", image, "What is it", {})], Decoding(4))


def test_no_questions_no_answers(loaded):
    assert answered(loaded, [], Decoding(4)) == []


def test_split_keeps_order_and_bound():
    groups = [Group([0, 1, 2], [[1], [2], [3]], {}), Group([3], [[4]], {}), Group([4, 5, 6, 7, 8], [[5]] * 5, {})]
    for rows in range(1, 12):
        parts = list(split(groups, rows))
        assert [index for part in parts for group in part for index in group.indices] == list(range(9))
        assert all(sum(len(group.indices) for group in part) <= rows for part in parts)


def test_bytes_per_token_are_those_of_the_cache(loaded):
    """2 layers, 4 heads of 8, keys and values, 4 bytes: 2 * 2 * 4 * 8 * 4 = 512."""
    assert bytes_per_token(loaded[0].network) == 512


def test_the_cache_holds_what_was_put_into_it_and_copies_seldom():
    torch.manual_seed(0)
    layer, put, moves = RoomyLayer(), [], set()
    for length in [5, *[1] * (2 * ROOM + 3)]:
        put.append(torch.randn(3, 2, length, 4))
        keys, values = layer.update(put[-1], -put[-1])
        assert torch.equal(keys, torch.cat(put, 2)) and torch.equal(values, -keys)
        moves.add(keys.untyped_storage().data_ptr())
    assert len(moves) == 3
    rows = torch.tensor([2, 0])
    layer.batch_select_indices(rows)
    last = torch.randn(2, 2, 1, 4)
    keys, values = layer.update(last, last)
    assert torch.equal(keys, torch.cat([torch.cat(put, 2)[rows], last], 2)) and layer.get_seq_length() == keys.shape[2]


def test_layers_that_look_back_a_bounded_way_get_their_own_cache():
    plain, bounded = (
        tiny_models.text_config(100),
        tiny_models.text_config(100, "qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1),
    )
    assert type(key_values(plain)).__name__ == "Cache" and type(key_values(bounded)).__name__ == "DynamicCache"
