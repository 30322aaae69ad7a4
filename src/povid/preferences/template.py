"""From a conversation and its image to tokens, response marks and the tensors that the vision tower reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from povid.fault import Fault
from povid.packing import Encoded
from povid.preferences.triple import Turn

VICUNA_V1_SYSTEM = (  # LLaVA, llava/conversation.py, template vicuna_v1
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def open_picture(image: Path | bytes) -> Image.Image:
    """An RGB picture from a file or from encoded bytes. Raises Fault naming the file when it cannot be decoded."""
    name = f"image {image}" if isinstance(image, Path) else f"an image of {len(image)} bytes"
    try:
        return Image.open(image if isinstance(image, Path) else BytesIO(image)).convert("RGB")
    except FileNotFoundError:
        raise Fault(f"{name} does not exist; mend the path or data.images") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise Fault(f"{name} cannot be decoded ({error}); replace the file or remove its record") from None


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
        style: ``vicuna_v1`` (LLaVA-1.5: ``SYSTEM USER: <image>\\nQ ASSISTANT: A</s>``) or ``chat`` (the model's own
            chat template).
        system: system text of vicuna_v1; "" leaves it out.
        pad_square: pad pictures to a square of the mean colour before the processor sees them, as LLaVA-1.5 does.
        max_length: longest sequence in tokens, image tokens included; a response that goes beyond is cut.
    """

    processor: Any
    style: str = "vicuna_v1"
    system: str = VICUNA_V1_SYSTEM
    pad_square: bool = False
    max_length: int = 1024

    def text(self, turns: Sequence[Turn]) -> tuple[str, list[tuple[int, int]]]:
        """The conversation as one string and the span of each response (end-of-turn token included) in it.

        A conversation that ends with the user gets the model's generation prompt at its end.
        """
        return self._vicuna(turns) if self.style == "vicuna_v1" else self._chat(turns)

    def _vicuna(self, turns: Sequence[Turn]) -> tuple[str, list[tuple[int, int]]]:
        text, spans = (self.system + " " if self.system else ""), []
        for number, turn in enumerate(turns):
            if turn.role == "user":
                text += f"USER: {self.processor.image_token + chr(10) if number == 0 else ''}{turn.text} ASSISTANT:"
            else:
                start = len(text)
                text += f" {turn.text}{self.processor.tokenizer.eos_token}"
                spans.append((start, len(text)))
        return text, spans

    def _chat(self, turns: Sequence[Turn]) -> tuple[str, list[tuple[int, int]]]:
        messages = []
        for number, turn in enumerate(turns):
            picture = [{"type": "image"}] if number == 0 else []
            messages.append({"role": turn.role, "content": [*picture, {"type": "text", "text": turn.text}]})

        def render(count: int, prompt: bool) -> str:
            return self.processor.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=prompt)

        text, spans = render(len(turns), turns[-1].role == "user"), []
        for number, turn in enumerate(turns):
            if turn.role == "assistant":
                before, after = render(number, True), render(number + 1, False)
                if not (text.startswith(before) and text.startswith(after)):
                    raise Fault("the model's chat template changes earlier turns when later ones are added, so its "
                                "responses cannot be told apart; set model.style=vicuna_v1 or use another template")
                spans.append((len(before), len(after.rstrip())))
        return text, spans

    def picture(self, picture: Image.Image) -> Image.Image:
        """The picture as the processor gets it: padded to a square if the model wants that."""
        return pad_to_square(picture, self.processor.image_processor.image_mean) if self.pad_square else picture

    def see(self, prompt: str, picture: Image.Image) -> tuple[list[int], dict[str, Any]]:
        """The processor's token ids of a prompt, image tokens expanded, and its image tensors ([1, ...] each)."""
        inputs = self.processor(text=[prompt], images=[picture], return_tensors="pt")
        ids = inputs.pop("input_ids")[0].tolist()
        text_only = ("attention_mask", "token_type_ids", "mm_token_type_ids")
        return ids, {key: value for key, value in inputs.items() if key not in text_only}

    def prompt(self, question: str) -> str:
        """A single question as text, ready to be answered."""
        return self.text([Turn("user", question)])[0]

    def encode(self, conversations: Sequence[Sequence[Turn]], image: Path | bytes, name: str
               ) -> tuple[list[Encoded], dict[str, Any]]:
        """Tokens of conversations about one image, and the image's tensors.

        The image is read and processed once. Raises Fault naming the record when the prompt alone is too long.
        """
        picture = self.picture(open_picture(image))
        question = self.text(conversations[0][:1])[0]
        expanded, images = self.see(question, picture)
        tail, _ = self._after_image(question, [])
        if expanded[len(expanded) - len(tail):] != tail:
            raise Fault(f"record {name!r}: the processor's tokens of the prompt do not end with the tokens of its "
                        "text; this model's processor is not supported")
        head = expanded[: len(expanded) - len(tail)]
        if len(expanded) >= self.max_length:
            raise Fault(f"record {name!r}: its prompt alone takes {len(expanded)} tokens (image included) and "
                        f"model.max_length is {self.max_length}; raise model.max_length or remove the record")
        encoded = []
        for turns in conversations:
            ids, marks = self._after_image(*self.text(turns))
            ids, marks = head + ids, [False] * len(head) + marks
            encoded.append(Encoded(ids[: self.max_length], marks[: self.max_length]))
        return encoded, images

    def _after_image(self, text: str, spans: list[tuple[int, int]]) -> tuple[list[int], list[bool]]:
        """Token ids of what follows the image's placeholder, and which of them lie in a response."""
        tokenizer = self.processor.tokenizer
        bos = tokenizer.bos_token
        output = tokenizer(text, return_offsets_mapping=True, add_special_tokens=not (bos and text.startswith(bos)))
        ids = output["input_ids"]
        image_id = self.processor.image_token_id
        if ids.count(image_id) != 1:
            raise Fault(f"a prompt must hold the image marker once, found {ids.count(image_id)} in {text[:80]!r}; "
                        f"remove {self.processor.image_token!r} from the text")
        first = ids.index(image_id) + 1
        marks = [any(start <= a and b <= end and a < b for start, end in spans) for a, b in output["offset_mapping"]]
        return ids[first:], marks[first:]
