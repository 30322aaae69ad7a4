"""Turn a conversation and its image into token ids, response marks and the tensors that the vision tower reads."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from tokenizers.pre_tokenizers import Metaspace

from povid.fault import Fault
from povid.model.packing import Encoded
from povid.preferences.pictures import open_picture
from povid.preferences.stored import Picture
from povid.preferences.triple import Image as Shown
from povid.preferences.triple import Turn, pictures_of

log = logging.getLogger(__name__)

VICUNA_V1_SYSTEM = (  # LLaVA, llava/conversation.py, template vicuna_v1
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def pad_to_square(picture: Image.Image, mean: Sequence[float]) -> Image.Image:
    """Centre a picture on a square of the mean colour (LLaVA, image_aspect_ratio=pad). ``mean`` in [0, 1]."""
    side = max(picture.size)
    if picture.size == (side, side):
        return picture
    square = Image.new("RGB", (side, side), tuple(int(channel * 255) for channel in mean))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


def limit_dummy_prefix(tokenizer: Any) -> bool:
    """Make a sentencepiece tokenizer add its dummy prefix (``▁``) at the start of a text and nowhere else.

    LLaVA-1.5 was trained with Vicuna's tokenizer, whose ``legacy`` flag is false. With ``legacy`` true, transformers
    also adds the prefix after every special token, for example to the ``USER`` that follows ``</s>``. Converted
    checkpoints carry either value, so the tokenizer is changed in place.

    Returns:
        Whether the tokenizer has a dummy prefix; one that has none (byte-level BPE) is left as it is.
    """
    backend = tokenizer.backend_tokenizer
    metaspace = backend.pre_tokenizer
    # in files written by transformers 4, a normalizer adds the prefix and turns spaces into ▁
    if metaspace is None and backend.normalizer is not None and backend.normalizer.normalize_str("a b") == "▁a▁b":
        backend.normalizer, metaspace = None, Metaspace(split=False)
    if not isinstance(metaspace, Metaspace) or metaspace.prepend_scheme == "never":
        return False
    backend.pre_tokenizer = Metaspace(metaspace.replacement, prepend_scheme="first", split=metaspace.split)
    return True


@functools.cache
def _warn_of_masked(name: str | int) -> None:
    """Once for each record: it is encoded in every epoch."""
    log.warning("record %r: masking=released leaves none of its response tokens, so nothing is learned from it", name)


@dataclass(slots=True)
class Template:
    """The format in which one model reads conversations.

    Args:
        processor: the model's processor (tokenizer and image processor). With ``vicuna_v1``, a
            sentencepiece tokenizer is changed in place to give LLaVA-1.5's tokens (:func:`limit_dummy_prefix`).
        style: ``vicuna_v1`` (LLaVA-1.5: ``SYSTEM USER: <image>\\nQ ASSISTANT: A</s>``), ``chat`` (the model's own
            chat template) or ``bare`` (InstructBLIP: question and answer, the image's tokens before both).
        system: system text of vicuna_v1; "" leaves it out.
        pad_square: pad pictures to a square of the mean colour before the processor sees them, as LLaVA-1.5 does.
        masking: which tokens count as responses. ``all`` rounds, as LLaVA does now, or as the ``released`` code's older
            copy of LLaVA computes it, for vicuna_v1: it measures every round by itself and drops a record whose rounds
            do not add up to its length. With Vicuna's tokenizer those are the records of several rounds.
        max_length: longest sequence in tokens, image tokens included; longer responses are truncated.
    """

    processor: Any
    style: str = "vicuna_v1"
    system: str = VICUNA_V1_SYSTEM
    pad_square: bool = False
    max_length: int = 1024
    masking: str = "all"
    image_text: str = field(init=False, default="")  # what stands for each image in the first question

    def __post_init__(self) -> None:
        if self.style == "vicuna_v1":
            # LLaVA tokenizes what precedes and what follows the image as two texts (llava/mm_utils.py,
            # tokenizer_image_token), so the second one starts with a dummy prefix too: a space, written out here.
            prefix = " " if limit_dummy_prefix(self.processor.tokenizer) else ""
            self.image_text = f"{self.processor.image_token}{prefix}\n"

    def text(self, turns: Sequence[Turn], *, pictures: int = 1) -> tuple[str, list[tuple[int, int]]]:
        """The conversation as one string and the span of each response (end-of-turn token included) in it.

        A conversation that ends with the user is followed by the model's generation prompt. The first question begins
        with an image marker for each of the ``pictures``.
        """
        if self.style == "chat":
            return self._chat(turns, pictures)
        image_text = self.image_text * pictures
        text, spans = (self.system + " " if self.system else ""), []
        for number, turn in enumerate(turns):
            if turn.role == "assistant":
                start = len(text)
                text += f" {turn.text}{self.processor.tokenizer.eos_token}"
                spans.append((start, len(text)))
            elif self.style == "vicuna_v1":
                text += f"USER: {image_text if number == 0 else ''}{turn.text} ASSISTANT:"
            else:
                text += turn.text
        return text, spans

    def _chat(self, turns: Sequence[Turn], pictures: int) -> tuple[str, list[tuple[int, int]]]:
        messages = []
        for number, turn in enumerate(turns):
            shown = [{"type": "image"} for _ in range(pictures)] if number == 0 else []
            messages.append({"role": turn.role, "content": [*shown, {"type": "text", "text": turn.text}]})

        def render(count: int, prompt: bool) -> str:
            return self.processor.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=prompt)

        text, spans = render(len(turns), turns[-1].role == "user"), []
        for number, turn in enumerate(turns):
            if turn.role == "assistant":
                before, after = render(number, True), render(number + 1, False)
                if not (text.startswith(before) and text.startswith(after)):
                    raise Fault(
                        "the model's chat template changes earlier turns when later ones are added, so its "
                        "responses cannot be located; set model.style=vicuna_v1 or use another template"
                    )
                spans.append((len(before), len(after.rstrip())))
        return text, spans

    def picture(self, picture: Image.Image) -> Image.Image:
        """The picture as the processor receives it: padded to a square if ``pad_square`` is set."""
        return pad_to_square(picture, self.processor.image_processor.image_mean) if self.pad_square else picture

    def see(self, prompt: str, *pictures: Image.Image) -> tuple[list[int], dict[str, Any]]:
        """The processor's token ids of a prompt, with image tokens expanded, and the tensors of its pictures."""
        images = [*pictures] if len(pictures) == 1 else [[*pictures]]
        inputs = self.processor(text=[prompt], images=images, return_tensors="pt", **self._special(prompt))
        ids = inputs.pop("input_ids")[0].tolist()
        text_only = ("attention_mask", "token_type_ids", "mm_token_type_ids")
        return ids, {key: value for key, value in inputs.items() if key not in text_only}

    def prompt(self, question: str, *, pictures: int = 1) -> str:
        """A single question as text, ready to be answered."""
        return self.text([Turn("user", question)], pictures=pictures)[0]

    def unexpanded(self, question: str, pictures: int, name: str | int) -> list[int]:
        """Token ids of a single question with one token for each picture, where the processor puts several.

        Raises:
            Fault: the text holds the image marker.
        """
        text = self.prompt(question, pictures=pictures)
        self._after_images(text, [], pictures, name)
        return self.processor.tokenizer(text, **self._special(text))["input_ids"]

    def encode(
        self, conversations: Sequence[Sequence[Turn]], image: Shown | tuple[Image.Image, ...], name: str | int
    ) -> tuple[list[Encoded], dict[str, Any]]:
        """Tokens of conversations about the same pictures (or about none), and the tensors of these.

        Pictures are read and processed once. Sequences are truncated to ``max_length``, except those that end with a
        question: they are prompts to be answered.

        Raises:
            Fault: the record's prompt alone fills ``max_length``, its text holds the image marker, or it has more
                pictures than the style has places for.
        """
        pictures: Sequence[Picture | Image.Image] = image if isinstance(image, tuple) else pictures_of(image)
        if len(pictures) > 1 and self.style == "bare":
            raise Fault(
                f"record {name!r} has {len(pictures)} pictures, and model.style=bare has a place for one; remove the "
                "record or use another model"
            )
        head, images = self._head(conversations[0][0], pictures, name) if pictures else ([], {})
        encoded = []
        for turns in conversations:
            text, spans = self.text(turns, pictures=len(pictures))
            ids, marks = self._after_images(text, spans, len(pictures), name)
            ids, marks = head + ids, [False] * len(head) + marks
            if turns[-1].role == "assistant":
                if not any(marks[: self.max_length]):
                    count = marks.index(True) if any(marks) else len(ids)
                    raise Fault(
                        f"record {name!r}: its prompt alone takes {count} tokens (image included) and "
                        f"model.max_length is {self.max_length}; raise model.max_length or remove the record"
                    )
                if self.masking == "released":
                    marks = self._released_marks(text, len(marks))
                    if not any(marks):
                        _warn_of_masked(name)
                ids, marks = ids[: self.max_length], marks[: self.max_length]
            encoded.append(Encoded(ids, marks))
        return encoded, images

    def _head(
        self, question: Turn, pictures: Sequence[Picture | Image.Image], name: str | int
    ) -> tuple[list[int], dict[str, Any]]:
        """Token ids up to the end of the last picture, and the pictures' tensors."""
        text = self.text([question], pictures=len(pictures))[0]
        tail, _ = self._after_images(text, [], len(pictures), name)
        expanded, images = self.see(text, *(self.picture(open_picture(picture)) for picture in pictures))
        if expanded[len(expanded) - len(tail) :] != tail:
            raise Fault(
                f"record {name!r}: the processor's tokens of the prompt do not end with the tokens of its "
                "text; this model's processor is not supported"
            )
        return expanded[: len(expanded) - len(tail)], images

    def _after_images(
        self, text: str, spans: list[tuple[int, int]], pictures: int, name: str | int
    ) -> tuple[list[int], list[bool]]:
        """Token ids after the last picture (all of them without one), and whether each belongs to a response."""
        output = self.processor.tokenizer(text, return_offsets_mapping=True, **self._special(text))
        ids, mark = output["input_ids"], str(self.processor.image_token)
        found, wanted = text.count(mark), 0 if self.style == "bare" else pictures
        if found != wanted:
            raise Fault(
                f"record {name!r}: its text holds the image marker {mark!r}, which stands for the picture; "
                "remove it from the text"
            )
        marker = self.processor.tokenizer.convert_tokens_to_ids(mark)
        first = len(ids) - ids[::-1].index(marker) if wanted else 0
        marks = [any(start <= a and b <= end and a < b for start, end in spans) for a, b in output["offset_mapping"]]
        return ids[first:], marks[first:]

    def _released_marks(self, text: str, length: int) -> list[bool]:
        """Response marks of the last ``length`` tokens by the released code (POVID llava/train/train_dpo.py,
        preprocess_v1): none at all if its lengths of the rounds do not add up to that of the conversation.
        """
        tokenizer = self.processor.tokenizer
        whole = len(tokenizer(text)["input_ids"])
        marks, at = [False] * whole, 1
        for turn in filter(None, text.split(tokenizer.eos_token)):
            question, *answer = turn.split(" ASSISTANT: ")
            if len(answer) != 1:
                break
            asked = len(tokenizer(f"{question} ASSISTANT: ")["input_ids"]) - 2
            end = at + len(tokenizer(turn)["input_ids"])
            marks[at + asked : end] = [True] * (min(end, whole) - at - asked)
            at = end
        if at != whole and at < self.max_length:
            marks = [False] * whole
        return ([False] * length + marks)[-length:]

    def _special(self, text: str) -> dict[str, bool]:
        """Do not add the beginning-of-sequence token again after a chat template that writes it itself."""
        bos = self.processor.tokenizer.bos_token
        return {"add_special_tokens": not (bos and text.startswith(bos))}
