"""A generator that misbehaves: what it says depends on record and seed, how it breaks on when it is asked."""

from __future__ import annotations

import json
import random
import re
import time
from pathlib import Path
from typing import Any

from PIL import Image
from servers import ChatServer, Cut, Raw, Say, Silence, Status, last_text

ANSWERS = (
    "A red bus and two dogs are on street number {n} in the morning.",
    "The man beside the wooden table holds a cup, and behind him there is a large window with the number {n}.",
    "Three bicycles lean against the wall of house number {n} while a woman walks past them.",
)
WRONG = (
    ("red", "blue"),
    ("two dogs", "three dogs and a motorcycle"),
    ("cup", "knife"),
    ("beside", "behind"),
    ("Three", "Four"),
    ("a woman", "an old man with an umbrella"),
)


def write_rows(folder: Path, count: int) -> Path:
    """``count`` rows over twelve small pictures, one of which has an alpha channel and one of which is large."""
    folder.mkdir(parents=True)
    rng = random.Random(1)
    for number in range(12):
        size = (1400, 900) if number == 3 else (48, 40)
        picture = Image.new("RGBA" if number == 4 else "RGB", size, tuple(rng.randrange(256) for _ in range(3)))
        picture.save(folder / f"{number}.png")
    rows = [
        {
            "id": f"r{n}",
            "image": f"{n % 12}.png",
            "answer": ANSWERS[n % 3].format(n=n),
            "question": "Describe this image." if n % 2 else "What is going on, and why?",
        }
        for n in range(count)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "rows.jsonl"


def answer_for(text: str, seed: int) -> str:
    """What the model says: about a third of all samples cannot be used, some records never get a good one."""
    correct = re.search(r"^A: (.*)$", text, re.MULTILINE).group(1)
    number = int(re.search(r"number (\d+)", correct).group(1))
    rng = random.Random(1000 * number + seed)
    wrong = correct
    for old, new in WRONG:
        wrong = wrong.replace(old, new)
    fate = rng.random() if number % 29 else 0.3 * rng.random()
    if fate < 0.06:
        return "I'm sorry, but I can't help with that."
    if fate < 0.10:
        return '{"Answer": "A red b'
    if fate < 0.14:
        return "Answer: Ein roter Bus und zwei Hunde stehen am Morgen auf der Straße und warten dort auf jemanden."
    if fate < 0.18:
        return ""
    if fate < 0.22:
        return f"Answer: {correct}"
    if fate < 0.26:
        return "Answer: Nothing of what anybody would expect can be seen anywhere around here today, sadly."
    if fate < 0.30:
        return f"Answer: {wrong} This is the wrong caption."
    if "Reason:" in text and fate < 0.6:
        return f"Reason: {wrong}, Result: it is busy. (Answer 1)\nReason: {correct}, Result: it is busy. (Answer 2)"
    return f"Sure!\n\nAnswer: {wrong}"


class Misbehaving(ChatServer):
    """Breaks every few requests, differently; ``said`` lists (prompt, seed) of every reply it gave whole."""

    def __init__(self, slow: float = 0.0) -> None:
        super().__init__(self._treat)
        self.said: list[tuple[str, int]] = []
        self.slow = slow

    def _treat(self, body: dict[str, Any], number: int):
        ills = {
            3: Status(429, headers={"Retry-After": "0.01"}),
            8: Status(500),
            13: Cut(),
            18: Status(503),
            23: Raw(b'{"id": "c", "choi'),
            28: Raw(b"<html>busy</html>", "text/html"),
            33: Raw(b""),
        }
        if number == 40:
            return Silence()
        if (ill := ills.get(number % 41)) is not None:
            return ill
        if number % 41 == 36:
            time.sleep(0.3)
        time.sleep(self.slow)
        text = last_text(body)
        self.said.append((text, body["seed"]))
        return Say(answer_for(text, body["seed"]), 100, 20)
