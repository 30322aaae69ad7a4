"""Conversations as tokens: LLaVA-1.5's layout token by token, with a sentencepiece and a byte-level tokenizer."""

from __future__ import annotations

import copy
import json
import shutil
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_models
import torch
from omegaconf import OmegaConf
from PIL import Image
from tokenizers import AddedToken, normalizers
from transformers import LlamaTokenizer

from povid.fault import Fault
from povid.model.template import VICUNA_V1_SYSTEM, Template, pad_to_square
from povid.preferences.pictures import open_picture
from povid.preferences.triple import Turn

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "vicuna_v1"
SINGLE = (Turn("user", "Is there a dog"), Turn("assistant", "Yes it is"))
MULTI = (
    Turn("user", "Is it a cat"),
    Turn("assistant", "A red bus"),
    Turn("user", "Is there a tree"),
    Turn("assistant", "No"),
)
SEEN = 16  # a picture of 32 by 32 in patches of 8


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        name: tiny.load(tiny_models.save(name, folder / name), adapted=False)[1] for name in ("llava", "llava_vicuna")
    }


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    return tiny.picture(tmp_path_factory.mktemp("pictures"), "photo", 1, (48, 30))


def layout(template: Template, conversation, photo) -> str:
    """Tokens as the tokenizer spells them, in the notation of LAYOUTS."""
    (encoded,), _ = template.encode([conversation], photo, "record")
    written, inside = [], False
    for token, response in zip(
        template.processor.tokenizer.convert_ids_to_tokens(encoded.input_ids), encoded.response, strict=True
    ):
        written += ["|", token] if response != inside else [token]
        inside = response
    return " ".join([*written, "|"] if inside else written).replace(" ".join(["<image>"] * SEEN), "<image>*")


# one token per word; |...| is a response; <image>* stands for all image tokens
LAYOUTS = {
    ("llava_vicuna", SINGLE): "<s> ▁USER : ▁ <image>* ▁ <0x0A> Is ▁there ▁a ▁dog ▁ASSISTANT : | ▁Yes ▁it ▁is </s> |",
    ("llava_vicuna", MULTI): (
        "<s> ▁USER : ▁ <image>* ▁ <0x0A> Is ▁it ▁a ▁cat ▁ASSISTANT : | ▁A ▁red ▁bus </s> | "
        "USER : ▁Is ▁there ▁a ▁tree ▁ASSISTANT : | ▁No </s> |"
    ),
    ("llava", SINGLE): "<s> USER : Ġ <image>* Ċ Is Ġthere Ġa Ġdog ĠASSISTANT : | ĠYes Ġit Ġis </s> |",
    ("llava", MULTI): (
        "<s> USER : Ġ <image>* Ċ Is Ġit Ġa Ġcat ĠASSISTANT : | Ġ A Ġred Ġbus </s> | "
        "USER : ĠIs Ġthere Ġa Ġtree ĠASSISTANT : | ĠNo </s> |"
    ),
}


@pytest.mark.parametrize(
    ("name", "conversation"), LAYOUTS, ids=lambda value: value if isinstance(value, str) else f"{len(value) // 2} turns"
)
def test_layout_worked_out_by_hand(loaded, photo, name, conversation):
    """Llama's tokenizer was saved without its ``<s>``, which LLaVA-1.5's prompts always start with."""
    assert layout(loaded[name], conversation, photo) == LAYOUTS[name, conversation]


def sentencepiece_tokenizer(folder: Path, kind: str):
    """The golden tokenizer, converted with ``legacy`` false or true, or as files of transformers 4 hold it."""
    folder.mkdir()
    shutil.copy(GOLDEN / "tokenizer.model", folder)
    configuration = {"tokenizer_class": "LlamaTokenizer", "legacy": kind != "legacy false"}
    (folder / "tokenizer_config.json").write_text(json.dumps(configuration))
    tokenizer = LlamaTokenizer.from_pretrained(folder)
    if kind == "normalizer":
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        tokenizer.backend_tokenizer.pre_tokenizer = None
    tokenizer.add_bos_token = True
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    return tokenizer


@pytest.mark.parametrize("kind", ["legacy false", "legacy true", "normalizer"])
def test_tokens_and_labels_are_those_of_llava(loaded, photo, tmp_path, kind):
    """Seven conversations as LLaVA's ``preprocess_v1`` tokenizes them; -200: the image, -100: not learned."""
    processor = copy.copy(loaded["llava_vicuna"].processor)
    processor.tokenizer = sentencepiece_tokenizer(tmp_path / "tokenizer", kind)
    processor.image_token_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    template = Template(processor)
    cases = json.loads((GOLDEN / "expected.json").read_text())
    assert len(cases) == 7
    for case in cases:
        turns = [
            Turn("user", turn["value"].replace("<image>", "").strip())  # as LLaVA's preprocess_multimodal does
            if turn["from"] == "human"
            else Turn("assistant", turn["value"])
            for turn in case["conversation"]
        ]
        ((encoded,), _), at = template.encode([turns], photo, "x"), case["input_ids"].index(-200)
        expected = [*case["input_ids"][:at], *[processor.image_token_id] * SEEN, *case["input_ids"][at + 1 :]]
        labels = [*case["labels"][:at], *[-100] * SEEN, *case["labels"][at + 1 :]]
        assert encoded.input_ids == expected, case["conversation"]
        assert encoded.response == [label != -100 for label in labels], case["conversation"]
        (prompt,), _ = template.encode([turns[:1]], photo, "x")
        assert prompt.input_ids == expected[: encoded.response.index(True)]


def test_masking_of_the_released_code(loaded, photo, tmp_path):
    """It equals LLaVA's for one round. In further rounds Vicuna's tokenizer spells USER in one token less than in a
    round by itself, so lengths do not add up and nothing of the record is learned."""
    processor = copy.copy(loaded["llava_vicuna"].processor)
    processor.tokenizer = sentencepiece_tokenizer(tmp_path / "tokenizer", "legacy false")
    processor.image_token_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    template, released = Template(processor), Template(processor, masking="released")
    rounds = set()
    for case in json.loads((GOLDEN / "expected.json").read_text()):
        turns = [
            Turn("user" if turn["from"] == "human" else "assistant", turn["value"].replace("<image>", "").strip())
            for turn in case["conversation"]
        ]
        rounds.add(len(turns) // 2)
        for image in (photo, None):
            ((ours,), _), ((theirs,), _) = (way.encode([turns], image, "x") for way in (template, released))
            assert theirs.input_ids == ours.input_ids
            assert theirs.response == (ours.response if len(turns) == 2 else [False] * len(ours.response))
    assert rounds == {1, 3}


@pytest.mark.parametrize("name", ["llava", "llava_vicuna"])
def test_a_prompt_is_the_beginning_of_its_training_sequence(loaded, photo, name):
    template = loaded[name]
    for conversation in (SINGLE, MULTI):
        for count in range(1, len(conversation), 2):
            (prompt, whole), _ = template.encode([conversation[:count], conversation], photo, "x")
            assert whole.input_ids[: len(prompt.input_ids)] == prompt.input_ids
            assert prompt.response == whole.response[: len(prompt.input_ids)]
            assert not prompt.response[-1] and whole.response[len(prompt.input_ids)]


def test_system_text_precedes_the_first_turn(loaded, photo):
    system = "A dog."
    for name, start in (("llava", "<s> A Ġdog . Ġ USER :"), ("llava_vicuna", "<s> ▁A ▁dog . ▁USER :")):
        template = Template(loaded[name].processor, system=system, max_length=200)
        without, found = layout(loaded[name], MULTI, photo), layout(template, MULTI, photo)
        assert found == start + without[without.index(" :") + 2 :], found
    assert template.text(MULTI, pictures=0)[0] == (
        "A dog. USER: Is it a cat ASSISTANT: A red bus</s>USER: Is there a tree ASSISTANT: No</s>"
    )


def test_configured_system_text_is_that_of_vicuna_v1():
    assert VICUNA_V1_SYSTEM == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions."
    )
    conf = Path(__file__).resolve().parents[2] / "conf" / "model"
    assert OmegaConf.load(conf / "llava_1_5_7b.yaml").system == VICUNA_V1_SYSTEM


# --- lengths ---------------------------------------------------------------------------------------------------------


def short(template: Template, length: int) -> Template:
    return Template(template.processor, system="", max_length=length)


@pytest.mark.parametrize("name", ["llava", "llava_vicuna"])
def test_responses_are_truncated_and_image_tokens_are_not(loaded, photo, name):
    template = loaded[name]
    (whole,), _ = template.encode([MULTI], photo, "x")
    first = whole.response.index(True)
    for length in range(first + 1, len(whole.input_ids) + 3):
        (cut,), _ = short(template, length).encode([MULTI], photo, "x")
        assert cut.input_ids == whole.input_ids[:length] and cut.response == whole.response[:length]
        assert cut.input_ids.count(template.processor.image_token_id) == SEEN


@pytest.mark.parametrize("name", ["llava", "llava_vicuna"])
def test_prompt_that_leaves_no_room_for_a_response(loaded, photo, name):
    template = loaded[name]
    (whole,), _ = template.encode([SINGLE], photo, "x")
    first = whole.response.index(True)
    for length in (1, SEEN, first):
        message = rf"record 'r7': its prompt alone takes {first} tokens.*max_length is {length};"
        with pytest.raises(Fault, match=message):
            short(template, length).encode([SINGLE], photo, "r7")
        (prompt,), _ = short(template, length).encode([SINGLE[:1]], photo, "r7")  # never truncated
        assert prompt.input_ids == whole.input_ids[:first]


def test_image_marker_in_a_text(loaded, photo):
    conversation = (Turn("user", "What is <image> here"), Turn("assistant", "A dog"))
    for template in loaded.values():
        for image in (photo, None):
            with pytest.raises(Fault, match=r"record 'r8': its text holds the image marker '<image>'"):
                template.encode([conversation], image, "r8")


def test_conversation_without_image(loaded):
    assert layout(loaded["llava_vicuna"], SINGLE, None) == (
        "<s> ▁USER : ▁Is ▁there ▁a ▁dog ▁ASSISTANT : | ▁Yes ▁it ▁is </s> |"
    )
    assert loaded["llava_vicuna"].encode([SINGLE], None, "x")[1] == {}


# --- other styles ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl", "idefics3", "internvl", "llava_onevision"])
def test_responses_in_chat_templates(tmp_path, photo, name):
    """The response with the end token that the template gives it, and nothing of the next turn."""
    template = tiny.load(tiny_models.save(name, tmp_path / name), adapted=False, style="chat", max_length=400)[1]
    (encoded,), _ = template.encode([MULTI], photo, "x")
    response = [token for token, marked in zip(encoded.input_ids, encoded.response) if marked]
    assert template.processor.tokenizer.decode(response) == "A red bus</s>No</s>"
    assert encoded.input_ids.count(0) == 1  # <s>, which template and tokenizer both would write
    (prompt,), _ = template.encode([MULTI[:1]], photo, "x")
    assert encoded.input_ids[: len(prompt.input_ids)] == prompt.input_ids


def test_instructblip_sees_the_image_before_a_bare_question(tmp_path, photo):
    template = tiny.load(tiny_models.save("instructblip", tmp_path / "m"), adapted=False, style="bare")[1]
    (encoded,), images = template.encode([SINGLE], photo, "x")
    spelt = template.processor.tokenizer.convert_ids_to_tokens(encoded.input_ids)
    assert spelt == [*["<image>"] * 4, "<s>", "Is", "Ġthere", "Ġa", "Ġdog", "ĠYes", "Ġit", "Ġis", "</s>"]
    assert encoded.response == [False] * 9 + [True] * 4
    asked = template.processor.qformer_tokenizer.decode(images["qformer_input_ids"][0])
    assert asked == "<s>Is there a dog"  # the Q-Former reads the question, not the answer


def test_a_chat_template_that_rewrites_earlier_turns_is_refused(loaded, photo):
    template = Template(loaded["llava"].processor, style="chat")
    template.processor.chat_template = "{{ messages | length }}{% for m in messages %}<image>{% endfor %}"
    with pytest.raises(Fault, match="changes earlier turns"):
        template.encode([MULTI], photo, "x")
    template.processor.chat_template = None


# --- pictures --------------------------------------------------------------------------------------------------------


def padded_by_hand(pixels: np.ndarray, mean: tuple[int, int, int]) -> np.ndarray:
    """[H, W, 3] bytes in the middle of a square of one colour; an odd pixel goes to the right or to the bottom."""
    height, width, _ = pixels.shape
    side = max(height, width)
    square = np.empty((side, side, 3), np.uint8)
    for row in range(side):
        for column in range(side):
            y, x = row - (side - height) // 2, column - (side - width) // 2
            square[row, column] = pixels[y, x] if 0 <= y < height and 0 <= x < width else mean
    return square


@pytest.mark.parametrize("size", [(48, 30), (30, 48), (31, 16), (16, 31), (7, 7), (1, 9)], ids=str)
def test_pad_to_square_bit_by_bit(size):
    """CLIP's mean (0.48145466, 0.4578275, 0.40821073) times 255 is 122.77, 116.75 and 104.09: (122, 116, 104)."""
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(1)).byte().numpy()
    found = pad_to_square(Image.fromarray(pixels), (0.48145466, 0.4578275, 0.40821073))
    np.testing.assert_array_equal(np.array(found), padded_by_hand(pixels, (122, 116, 104)))


@pytest.mark.parametrize("size", [(48, 30), (30, 48), (64, 64)], ids=str)
def test_what_the_model_sees_is_the_padded_picture_resized(loaded, tmp_path, size):
    """Pad, resize to 32 by 32 (bicubic), scale to [0, 1], normalise; cropping the centre would lose the borders."""
    photo = tiny.picture(tmp_path, "photo", 3, size)
    template = Template(loaded["llava"].processor, system="", pad_square=True)
    _, images = template.encode([SINGLE], photo, "x")
    square = Image.fromarray(padded_by_hand(np.array(Image.open(photo)), (122, 116, 104)))
    scaled = np.array(square.resize((32, 32), Image.Resampling.BICUBIC)).astype(np.float32) / 255
    mean = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
    std = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
    expected = torch.from_numpy(((scaled - mean) / std).transpose(2, 0, 1))
    torch.testing.assert_close(images["pixel_values"][0], expected, rtol=0, atol=1e-6)
    if size[0] != size[1]:
        _, cropped = Template(loaded["llava"].processor, system="").encode([SINGLE], photo, "x")
        assert not torch.allclose(cropped["pixel_values"][0], expected, atol=0.1)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "1", "LA", "I;16"])
def test_pictures_of_every_mode_are_read_as_rgb(mode):
    buffer = BytesIO()
    picture = Image.new("I;16", (9, 5), 300) if mode == "I;16" else Image.new("RGB", (9, 5), (250, 3, 7)).convert(mode)
    picture.save(buffer, "TIFF")
    found = open_picture(buffer.getvalue())
    assert found.mode == "RGB" and found.size == (9, 5)


def test_pictures_that_cannot_be_read_are_faults(tmp_path):
    (tmp_path / "text.png").write_text("not a picture")
    whole = BytesIO()
    Image.new("RGB", (64, 64)).save(whole, "PNG")
    (tmp_path / "half.png").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    for name in ("text.png", "half.png"):
        with pytest.raises(Fault, match=f"{name} cannot be decoded"):
            open_picture(tmp_path / name)
    with pytest.raises(Fault, match="none.png does not exist"):
        open_picture(tmp_path / "none.png")
    with pytest.raises(Fault, match="cannot be decoded"):
        open_picture(tmp_path)
