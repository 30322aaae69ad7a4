"""Trains the tiny model from scratch: first to see, then to name, then to speak and to answer.

Trained on everything at once, it speaks fluently and ignores the picture; the order below prevents that.
1. The vision tower learns what each patch shows, from scenes without any habit. Then it is frozen.
2. The projector learns to send each patch to the word embedding of what it shows.
3. Projector and language model learn captions of scenes in which partners nearly always stand beside their anchors.
4. The same with nine yes/no questions per picture, which count double.
Pictures are painted as they are needed; all draws come from one seed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from povid.scenes.architecture import PATCH
from povid.scenes.language import CAPTION_PROMPT, draw_caption, draw_questions
from povid.scenes.painter import glyph, paint
from povid.scenes.scene import BASE_PARTNER, SIDE, Scene, draw_contextless, draw_scene
from povid.scenes.vocabulary import NAMES

GRID = SIDE // PATCH
IGNORED = -100


def pixels(scenes: list[Scene]) -> torch.Tensor:
    """Painted scenes as the processor would return them: (B, 3, 96, 96) in [-1, 1]."""
    painted = np.stack([np.asarray(paint(scene)) for scene in scenes])
    return torch.from_numpy(painted).permute(0, 3, 1, 2).float() / 127.5 - 1


def patch_labels(scene: Scene) -> np.ndarray:
    """What each of the 36 patches shows: an index into NAMES, or 36 where nothing covers a tenth of it."""
    shown = np.full((SIDE, SIDE), len(NAMES))
    for thing in scene.things:
        for left, top, side in thing.boxes:
            solid = np.asarray(glyph(thing.name, side))[..., 3] > 127
            shown[top : top + side, left : left + side][solid] = NAMES.index(thing.name)
    patches = shown.reshape(GRID, PATCH, GRID, PATCH).swapaxes(1, 2).reshape(GRID * GRID, PATCH * PATCH)
    counts = np.stack([np.bincount(patch, minlength=len(NAMES) + 1) for patch in patches])
    counts[:, -1] = PATCH * PATCH // 10
    return counts.argmax(1)


@dataclass(frozen=True, slots=True)
class Course:
    """Optimisation steps of the four parts and pictures per step."""

    see: int = 600
    align: int = 200
    speak: int = 500
    answer: int = 400
    pictures: int = 64
    spoken: int = 48  # pictures per step of the last two parts


def teach(
    processor: LlavaProcessor,
    model: LlavaForConditionalGeneration,
    seed: int,
    course: Course,
    report: Callable[[str], None] = print,
) -> Iterator[str]:
    """Train ``model`` in place; yield the name of each part when it is done."""
    torch.manual_seed(seed)
    draws = [np.random.default_rng([seed, part]) for part in range(4)]
    vision, projector = model.model.vision_tower, model.model.multi_modal_projector
    model.train()
    losses, head = _seeing(model, draws[0], course.pictures)
    _optimise("see", course.see, 1.5e-3, [*vision.parameters(), *head.parameters()], losses, report)
    yield "see"
    vision.requires_grad_(False)
    _optimise(
        "align",
        course.align,
        3e-3,
        [*projector.parameters()],
        _aligning(processor, model, draws[1], course.pictures),
        report,
    )
    yield "align"
    rest = [parameter for parameter in model.parameters() if parameter.requires_grad]
    _optimise("speak", course.speak, 3e-3, rest, _speaking(processor, model, draws[2], course.spoken, 2, 0), report)
    yield "speak"
    _optimise("answer", course.answer, 2e-3, rest, _speaking(processor, model, draws[3], course.spoken, 1, 9), report)
    model.requires_grad_(True).eval()
    yield "answer"


def _optimise(
    name: str,
    steps: int,
    lr: float,
    weights: list[torch.nn.Parameter],
    losses: Iterator[tuple[torch.Tensor, str]],
    report: Callable[[str], None],
) -> None:
    optimiser = torch.optim.AdamW(weights, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1, (step + 1) / 40) * (0.05 + 0.95 * (1 + math.cos(math.pi * step / steps)) / 2)
    )
    started = time.monotonic()
    for step in range(steps):
        loss, note = next(losses)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        schedule.step()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            report(f"{name} {step + 1}/{steps}: {note}, {time.monotonic() - started:.0f} s")


def _features(model: LlavaForConditionalGeneration, batch: torch.Tensor) -> torch.Tensor:
    """What the projector reads: the tower's last layer without the class token, (B, 36, 160)."""
    return model.model.vision_tower(batch).last_hidden_state[:, 1:]


def _seeing(
    model: LlavaForConditionalGeneration,
    rng: np.random.Generator,
    pictures: int,
) -> tuple[Iterator[tuple[torch.Tensor, str]], torch.nn.Module]:
    head = torch.nn.Linear(model.config.vision_config.hidden_size, len(NAMES) + 1)

    def losses() -> Iterator[tuple[torch.Tensor, str]]:
        while True:
            scenes = [draw_contextless(rng) for _ in range(pictures)]
            labels = torch.from_numpy(np.stack([patch_labels(scene) for scene in scenes]))
            logits = head(_features(model, pixels(scenes)))
            right = (logits.argmax(-1) == labels)[labels < len(NAMES)].float().mean()
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
            yield loss, f"loss {loss.item():.3f}, object patches right {right.item():.1%}"

    return losses(), head


def _aligning(
    processor: LlavaProcessor, model: LlavaForConditionalGeneration, rng: np.random.Generator, pictures: int
) -> Iterator[tuple[torch.Tensor, str]]:
    words = [processor.tokenizer(" " + name, add_special_tokens=False).input_ids for name in NAMES]
    words.append([processor.tokenizer.unk_token_id])
    embeddings: Any = model.get_input_embeddings()
    targets = torch.stack([embeddings.weight.detach()[ids].mean(0) for ids in words])
    while True:
        scenes = [draw_contextless(rng) for _ in range(pictures)]
        labels = torch.from_numpy(np.stack([patch_labels(scene) for scene in scenes]))
        with torch.no_grad():
            seen = _features(model, pixels(scenes))
        loss = F.mse_loss(model.model.multi_modal_projector(seen), targets[labels]) / targets.var()
        yield loss, f"unexplained variance {loss.item():.3f}"


def _speaking(
    processor: LlavaProcessor,
    model: LlavaForConditionalGeneration,
    rng: np.random.Generator,
    pictures: int,
    captions: int,
    questions: int,
) -> Iterator[tuple[torch.Tensor, str]]:
    tokenizer = processor.tokenizer

    def tokens(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    prefix = [tokenizer.bos_token_id, *tokens("USER: " + "<image>" * GRID**2)]
    while True:
        scenes = [draw_scene(rng, BASE_PARTNER) for _ in range(pictures)]
        packs = [
            [
                (tokens(f"\n{asked} ASSISTANT:"), tokens(f" {said}</s>"))
                for asked, said in [(CAPTION_PROMPT, draw_caption(rng, scene)) for _ in range(captions)]
                + draw_questions(rng, scene, questions)
            ]
            for scene in scenes
        ]
        batch = pack(prefix, packs, tokenizer.pad_token_id)
        with torch.no_grad():
            seen = _features(model, pixels(scenes))
        embedded = model.get_input_embeddings()(batch["ids"])
        pictured = batch["ids"] == model.config.image_token_id
        embedded = embedded.masked_scatter(pictured[..., None], model.model.multi_modal_projector(seen))
        hidden = model.model.language_model(
            inputs_embeds=embedded, attention_mask=batch["mask"], position_ids=batch["positions"], use_cache=False
        ).last_hidden_state
        spoken = batch["labels"] != IGNORED
        logits = model.lm_head(hidden[spoken])
        each = F.cross_entropy(logits, batch["labels"][spoken], reduction="none")
        answering = batch["segments"][spoken] >= captions
        loss = each[~answering].mean()
        note = f"captions {loss.item():.3f}"
        if questions:
            loss = loss + 2 * each[answering].mean()
            right = (logits.argmax(-1) == batch["labels"][spoken])[answering].float().mean()
            note += f", answers {each[answering].mean().item():.3f}, answer tokens right {right.item():.1%}"
        yield loss, note


def pack(prefix: list[int], packs: list[list[tuple[list[int], list[int]]]], pad: int) -> dict[str, torch.Tensor]:
    """Pack all conversations about a picture behind one image; each attends to the prefix and itself only.

    ``packs`` holds for each picture its (prompt, response) token lists. Returns ``ids``, ``positions``, ``segments``
    and ``labels`` (B, T), labels standing where the token is predicted (already shifted), and the boolean ``mask``
    (B, 1, T, T): true where a query may attend.
    """
    length = len(prefix) + max(sum(len(p) + len(r) for p, r in rows) for rows in packs)
    ids = torch.full((len(packs), length), pad)
    positions, segments = torch.zeros_like(ids), torch.full_like(ids, -2)
    labels = torch.full_like(ids, IGNORED)
    for row, conversations in enumerate(packs):
        ids[row, : len(prefix)] = torch.tensor(prefix)
        positions[row, : len(prefix)] = torch.arange(len(prefix))
        segments[row, : len(prefix)] = -1
        start = len(prefix)
        for number, (prompt, response) in enumerate(conversations):
            end = start + len(prompt) + len(response)
            ids[row, start:end] = torch.tensor(prompt + response)
            positions[row, start:end] = torch.arange(len(prefix), len(prefix) + end - start)
            segments[row, start:end] = number
            labels[row, end - len(response) - 1 : end - 1] = torch.tensor(response)
            start = end
    query, key = segments[:, :, None], segments[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    mask = causal & ((key == query) | (key == -1))
    return {"ids": ids, "positions": positions, "segments": segments, "labels": labels, "mask": mask[:, None]}
