"""A page to look at preference triples: picture, noised pictures, differing words marked, statistics.

The page is one file with its pictures inside, so that it can be sent to somebody. The distorted pictures are those that
a run with the same seed trains on in its first epoch: the noised ones under ``noise.space=pixel`` (sigmoid schedule,
appendix A.1), and those of any other distortion that works on pictures.
"""

from __future__ import annotations

import base64
import io
import random
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from povid.fault import Fault
from povid.files import write_text
from povid.preferences.differences import changes, compared_whole, overlap, segments, words
from povid.preferences.pictures import Pictures, open_picture
from povid.preferences.triple import Triple

if TYPE_CHECKING:
    from povid.method.distortions import Distortion

NOISE_STEPS = (250, 500, 750)  # of 1000; the paper trains at 500 (Table 5)
SIDE = 320  # pixels of the longer side; larger pictures are scaled down
KINDS = ("object", "count", "attribute", "relation")

STYLE = """
:root { --ink: #1d2126; --dim: #667080; --line: #e1e5ea; --paper: #f6f7f9; --card: #fff; --good: #dcf2e1;
  --good-ink: #0d5d2a; --bad: #fde1dd; --bad-ink: #9b1c10; --bar: #5b8def; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7eaee; --dim: #9aa4b2; --line: #333a44; --paper: #14171b;
  --card: #1d2127; --good: #12402a; --good-ink: #a5e8bd; --bad: #512019; --bad-ink: #ffc0b6; --bar: #6f9cf5; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 22px; margin: 0 0 4px; overflow-wrap: anywhere; } h2 { font-size: 16px; margin: 26px 0 10px; }
.dim { color: var(--dim); }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(208px, 1fr)); gap: 14px; }
.box { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; }
.box h3 { margin: 0 0 8px; font-size: 13px; font-weight: 600; color: var(--dim); }
.row { display: grid; grid-template-columns: minmax(0, 1fr) 38px 38px; gap: 8px; align-items: center; font-size: 13px; }
.row span:first-child { overflow-wrap: anywhere; }
.row span:last-child { text-align: right; font-variant-numeric: tabular-nums; }
.bar { background: var(--line); border-radius: 3px; height: 9px; overflow: hidden; }
.bar i { display: block; height: 100%; background: var(--bar); }
article { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 16px; margin: 0 0 16px;
  break-inside: avoid; }
article header { display: flex; flex-wrap: wrap; gap: 6px 12px; align-items: baseline; margin-bottom: 10px; }
article header b { overflow-wrap: anywhere; }
.tag { font-size: 12px; border: 1px solid var(--line); border-radius: 99px; padding: 0 9px; color: var(--dim); }
.pictures { display: flex; flex-wrap: wrap; gap: 10px; margin-bottom: 12px; }
figure { margin: 0; } figure img { display: block; max-width: 100%; height: 158px; border-radius: 6px; }
figcaption { font-size: 12px; color: var(--dim); margin-top: 3px; }
.question { margin: 12px 0 8px; font-weight: 600; white-space: pre-wrap; overflow-wrap: anywhere; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 18px; }
.pair h4 { margin: 0 0 4px; font-size: 12px; font-weight: 600; color: var(--dim); }
.pair p { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
mark { border-radius: 3px; padding: 0 2px; color: inherit; }
mark.good { background: var(--good); color: var(--good-ink); }
mark.bad { background: var(--bad); color: var(--bad-ink); }
.gone { border: 1px dashed var(--bad-ink); border-radius: 6px; padding: 20px; font-size: 13px; }
"""


def write_page(
    triples: Sequence[Triple],
    out: Path,
    *,
    title: str,
    count: int = 40,
    seed: int = 0,
    noise_steps: Sequence[int] = NOISE_STEPS,
    distortions: Mapping[str, Distortion] | None = None,
    extra: str = "",
) -> None:
    """Write the page for ``triples``.

    Args:
        triples: all records that a run would read, in its order; the statistics cover all of them.
        count: how many records are shown in full, drawn by ``seed``.
        seed: of the drawn records and of the noise.
        noise_steps: steps k of Eq. 4, 0 to 999; one noised picture for each.
        distortions: further distortions by the name that stands below their pictures.
        extra: HTML between statistics and records.

    Raises:
        Fault: there are no records.
    """
    if not triples:
        raise Fault(f"there is no record to show on {out}; check the data file")
    shown: Sequence[int] = range(len(triples))
    if count < len(shown):
        shown = random.Random(seed).sample(shown, max(count, 0))
    drawn = {f"noised, step {step}": _noise(step) for step in noise_steps}
    pictures = Pictures([triple.image for triple in triples])
    drawn |= {name: distortion.among(pictures) for name, distortion in (distortions or {}).items()}
    cards = "\n".join(_card(triples[record], drawn, seed, record) for record in shown)
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>
<h1>{escape(title)}</h1>
<p class="dim">{len(triples):,} preference records, {len(shown)} of them below.
<mark class="good">only in the preferred</mark> <mark class="bad">only in the dispreferred</mark></p>
<div class="facts">{_statistics(triples)}</div>
{extra}
<h2>Records</h2>
{cards}
</main></body></html>
"""
    write_text(Path(out), page)


def marked(preferred: str, dispreferred: str) -> tuple[str, str]:
    """Both texts as HTML, the words that only one of them has marked."""
    left, right = [], []
    for good, bad, same in segments(preferred, dispreferred):
        left.append(escape(good) if same or not good.strip() else f'<mark class="good">{escape(good)}</mark>')
        right.append(escape(bad) if same or not bad.strip() else f'<mark class="bad">{escape(bad)}</mark>')
    return "".join(left), "".join(right)


def bars(title: str, counts: Sequence[tuple[str, float]], form: str = "{:,.0f}") -> str:
    """A box with one bar per (name, value)."""
    most = max((value for _, value in counts), default=0) or 1
    rows = "".join(
        f'<div class="row"><span title="{escape(name, quote=True)}">{escape(name)}</span>'
        f'<span class="bar"><i style="width:{100 * value / most:.1f}%"></i></span>'
        f"<span>{form.format(value)}</span></div>"
        for name, value in counts
    )
    return f'<div class="box"><h3>{escape(title)}</h3>{rows or "<span class=dim>none</span>"}</div>'


def _responses(turns: Sequence) -> str:
    return "\n".join(turn.text for turn in turns if turn.role == "assistant")


def _statistics(triples: Sequence[Triple]) -> str:
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
    length_box = "".join(
        f'<div class="row"><span>{name}</span><span></span><span>{value:.2f}</span></div>' for name, value in lengths
    )
    return "".join(
        (
            f'<div class="box"><h3>Words per record (mean)</h3>{length_box}</div>',
            bars("Words shared by both, in order (records)", steps),
            bars("What changed (records; one may have several)", [(kind, kinds[kind]) for kind in KINDS]),
            bars("Objects only in the dispreferred (records)", added.most_common(8)),
            bars("Length of the conversation (records)", rounds[:8]) if max(turns) > 1 else "",
        )
    )


def _card(triple: Triple, distortions: Mapping[str, Distortion], seed: int, record: int) -> str:
    first, second = _responses(triple.preferred), _responses(triple.dispreferred)
    found = changes(first, second)
    tags = "".join(f'<span class="tag">{kind}</span>' for kind in KINDS if kind in found.kinds)
    if not compared_whole(first, second):
        tags += '<span class="tag">too long: compared at both ends alone</span>'
    rounds = []
    for at in range(0, len(triple.preferred), 2):
        good, bad = marked(triple.preferred[at + 1].text, triple.dispreferred[at + 1].text)
        rounds.append(
            f'<p class="question">{escape(triple.preferred[at].text)}</p><div class="pair"><div><h4>Preferred'
            f"</h4><p>{good}</p></div><div><h4>Dispreferred</h4><p>{bad}</p></div></div>"
        )
    return (
        f"<article><header><b>{escape(triple.id)}</b>{tags}<span class='dim'>overlap {overlap(first, second):.2f}, "
        f"{len(words(first))} → {len(words(second))} words</span></header>"
        f'<div class="pictures">{_figures(triple, distortions, seed, record)}</div>{"".join(rounds)}</article>'
    )


def _figures(triple: Triple, distortions: Mapping[str, Distortion], seed: int, record: int) -> str:
    try:
        picture = open_picture(triple.image)
    except Fault as fault:  # a page about data shows what is wrong with them
        return f'<div class="gone">{escape(str(fault))}</div>'
    shown = [(picture, "picture")]
    if distortions:
        from povid.method.distortions import distort_picture, generator

        for name, distortion in distortions.items():
            source = generator(seed=seed, epoch=0, record=record)
            shown.append((distort_picture(distortion, picture, source), name))
    return "".join(
        f'<figure><img alt="{escape(name)}" src="{_embedded(image)}"><figcaption>{escape(name)}</figcaption></figure>'
        for image, name in shown
    )


def _noise(step: int) -> Distortion:
    """Eq. 4 on a picture's pixels."""
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler  # takes seconds to import

    from povid.method.distortions.diffusion import Diffusion

    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="sigmoid", beta_start=1e-5, beta_end=5e-3)
    return Diffusion(scheduler, step, space="pixel")


def _embedded(picture: Image.Image) -> str:
    """A data URL: small pictures as they are, larger ones scaled down."""
    small = picture.copy()
    small.thumbnail((SIDE, SIDE))
    kind = "PNG" if small.size == picture.size else "JPEG"
    buffer = io.BytesIO()
    small.save(buffer, kind, quality=82)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
