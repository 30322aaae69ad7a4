"""From a conversation and its image to tokens, response marks and the tensors that the vision tower reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from povid.fault import Fault
from povid.model.packing import Encoded
from povid.preferences.pictures import open_picture
from povid.preferences.triple import Turn

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


@dataclass(slots=True)
class Template:
    """How one model is spoken to.

    Args:
        processor: the model's processor (tokenizer and image processor).
        style: ``vicuna_v1`` (LLaVA-1.5: ``SYSTEM USER: <image>\\nQ ASSISTANT: A</s>``), ``chat`` (the model's own
            chat template) or ``bare`` (InstructBLIP: question and answer, the image's tokens before both).
        system: system text of vicuna_v1; "" leaves it out.
        pad_square: pad pictures to a square of the mean colour before the processor sees them, as LLaVA-1.5 does.
        max_length: longest sequence in tokens, image tokens included; a response that goes beyond is cut.
    """

    processor: Any
    style: str = "vicuna_v1"
    system: str = VICUNA_V1_SYSTEM
    pad_square: bool = False
    max_length: int = 1024

    def text(self, turns: Sequence[Turn], *, image: bool = True) -> tuple[str, list[tuple[int, int]]]:
        """The conversation as one string and the span of each response (end-of-turn token included) in it.

        A conversation that ends with the user gets the model's generation prompt at its end. ``image`` says whether
        the conversation is about an image, whose marker then stands in the first question.
        """
        if self.style == "chat":
            return self._chat(turns, image)
        mark = f"{self.processor.image_token}\n" if image and self.style == "vicuna_v1" else ""
        text, spans = (self.system + " " if self.system else ""), []
        for number, turn in enumerate(turns):
            if turn.role == "assistant":
                start = len(text)
                text += f" {turn.text}{self.processor.tokenizer.eos_token}"
                spans.append((start, len(text)))
            elif self.style == "vicuna_v1":
                text += f"USER: {mark if number == 0 else ''}{turn.text} ASSISTANT:"
            else:
                text += turn.text
        return text, spans

    def _chat(self, turns: Sequence[Turn], image: bool) -> tuple[str, list[tuple[int, int]]]:
        messages = []
        for number, turn in enumerate(turns):
            picture = [{"type": "image"}] if image and number == 0 else []
            messages.append({"role": turn.role, "content": [*picture, {"type": "text", "text": turn.text}]})

        def render(count: int, prompt: bool) -> str:
            return self.processor.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=prompt)

        text, spans = render(len(turns), turns[-1].role == "user"), []
        for number, turn in enumerate(turns):
            if turn.role == "assistant":
                before, after = render(number, True), render(number + 1, False)
                if not (text.startswith(before) and text.startswith(after)):
                    raise Fault(
                        "the model's chat template changes earlier turns when later ones are added, so its "
                        "responses cannot be told apart; set model.style=vicuna_v1 or use another template"
                    )
                spans.append((len(before), len(after.rstrip())))
        return text, spans

    def picture(self, picture: Image.Image) -> Image.Image:
        """The picture as the processor gets it: padded to a square if the model wants that."""
        return pad_to_square(picture, self.processor.image_processor.image_mean) if self.pad_square else picture

    def see(self, prompt: str, picture: Image.Image) -> tuple[list[int], dict[str, Any]]:
        """The processor's token ids of a prompt, image tokens expanded, and its image tensors ([1, ...] each)."""
        inputs = self.processor(text=[prompt], images=[picture], return_tensors="pt", **self._special(prompt))
        ids = inputs.pop("input_ids")[0].tolist()
        text_only = ("attention_mask", "token_type_ids", "mm_token_type_ids")
        return ids, {key: value for key, value in inputs.items() if key not in text_only}

    def prompt(self, question: str) -> str:
        """A single question as text, ready to be answered."""
        return self.text([Turn("user", question)])[0]

    def encode(
        self, conversations: Sequence[Sequence[Turn]], image: Path | bytes | None, name: str | int
    ) -> tuple[list[Encoded], dict[str, Any]]:
        """Tokens of conversations about one image (or about none), and the image's tensors.

        The image is read and processed once. Responses that go beyond ``max_length`` are cut; conversations that end
        with a question are prompts to be answered and keep their whole length.

        Raises:
            Fault: naming the record: its prompt alone is too long for a response, or its text holds the image marker.
        """
        head, images = self._head(conversations[0][0], image, name) if image is not None else ([], {})
        encoded = []
        for turns in conversations:
            ids, marks = self._after_image(*self.text(turns, image=image is not None), image is not None, name)
            ids, marks = head + ids, [False] * len(head) + marks
            if turns[-1].role == "assistant":
                if not any(marks[: self.max_length]):
                    count = marks.index(True) if any(marks) else len(ids)
                    raise Fault(
                        f"record {name!r}: its prompt alone takes {count} tokens (image included) and "
                        f"model.max_length is {self.max_length}; raise model.max_length or remove the record"
                    )
                ids, marks = ids[: self.max_length], marks[: self.max_length]
            encoded.append(Encoded(ids, marks))
        return encoded, images

    def _head(self, question: Turn, image: Path | bytes, name: str | int) -> tuple[list[int], dict[str, Any]]:
        """Token ids up to the end of the image, and the image's tensors."""
        text = self.text([question])[0]
        tail, _ = self._after_image(text, [], True, name)
        expanded, images = self.see(text, self.picture(open_picture(image)))
        if expanded[len(expanded) - len(tail) :] != tail:
            raise Fault(
                f"record {name!r}: the processor's tokens of the prompt do not end with the tokens of its "
                "text; this model's processor is not supported"
            )
        return expanded[: len(expanded) - len(tail)], images

    def _after_image(
        self, text: str, spans: list[tuple[int, int]], image: bool, name: str | int
    ) -> tuple[list[int], list[bool]]:
        """Token ids of what follows the image (of all without one), and which of them lie in a response."""
        output = self.processor.tokenizer(text, return_offsets_mapping=True, **self._special(text))
        ids, mark = output["input_ids"], str(self.processor.image_token)
        found, wanted = text.count(mark), int(image and self.style != "bare")
        if found != wanted:
            raise Fault(
                f"record {name!r}: its text holds the image marker {mark!r}, which stands for the picture; "
                "remove it from the text"
            )
        first = ids.index(self.processor.tokenizer.convert_tokens_to_ids(mark)) + 1 if wanted else 0
        marks = [any(start <= a and b <= end and a < b for start, end in spans) for a, b in output["offset_mapping"]]
        return ids[first:], marks[first:]

    def _special(self, text: str) -> dict[str, bool]:
        """Chat templates write the first special token themselves; it must not come twice."""
        bos = self.processor.tokenizer.bos_token
        return {"add_special_tokens": not (bos and text.startswith(bos))}
