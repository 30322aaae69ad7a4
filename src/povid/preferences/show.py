"""A page to look at preference triples: picture, noised pictures, differing words marked, statistics.

The page is one file with its pictures inside, so that it can be sent to somebody. The distorted pictures are those that
a run with the same seed trains on in its first epoch: the noised ones under ``noise.space=pixel`` (sigmoid schedule,
appendix A.1), and those of any other distortion that works on pictures.
"""

from __future__ import annotations

import random
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from povid import pages
from povid.fault import Fault
from povid.preferences.differences import changes, compared_whole, overlap, segments, words
from povid.preferences.pictures import Pictures, open_picture
from povid.preferences.triple import Triple

if TYPE_CHECKING:
    from povid.method.distortions import Distortion

NOISE_STEPS = (250, 500, 750)  # of 1000; the paper trains at 500 (Table 5)
KINDS = ("object", "count", "attribute", "relation")

Pieces = list[tuple[str, str]]
"""A text in pieces with their marks: "good" or "bad" for words that only one response has, else ""."""


@dataclass(frozen=True)
class Box:
    """One bar per (name, value), or lines without bars if ``plain``; ``form`` formats a value."""

    title: str
    counts: Sequence[tuple[str, float]]
    form: str = "{:,.0f}"
    plain: bool = False


@dataclass(frozen=True)
class Extra:
    """A section of a page between its statistics and its records."""

    title: str
    text: str
    boxes: Sequence[Box]


def write_page(
    triples: Sequence[Triple],
    out: Path,
    *,
    title: str,
    count: int = 40,
    seed: int = 0,
    noise_steps: Sequence[int] = NOISE_STEPS,
    distortions: Mapping[str, Distortion] | None = None,
    extra: Extra | None = None,
) -> None:
    """Write the page for ``triples``.

    Args:
        triples: all records that a run would read, in its order; the statistics cover all of them.
        count: how many records are shown in full, drawn by ``seed``.
        seed: of the drawn records and of the noise.
        noise_steps: steps k of Eq. 4, 0 to 999; one noised picture for each.
        distortions: further distortions by the name that stands below their pictures.
        extra: a section between statistics and records.

    Raises:
        Fault: there are no records.
    """
    if not triples:
        raise Fault(f"there is no record to show on {out}; check the data file")
    shown: Sequence[int] = range(len(triples))
    if count < len(shown):
        shown = random.Random(seed).sample(shown, max(count, 0))
    drawn = {f"noised, step {step}": _noise(step) for step in noise_steps}
    pictures = Pictures([picture for triple in triples for picture in triple.pictures])
    drawn |= {name: distortion.among(pictures) for name, distortion in (distortions or {}).items()}
    pages.write(
        Path(out),
        "preferences.html",
        title=title,
        total=len(triples),
        boxes=_statistics(triples),
        extra=extra,
        cards=[_card(triples[record], drawn, seed, record) for record in shown],
    )


def marked(preferred: str, dispreferred: str) -> tuple[Pieces, Pieces]:
    """Both texts in pieces, the words that only one of them has marked."""
    left, right = [], []
    for good, bad, same in segments(preferred, dispreferred):
        left.append((good, "" if same or not good.strip() else "good"))
        right.append((bad, "" if same or not bad.strip() else "bad"))
    return [piece for piece in left if piece[0]], [piece for piece in right if piece[0]]


def _responses(turns: Sequence) -> str:
    return "\n".join(turn.text for turn in turns if turn.role == "assistant")


def _statistics(triples: Sequence[Triple]) -> list[Box]:
    good, bad, shared, kinds, added = [], [], [], Counter(), Counter()
    for triple in triples:
        first, second = _responses(triple.preferred), _responses(triple.dispreferred)
        good.append(len(words(first)))
        bad.append(len(words(second)))
        shared.append(overlap(first, second))
        found = changes(first, second)
        kinds.update(found.kinds)
        added.update(found.objects)
    lengths = [
        ("preferred", statistics.mean(good)),
        ("dispreferred", statistics.mean(bad)),
        ("ratio", statistics.mean(bad) / (statistics.mean(good) or 1)),
    ]
    steps = [
        (
            f"{low:.1f} to {low + 0.2:.1f}",
            sum(low <= value < low + 0.2 or (low == 0.8 and value == 1) for value in shared),
        )
        for low in (0.0, 0.2, 0.4, 0.6, 0.8)
    ]
    turns = Counter(len(triple.preferred) // 2 for triple in triples)
    rounds = [(f"{number} question{'s' * (number > 1)}", count) for number, count in sorted(turns.items())]
    boxes = [
        Box("Words per record (mean)", lengths, "{:.2f}", plain=True),
        Box("Words shared by both, in order (records)", steps),
        Box("What changed (records; one may have several)", [(kind, kinds[kind]) for kind in KINDS]),
        Box("Objects only in the dispreferred (records)", added.most_common(8)),
    ]
    return [*boxes, Box("Length of the conversation (records)", rounds[:8])] if max(turns) > 1 else boxes


def _card(triple: Triple, distortions: Mapping[str, Distortion], seed: int, record: int) -> dict[str, Any]:
    first, second = _responses(triple.preferred), _responses(triple.dispreferred)
    found = changes(first, second)
    tags = [kind for kind in KINDS if kind in found.kinds]
    if not compared_whole(first, second):
        tags.append("too long: compared at both ends alone")
    shown, gone = [], ""
    try:
        for number, picture in enumerate(map(open_picture, triple.pictures)):
            shown += [(picture, "picture"), *_distorted(picture, distortions, seed, record, number)]
    except Fault as fault:  # a page about data shows what is wrong with them
        gone = str(fault)
    return {
        "id": triple.id,
        "tags": tags,
        "facts": f"overlap {overlap(first, second):.2f}, {len(words(first))} → {len(words(second))} words",
        "pictures": [(pages.address(pages.picture(image)), name) for image, name in shown],
        "gone": gone,
        "rounds": [
            (triple.preferred[at].text, *marked(triple.preferred[at + 1].text, triple.dispreferred[at + 1].text))
            for at in range(0, len(triple.preferred), 2)
        ],
    }


def _distorted(
    picture: Image.Image, distortions: Mapping[str, Distortion], seed: int, record: int, number: int
) -> Iterator[tuple[Image.Image, str]]:
    """The picture as training distorts it for this record in its first epoch, with the name of each distortion."""
    if distortions:
        from povid.method.distortions import distort_picture, generator

        for name, distortion in distortions.items():
            source = generator(seed=seed, epoch=0, record=record, picture=number)
            yield distort_picture(distortion, picture, source), name


def _noise(step: int) -> Distortion:
    """Eq. 4 on a picture's pixels."""
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler  # takes seconds to import

    from povid.method.distortions.diffusion import Diffusion

    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="sigmoid", beta_start=1e-5, beta_end=5e-3)
    return Diffusion(scheduler, step, space="pixel")
