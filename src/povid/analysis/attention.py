"""Figure 5: where a model looks while it writes, before and after tuning.

The same texts, which the model wrote before tuning, are read by the model before and after, so that differences are
paired. The attention of a token is that of the position at which it was chosen, averaged over heads. Its share on the
image is the sum over the image's positions; the rest lies on the prompt and on the response so far.

Shape suffixes: L = layers, T = positions, U = response tokens, N = texts, S = shares (image, prompt, response).
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from povid import files
from povid.analysis import drawing
from povid.analysis.subject import Subject, add_places, as_seen, moved, out_folder, subjects
from povid.fault import Fault
from povid.model.generation import Answers
from povid.model.packing import PADDING, Packed, pack
from povid.model.policy import Policy
from povid.model.question import Decoding, Question
from povid.model.template import Template
from povid.preferences.pictures import digest_of, open_picture
from povid.preferences.triple import Turn
from povid.report.figures import COLORS, MORE
from povid.run.identity import digest

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

NAME = "attention"
SHARES = ("image", "prompt", "response")
CLAIM = (
    "The paper (section 4.3): the original model overemphasizes the text, and POVID increasingly prioritizes attention "
    "towards the image."
)
SHOWN = 24  # tokens of a response in a map


def arguments(parser: argparse.ArgumentParser) -> None:
    add_places(parser)
    parser.add_argument("--image", type=Path, metavar="FILE", help="one picture in place of a set")
    parser.add_argument("--question", help="what is asked (default: CHAIR's prompt)")
    parser.add_argument(
        "--limit", type=int, default=100, metavar="N", help="pictures of the set (default: %(default)s)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=96, help="of a response (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="responses written at once (default: %(default)s)")


def measure(options: argparse.Namespace) -> list[Path]:
    """Measure all chosen models; write a figure into each run folder, and one that compares them.

    Raises:
        Fault: a picture, a run or the data are missing or damaged.
    """
    befores: dict[str, Reading] = {}
    measured: list[tuple[Subject, dict[str, Any]]] = []
    written: list[Path] = []
    models = subjects(options.places, pictures=not options.image)
    for subject in models:
        questions = _questions(options, subject)
        how = _measure(options, questions)
        file = _file(options, subject, len(models))
        found = None if options.image else drawing.kept(NAME, subject, how)
        if found is None:
            print(f"{subject.row}, seed {subject.seed}: {len(questions)} pictures", file=sys.stderr)
            key = digest([subject.before.digest, how])
            if key not in befores:
                befores[key] = _own(subject.before, questions, options)
            before = befores[key]
            after = _read(*_eager(subject), questions, before.texts) if subject.adapters else before
            found = _content(subject, how, before, after)
            drawing.save(_figure(found, before, after), file, found)
        written += [file, file.with_suffix(".json")]
        measured.append((subject, found))
    if options.image or models[0].run is None:
        return written
    for number, group in enumerate(drawing.comparable(measured)):
        file = out_folder(options) / f"{NAME}{f'_{number + 1}' if number else ''}.png"
        written += _compare(drawing.rows(group), file)
    return written


def _file(options: argparse.Namespace, subject: Subject, models: int) -> Path:
    if not options.image:
        return (subject.folder or out_folder(options)) / f"{NAME}.png"
    who = f"_{subject.row}_seed{subject.seed}" if models > 1 else ""
    return out_folder(options) / f"{NAME}_{options.image.stem}{who}.png"


def _questions(options: argparse.Namespace, subject: Subject) -> list[Question]:
    if options.image:
        asked = options.question or (subject.pictures.prompt if subject.pictures else None)
        if not asked:
            raise Fault("--question is missing: what is asked about the picture")
        open_picture(options.image)
        return [Question(options.image.stem, options.image, asked)]
    questions = subject.questions(options.limit)
    return [Question(one.id, one.image, options.question or one.text, one.meta) for one in questions]


def _measure(options: argparse.Namespace, questions: Sequence[Question]) -> dict[str, Any]:
    """Everything, apart from the model, that the numbers depend on."""
    asked = [[str(question.id), digest_of(question.image), question.text] for question in questions]
    return {
        "question": questions[0].text,
        "max_new_tokens": options.max_new_tokens,
        "pictures": len(questions),
        "content": files.digest(repr(asked).encode()),
    }


# --- attention -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Look:
    """Where a response looks. ``rows_LUT``: attention of each of its tokens, averaged over heads; rows sum to 1.

    ``kind_T`` is the index in SHARES of what stands at a position. ``tokens`` are those of the response as text, and
    ``picture`` is what the model sees, None where its tensors are no picture.
    """

    rows_LUT: Tensor
    kind_T: Tensor
    tokens: list[str]
    picture: Image.Image | None

    def shares(self) -> Tensor:
        """The mean over response tokens of the attention on image, prompt and response [L, S]."""
        return torch.stack([self.rows_LUT[..., self.kind_T == kind].sum(-1).mean(-1) for kind in range(3)], -1)

    def grid(self) -> np.ndarray | None:
        """The mean over layers and response tokens of the attention on each patch [side, side].

        None where the image's positions do not form a square over one picture.
        """
        on_image = self.rows_LUT.mean((0, 1))[self.kind_T == 0]
        side = math.isqrt(len(on_image))
        return on_image.view(side, side).numpy() if self.picture and side * side == len(on_image) else None


@dataclass(frozen=True)
class Reading:
    """Texts about a set of pictures, ``shares_NLS`` of each, and the whole of the first."""

    texts: list[str]
    shares_NLS: np.ndarray
    first: Look


@torch.inference_mode()
def look(policy: Policy, template: Template, question: Question, text: str) -> Look:
    """Where the policy, whose attention must be ``eager``, looks while it writes ``text``.

    Raises:
        Fault: the model gives no attention weights.
    """
    device = next(policy.parameters()).device
    conversation = (Turn("user", question.text), Turn("assistant", text))
    (encoded,), images = template.encode([conversation], question.image, question.id)
    packed = moved(pack([encoded], None), device)
    there = {key: tensor.to(device) for key, tensor in images.items()}
    weights = _weights(policy, packed, there)
    if not weights or any(layer is None for layer in weights):
        raise Fault(f"{policy.settings.name}: {policy.model_type!r} models give no attention weights")
    rows = torch.stack([layer[0].float().mean(0)[packed.column_U].cpu() for layer in weights])
    ids = torch.tensor(encoded.input_ids)
    kind = torch.where(torch.tensor(encoded.response), SHARES.index("response"), SHARES.index("prompt"))
    kind[ids == policy.network.config.image_token_id] = SHARES.index("image")
    tokenizer = template.processor.tokenizer
    written = [tokenizer.decode([token]) for token in packed.preferred.token_N.tolist()]
    single = images["pixel_values"].ndim == 4 and len(images["pixel_values"]) == 1
    return Look(rows, kind, written, as_seen(template, images) if single else None)


def _weights(policy: Policy, packed: Packed, images: Mapping[str, Tensor]) -> Sequence[Tensor]:
    """The attention of every layer [1, heads, T, T]."""
    if policy.packable:
        ids, places = packed.input_ids_BT, packed.position_ids_BT
        inputs = policy.decoder_inputs(ids, places, packed.segment_BT != PADDING, policy.look(images))
        mask = policy.masks(packed.attention()[:, 0], ids, places, inputs["inputs_embeds"].dtype)
        output = policy.network.get_decoder()(**inputs, attention_mask=mask, use_cache=False, output_attentions=True)
    else:
        inputs = {"input_ids": packed.input_ids_BT, "attention_mask": torch.ones_like(packed.input_ids_BT), **images}
        inputs |= policy.token_kinds(packed.input_ids_BT)
        output = policy.network.model(**inputs, use_cache=False, output_attentions=True)
    return output.attentions


def _eager(subject: Subject) -> tuple[Policy, Template]:
    """Faster attention never has its weights in memory."""
    return subject.load(attention="eager")


def _own(subject: Subject, questions: Sequence[Question], options: argparse.Namespace) -> Reading:
    """What the model writes itself, greedily, and where it looks."""
    policy, template = _eager(subject)
    answers = Answers(policy, template, options.batch_size)
    texts = dict(answers(questions, Decoding(options.max_new_tokens)))
    return _read(policy, template, questions, [texts[number] for number in range(len(questions))])


def _read(policy: Policy, template: Template, questions: Sequence[Question], texts: Sequence[str]) -> Reading:
    """Where the model looks in given texts; empty ones have nothing to look from and are left out."""
    shares, first = [], None
    for question, text in zip(questions, texts, strict=True):
        if text:
            found = look(policy, template, question, text)
            shares.append(found.shares().numpy())
            first = first or found
    if first is None:
        raise Fault(f"{policy.settings.name} wrote nothing about any of {len(questions)} pictures")
    return Reading(list(texts), np.stack(shares), first)


def _content(subject: Subject, how: Mapping[str, Any], before: Reading, after: Reading) -> dict[str, Any]:
    found = drawing.head(NAME, subject, how)
    found["texts"] = {"count": len(before.shares_NLS), "digest": files.digest(repr(before.texts).encode())}
    readings = {
        "before": before.shares_NLS,
        "after": after.shares_NLS,
        "change": after.shares_NLS - before.shares_NLS,
    }
    for name, shares in readings.items():
        found[name] = {
            share: drawing.spread(shares[..., place]) | {"layers": drawing.spread(shares[..., place].mean(1))}
            for place, share in enumerate(SHARES)
        }
    return found | {"caption": _caption(found)}


def _caption(found: Mapping[str, Any]) -> str:
    count, who = found["texts"]["count"], f"{found['run']['row']}, seed {found['run']['seed']}".replace("_", " ")
    said = "Attention of a response's tokens on the image, the prompt and the response so far, averaged over heads. "
    if count > 1:
        said += (
            f"The same {count} texts, which the model wrote before tuning, are read before and after ({who}). Top: "
            "where the first text looks; below: share on the image by layer, with standard errors over texts. "
        )
    else:
        said += f"The same text, which the model wrote before tuning, is read before and after ({who}). "
    said += f"{CLAIM} "
    if found["after"] == found["before"]:
        return (
            f"{said}Here nothing was tuned: {100 * found['before']['image']['layers']['mean']:.1f} % lie on the image."
        )
    return said + f"Here {_outcome(found)}."


def _outcome(found: Mapping[str, Any]) -> str:
    before, after, change = (found[name]["image"] for name in ("before", "after", "change"))
    places = range(len(change["mean"]))
    up = max(places, key=lambda place: change["mean"][place])
    down = min(places, key=lambda place: change["mean"][place])
    return (
        f"the share on the image goes from {100 * before['layers']['mean']:.1f} to "
        f"{100 * after['layers']['mean']:.1f} % "
        f"({100 * change['layers']['mean']:+.2f} ± {100 * change['layers']['se']:.2f} points, paired, mean of all "
        f"layers); most in layer {up + 1} ({100 * change['mean'][up]:+.2f} ± {100 * change['se'][up]:.2f}), least in "
        f"layer {down + 1} ({100 * change['mean'][down]:+.2f} ± {100 * change['se'][down]:.2f})"
    )


# --- figures ---------------------------------------------------------------------------------------------------------


def _figure(found: Mapping[str, Any], before: Reading, after: Reading) -> Figure:
    """One model: the overlay on a picture, the map of a response, and the shares, before and after tuning."""
    tuned = found["after"] != found["before"]
    looks = [("before tuning", before.first)] + ([(f"after: {_name(found)}", after.first)] if tuned else [])
    many = found["texts"]["count"] > 1
    grids = [one.grid() for _, one in looks]
    heights = [1.9 if grids[0] is not None else 0.0, 3.5, 2.6 if many else 0.0]
    figure = drawing.canvas(sum(heights) + 0.7)
    parts = iter(
        figure.subfigures(
            sum(height > 0 for height in heights), 1, height_ratios=[h for h in heights if h], squeeze=False
        )[:, 0]
    )
    figure.suptitle("Where does the model look while it writes?", fontsize=11, x=0.01, ha="left")
    if grids[0] is not None:
        _overlays(next(parts), looks, grids)
    _maps(next(parts), looks)
    if many:
        _shares(next(parts), found, tuned)
    return figure


def _name(found: Mapping[str, Any]) -> str:
    return str(found["run"]["row"]).replace("_", " ")


def _overlays(part: SubFigure, looks: Sequence[tuple[str, Look]], grids: Sequence[np.ndarray]) -> None:
    """The picture, the attention on it, and what tuning changed."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgba

    picture = looks[0][1].picture
    grey = picture.convert("L").convert("RGB")
    box = (-0.5, picture.width - 0.5, picture.height - 0.5, -0.5)
    more, less = (to_rgba(ink, 0.85) for ink in (drawing.PARTNER, drawing.TRUE))
    clear = (1.0, 1.0, 1.0, 0.0)
    most = 100 * max(float(grid.max()) for grid in grids)
    axes = part.subplots(1, 1 + len(grids) + (len(grids) > 1), squeeze=False)[0]
    drawing.bare(axes[0], picture, "what the model sees")
    for place, ((name, _), grid) in enumerate(zip(looks, grids, strict=True), 1):
        drawing.bare(axes[place], grey, name)
        scale = LinearSegmentedColormap.from_list("attention", [clear, more])
        heat = axes[place].imshow(100 * grid, extent=box, cmap=scale, vmin=0, vmax=most)
    part.colorbar(heat, ax=axes[place], shrink=0.8, label="% of attention")
    if len(grids) > 1:
        change = 100 * (grids[1] - grids[0])
        limit = float(np.abs(change).max()) or 1.0
        drawing.bare(axes[3], grey, "change")
        scale = LinearSegmentedColormap.from_list("change", [less, clear, more])
        heat = axes[3].imshow(change, extent=box, cmap=scale, vmin=-limit, vmax=limit)
        part.colorbar(heat, ax=axes[3], shrink=0.8, label="points")


def _maps(part: SubFigure, looks: Sequence[tuple[str, Look]]) -> None:
    """Tokens of a response (rows) over image, prompt and response positions (columns)."""
    from matplotlib.colors import PowerNorm

    grid = part.subplots(1, len(looks), squeeze=False, sharey=True)[0]
    for axes, (name, one) in zip(grid, looks, strict=True):
        order = torch.argsort(one.kind_T, stable=True)
        rows = one.rows_LUT.mean(0)[:SHOWN, order]
        heat = axes.imshow(
            100 * rows.numpy(), aspect="auto", cmap="viridis", norm=PowerNorm(0.5, 0, 30), interpolation="nearest"
        )
        counts = [int((one.kind_T == kind).sum()) for kind in range(3)]
        edges = np.cumsum(counts)
        for edge in edges[:-1]:
            axes.axvline(edge - 0.5, color="white", lw=1.5)
        axes.set_xticks(edges - np.array(counts) / 2 - 0.5, SHARES, fontsize=8.5)
        axes.tick_params(length=0)
        axes.set_title(name, fontsize=8.5)
    grid[0].set_yticks(range(len(rows)), [token.strip() or "⏎" for token in looks[0][1].tokens[:SHOWN]], fontsize=7.5)
    part.suptitle("a response: each of its tokens (rows) and what it looks at (mean of layers and heads)", fontsize=9.5)
    part.colorbar(heat, ax=list(grid), label="% of attention", shrink=0.8, extend="max")


def _shares(part: SubFigure, found: Mapping[str, Any], tuned: bool) -> None:
    """The share on the image by layer, before and after, and the paired change."""
    axes = part.subplots(1, 2 if tuned else 1, squeeze=False)[0]
    layers = range(1, len(found["before"]["image"]["mean"]) + 1)
    ink = COLORS.get(found["run"]["row"], MORE[0])
    for name, color, mark in (("before", "#4d4d4d", "s"), ("after", ink, "o"))[: 1 + tuned]:
        values, errors = (100 * np.asarray(found[name]["image"][key]) for key in ("mean", "se"))
        axes[0].errorbar(layers, values, errors, color=color, marker=mark, ms=5, lw=1.6, capsize=2, label=name)
    _layers(axes[0], "% of attention on the image", layers)
    axes[0].set_ylim(0, 1.1 * axes[0].dataLim.y1)
    axes[0].legend(fontsize=8.5, frameon=False)
    part.suptitle(f"share on the image, over {found['texts']['count']} texts (bars: standard errors)", fontsize=9.5)
    if tuned:
        values, errors = (100 * np.asarray(found["change"]["image"][key]) for key in ("mean", "se"))
        axes[1].axhline(0, color="#4d4d4d", lw=0.8)
        axes[1].errorbar(layers, values, errors, color=ink, marker="o", ms=5, lw=1.6, capsize=2)
        _layers(axes[1], "change in points (paired)", layers)


def _layers(axes: Axes, label: str, layers: Sequence[int]) -> None:
    axes.set_xlabel("layer")
    axes.set_ylabel(label)
    axes.grid(alpha=0.25)
    if len(layers) <= 12:
        axes.set_xticks(layers)


def _compare(shown: Sequence[drawing.Shown], file: Path) -> list[Path]:
    """The share on the image of all rows, over their seeds."""
    first = shown[0].found[0]
    layers = range(1, len(first["before"]["image"]["mean"]) + 1)
    figure = drawing.canvas(3.6)
    drawing.title(
        figure,
        "Does tuning move attention to the image?",
        f"the same {first['texts']['count']} texts for every row, {drawing.seeds(shown)}; bars: standard errors over "
        "texts",
    )
    left, right = figure.subplots(1, 2)
    content: dict[str, Any] = {"analysis": NAME, "measure": first["measure"], "texts": first["texts"], "rows": {}}
    outcomes = []
    right.axhline(0, color="#4d4d4d", lw=0.8)
    for number, row in enumerate(shown):
        joined = {
            name: {key: drawing.mean([one[name]["image"][key] for one in row.found]) for key in ("mean", "se")}
            | {
                "layers": {
                    key: float(np.mean([one[name]["image"]["layers"][key] for one in row.found]))
                    for key in ("mean", "se")
                }
            }
            for name in ("before", "after", "change")
        }
        content["rows"][row.label] = {"runs": [one["run"] for one in row.found], "image": joined}
        mark = "s^vDoPX*"[number % 8]
        tuned = any(one["after"] != one["before"] for one in row.found)
        values, errors = (100 * np.asarray(joined["after"][key]) for key in ("mean", "se"))
        style = {"color": row.ink, "marker": mark, "ms": 5, "lw": 1.5, "capsize": 2}
        left.errorbar(layers, values, errors, label=row.label, **style)
        if tuned:
            values, errors = (100 * np.asarray(joined["change"][key]) for key in ("mean", "se"))
            right.errorbar(layers, values, errors, **style)
            outcomes.append(f"{row.label}: {_outcome({name: {'image': one} for name, one in joined.items()})}")
    _layers(left, "% of attention on the image", layers)
    _layers(right, "change in points (paired)", layers)
    left.set_ylim(0, 1.1 * left.dataLim.y1)
    figure.legend(loc="outside lower center", ncols=min(5, len(shown)), fontsize=9, frameon=False)
    content["caption"] = (
        f"Share of the attention of response tokens that lies on the image, by layer, averaged over heads; the same "
        f"{first['texts']['count']} texts, written by the model before tuning, for every row ({drawing.seeds(shown)}; "
        f"standard errors over texts). {CLAIM} Here: {'; '.join(outcomes) or 'nothing was tuned'}."
    )
    return drawing.save(figure, file, content)
