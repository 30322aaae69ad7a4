"""Figure 4: how probable true and habitual words are after a prompt, while noise hides the picture.

Over a set of pictures, the words are the objects that are there (*true*) and the absent object that most often
accompanies the one just mentioned (the *partner*). The probability of a word is that the response continues with it:
the product over its tokens. That of an object is the sum over its names, each with its article.

Shape suffixes: V = views of a picture (noise steps), W = words, N = pictures, K = steps.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from povid import files
from povid.analysis import drawing
from povid.analysis.subject import (
    Subject,
    add_places,
    as_seen,
    compose,
    distorted,
    moved,
    node,
    out_folder,
    split,
    subjects,
)
from povid.dispreference.annotations import read_objects
from povid.dispreference.causes import learn
from povid.fault import Fault
from povid.method.distortions import Distortion
from povid.model.packing import Encoded, pack, stack
from povid.model.policy import Policy
from povid.model.question import Question
from povid.model.template import Template
from povid.preferences.differences import with_article
from povid.preferences.pictures import digest_of
from povid.preferences.triple import Turn
from povid.run.identity import digest

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAME = "token_uncertainty"
STEPS = (*range(0, 1000, 100), 999)
PREFIX = "This image shows {},"
LIKELY = 0.5  # P(partner | mentioned) from which on an absent partner counts as habitual
THUMBNAILS = 5
KINDS = ("true", "partner")
CLAIM = (
    'The paper (section 3.2): under noise "the likelihood of fork surpasses that of plate (ground truth)", since it is '
    "more likely to co-occur."
)


def arguments(parser: argparse.ArgumentParser) -> None:
    add_places(parser)
    parser.add_argument("--image", type=Path, metavar="FILE", help="one picture in place of a set; needs --words")
    parser.add_argument("--words", nargs="+", metavar="WORD", help="what may come after the prefix")
    parser.add_argument("--question", help="what is asked (default: CHAIR's prompt)")
    parser.add_argument(
        "--prefix",
        default=PREFIX,
        help="how the response begins; {} is an object in the picture (default: %(default)s)",
    )
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS, metavar="K", help="noise steps")
    parser.add_argument(
        "--limit", type=int, default=200, metavar="N", help="pictures of the set (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="sequences scored at once (default: %(default)s)")


def measure(options: argparse.Namespace) -> list[Path]:
    """Measure all chosen models; write a figure into each run folder, and one that compares them.

    Raises:
        Fault: an option does not fit, or a picture, a run or the data are missing or damaged.
    """
    if options.image and not options.words:
        raise Fault("--image needs --words: which words may come after the prefix")
    if options.words and not options.image:
        raise Fault("--words belongs to a single picture; name it with --image")
    _, overrides = split(options.places)
    tree = compose(overrides)
    noise = Noise(tree["noise"], tuple(sorted(set(options.steps))))
    noise.at(noise.steps[0])
    models = subjects(options.places, pictures=not options.image)
    return _one_picture(options, models, noise) if options.image else _many_pictures(options, models, noise)


@dataclass(frozen=True)
class Noise:
    """A distortion that has steps, as the settings of a node, and the steps to look at."""

    settings: Mapping[str, Any]
    steps: tuple[int, ...]

    def at(self, step: int) -> Distortion:
        """The distortion at a step. Raises Fault if it has no steps, or not this one."""
        if "step" not in self.settings:
            raise Fault(f"noise: {self.settings.get('_target_')} has no steps; choose noise=sigmoid, linear or cosine")
        return node({"noise": {**self.settings, "step": step}}, "noise")

    def views(self, template: Template, question: Question, seed: int, record: int) -> list[dict[str, Tensor]]:
        """The picture's tensors at every step, with the same noise at all of them."""
        _, images = template.encode([(Turn("user", question.text),)], question.image, question.id)
        return [distorted(self.at(step), template, question, images, seed=seed, record=record) for step in self.steps]


# --- probabilities ---------------------------------------------------------------------------------------------------


@torch.inference_mode()
def probabilities(
    policy: Policy,
    template: Template,
    question: Question,
    prefix: str,
    words: Sequence[str],
    views: Sequence[Mapping[str, Tensor]],
    batch_size: int = 32,
) -> tuple[Tensor, Tensor]:
    """P(the response continues with the word | view, question, prefix) [V, W], and P(next token) [V, vocabulary].

    Raises:
        Fault: a word is empty, or its tokens do not begin where the prefix ends.
    """
    start, tokens = _tokens(template, question, prefix, words)
    contexts = {word[:-1] for word in tokens} | {()}
    rows: list[tuple[int, ...]] = []  # contexts that no other context begins with
    for context in sorted(contexts, key=len, reverse=True):
        if not any(row[: len(context)] == context for row in rows):
            rows.append(context)
    device = next(policy.parameters()).device
    logps: dict[tuple[int, ...], list[Tensor]] = {row: [] for row in rows}
    for at in range(0, len(views), batch_size):
        part = views[at : at + batch_size]
        images = {key: tensor.to(device) for key, tensor in stack([dict(view) for view in part]).items()}
        seen = policy.look(images)
        for row in rows:
            ids = [*start, *row, start[-1]]  # the last token is only there to be predicted
            encoded = Encoded(ids, [False] * len(start) + [True] * (len(row) + 1))
            packed = moved(pack([encoded] * len(part), None), device)
            logits = policy.predict(packed, seen).float().log_softmax(-1)
            logps[row].append(logits.view(len(part), len(row) + 1, -1).cpu())
    joined = {row: torch.cat(parts) for row, parts in logps.items()}
    found = []
    for word in tokens:
        row = next(row for row in rows if row[: len(word) - 1] == word[:-1])
        found.append(sum(joined[row][:, place, token] for place, token in enumerate(word)).exp())
    return torch.stack(found, 1), joined[rows[0]][:, 0].exp()


def _tokens(
    template: Template, question: Question, prefix: str, words: Sequence[str]
) -> tuple[list[int], list[tuple[int, ...]]]:
    """The token ids up to the end of the prefix, and those of every word after it."""
    asked = Turn("user", question.text)
    texts = [prefix, *(f"{prefix} {word}".strip() for word in words)]
    conversations = [(asked, Turn("assistant", text)) if text else (asked,) for text in texts]
    encoded, _ = template.encode(conversations, question.image, question.id)
    ended = [_without_end(one) for one in encoded]
    start, *longer = ended
    tokens = []
    for word, ids in zip(words, longer, strict=True):
        if ids[: len(start)] != start or len(ids) == len(start):
            raise Fault(
                f"{word!r} cannot follow {prefix!r}: the model's tokens of both together do not begin with those of "
                "the prefix, or the sequence is cut at model.max_length; shorten the prefix or end it at a word"
            )
        tokens.append(tuple(ids[len(start) :]))
    return start, tokens


def _without_end(encoded: Encoded) -> list[int]:
    """Token ids without the token that ends the response and what comes after it; a prompt alone as it is."""
    if not any(encoded.response):
        return encoded.input_ids
    last = len(encoded.response) - 1 - encoded.response[::-1].index(True)
    return encoded.input_ids[:last]


# --- a set of pictures -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trap:
    """A picture in which the usual partner of an object is missing. ``true``: the other objects that are there."""

    record: int
    question: Question
    mentioned: str
    partner: str
    true: tuple[str, ...]

    @property
    def words(self) -> dict[str, list[str]]:
        """Every name of the objects, with its article, by kind."""
        names: dict[str, list[str]] = {}
        for word, name in self.question.meta["synonyms"].items():
            names.setdefault(name, []).append(with_article(word))
        objects = {"true": self.true, "partner": (self.partner,)}
        return {kind: [word for name in found for word in names[name]] for kind, found in objects.items()}


def traps(questions: Sequence[Question], habits: Path) -> list[Trap]:
    """The pictures in which habit expects an object that is not there, in the order of the questions.

    Of each picture the pair counts whose P(absent | mentioned), by the pictures of ``habits``, is largest.

    Raises:
        Fault: the file of habits is missing or damaged, or no picture qualifies.
    """
    learned = learn(read_objects(habits))
    known = set(questions[0].meta["synonyms"].values())
    found = []
    for record, question in enumerate(questions):
        there = sorted(question.meta["objects"])
        pairs = [
            (learned.likelihood(other, name), name, other)
            for name in there
            for other in sorted(learned.together.get(name, {}))
            if other in known and other not in there
        ]
        odds, mentioned, partner = max(pairs, default=(0.0, "", ""))
        true = tuple(name for name in there if name != mentioned)
        if odds >= LIKELY and true:
            found.append(Trap(record, question, mentioned, partner, true))
    if not found:
        raise Fault(
            f"{habits} knows of no object that is missing beside its usual companion in these pictures; give objects "
            "of pictures like those that the model learnt from with data.objects=FILE"
        )
    return found


def _many_pictures(options: argparse.Namespace, models: Sequence[Subject], noise: Noise) -> list[Path]:
    if "{}" not in options.prefix:
        raise Fault(f"--prefix {options.prefix!r} has no {{}} for the object that is mentioned; add it")
    befores: dict[tuple[str, str], np.ndarray] = {}
    measured: list[tuple[Subject, dict[str, Any]]] = []
    written: list[Path] = []
    for subject in models:
        chosen = _chosen(options, subject)
        how = _measure(options, chosen, noise)
        found = drawing.kept(NAME, subject, how)
        if found is None:
            print(f"{subject.row}, seed {subject.seed}: {len(chosen)} pictures", file=sys.stderr)
            key = subject.before.digest, digest(how)
            if key not in befores:
                befores[key] = _curves(subject.before, chosen, noise, options)
            after = _curves(subject, chosen, noise, options) if subject.adapters else befores[key]
            found = _content(subject, how, befores[key], after)
            if subject.folder:
                shown = _thumbnails(subject, chosen[0], noise, options)
                drawing.save(_figure(found, shown), subject.folder / f"{NAME}.png", found, noisy=True)
        if subject.folder:
            written += [subject.folder / f"{NAME}{end}" for end in (".png", ".json")]
        measured.append((subject, found))
    for number, group in enumerate(drawing.comparable(measured)):
        file = out_folder(options) / f"{NAME}{f'_{number + 1}' if number else ''}.png"
        subject = group[0][0]
        chosen = _chosen(options, subject)
        written += _compare(drawing.rows(group), _thumbnails(subject, chosen[0], noise, options), file)
    return written


def _chosen(options: argparse.Namespace, subject: Subject) -> list[Trap]:
    if subject.habits is None:
        raise Fault(
            "nothing says which objects usually occur together; give objects of pictures like those that the model "
            "learnt from with data.objects=FILE: COCO's instances JSON or {picture: [objects]}"
        )
    questions = subject.questions()
    if options.question:
        questions = [Question(one.id, one.image, options.question, one.meta) for one in questions]
    return traps(questions, subject.habits)[: options.limit]


def _measure(options: argparse.Namespace, chosen: Sequence[Trap], noise: Noise) -> dict[str, Any]:
    """Everything, apart from the model, that the numbers depend on."""
    asked = [
        [str(trap.question.id), digest_of(trap.question.image), trap.record, trap.mentioned, trap.words]
        for trap in chosen
    ]
    return {
        "question": chosen[0].question.text,
        "prefix": options.prefix,
        "noise": {key: value for key, value in noise.settings.items() if key != "step"},
        "steps": list(noise.steps),
        "seed": options.seed,
        "pictures": len(chosen),
        "content": files.digest(repr(asked).encode()),
    }


def _curves(subject: Subject, chosen: Sequence[Trap], noise: Noise, options: argparse.Namespace) -> np.ndarray:
    """Probabilities [N, K, 2] of true objects and partner."""
    policy, template = subject.load()
    found = np.zeros((len(chosen), len(noise.steps), len(KINDS)))
    for place, trap in enumerate(chosen):
        views = noise.views(template, trap.question, options.seed, trap.record)
        words = trap.words
        every = [word for kind in KINDS for word in words[kind]]
        prefix = options.prefix.format(with_article(trap.mentioned))
        p_VW, _ = probabilities(policy, template, trap.question, prefix, every, views, options.batch_size)
        count = len(words["true"])
        found[place] = torch.stack([p_VW[:, :count].sum(1), p_VW[:, count:].sum(1)], 1).numpy()
    return found


def _content(subject: Subject, how: Mapping[str, Any], before: np.ndarray, after: np.ndarray) -> dict[str, Any]:
    found = drawing.head(NAME, subject, how)
    for name, values in (("before", before), ("after", after), ("change", after - before)):
        found[name] = {kind: drawing.spread(values[..., place]) for place, kind in enumerate(KINDS)}
    found["overtakes"] = {name: _overtakes(found[name], how["steps"]) for name in ("before", "after")}
    return found | {"caption": _caption(found)}


def _overtakes(curves: Mapping[str, Any], steps: Sequence[int]) -> int | None:
    """The first step at which the partner is more probable than the true objects together."""
    true, partner = curves["true"]["mean"], curves["partner"]["mean"]
    return next((step for step, t, p in zip(steps, true, partner) if p > t), None)


def _caption(found: Mapping[str, Any]) -> str:
    how, tuned = found["measure"], found["after"] != found["before"]
    said = (
        f"Probability that a response beginning with {how['prefix'].format('(object)')!r} continues with another "
        "object that is in the picture (true, summed), or with the absent object that usually accompanies the "
        f"mentioned one (partner), over {how['pictures']} pictures (mean and standard error), by noise step. "
    )
    said += f"{CLAIM} Here, before tuning, {_outcome(found['before'], found['overtakes']['before'], how['steps'])}."
    if tuned:
        after = _outcome(found["after"], found["overtakes"]["after"], how["steps"])
        said += f" After tuning ({found['run']['row']}, seed {found['run']['seed']}), {after}."
    return said


def _outcome(curves: Mapping[str, Any], overtakes: int | None, steps: Sequence[int]) -> str:
    partner, true = curves["partner"]["mean"], curves["true"]["mean"]
    top = max(range(len(steps)), key=lambda i: partner[i])
    when = (
        "the partner never overtakes the true objects"
        if overtakes is None
        else f"the partner overtakes the true objects by step {overtakes}"
    )
    return (
        f"{when}: its own probability is {partner[0]:.3f} at step {steps[0]} and at most {partner[top]:.3f} (step "
        f"{steps[top]}), while the true objects' goes from {true[0]:.3f} to {true[-1]:.3f} at step {steps[-1]}"
    )


# --- figures ---------------------------------------------------------------------------------------------------------


def _thumbnails(
    subject: Subject, trap: Trap, noise: Noise, options: argparse.Namespace
) -> list[tuple[int, Image.Image]]:
    """The first picture of the set as the model sees it at some of the steps."""
    template = subject.model.template(subject.model.load_processor())
    return _seen(noise.steps, noise.views(template, trap.question, options.seed, trap.record), template)


def _seen(
    steps: Sequence[int], views: Sequence[Mapping[str, Tensor]], template: Template
) -> list[tuple[int, Image.Image]]:
    places = np.linspace(0, len(steps) - 1, min(THUMBNAILS, len(steps))).round().astype(int)
    drawn = [(steps[place], as_seen(template, views[place])) for place in places]
    return [(step, picture) for step, picture in drawn if picture is not None]


def _figure(found: Mapping[str, Any], shown: Sequence[tuple[int, Image.Image]]) -> Figure:
    """One model, before and after tuning."""
    panels = [("before tuning", [found["before"]])]
    if found["after"] != found["before"]:
        panels.append((f"after tuning: {found['run']['row']}".replace("_", " "), [found["after"]]))
    return _panels(panels, found, shown, "1 seed")


def _compare(shown: Sequence[drawing.Shown], pictures: Sequence[tuple[int, Image.Image]], file: Path) -> list[Path]:
    """All rows beside each other, over their seeds."""
    first = shown[0].found[0]
    panels = [(row.label, [one["after"] for one in row.found]) for row in shown]
    content: dict[str, Any] = {"analysis": NAME, "measure": first["measure"], "rows": {}}
    outcomes = []
    for row, (_, curves) in zip(shown, panels, strict=True):
        joined = {kind: {"mean": drawing.mean([one[kind]["mean"] for one in curves])} for kind in KINDS}
        overtakes = _overtakes(joined, first["measure"]["steps"])
        content["rows"][row.label] = {
            "runs": [one["run"] for one in row.found],
            "overtakes": overtakes,
            **{kind: joined[kind] | {"seeds": [one[kind] for one in curves]} for kind in KINDS},
        }
        outcomes.append(f"{row.label}: {_outcome(joined, overtakes, first['measure']['steps'])}")
    how = first["measure"]
    content["caption"] = (
        f"What follows {how['prefix'].format('(object)')!r}: the other objects that are in the picture (true, summed) "
        f"or the absent object that usually accompanies the mentioned one (partner); {how['pictures']} pictures, "
        f"{drawing.seeds(shown)}. {CLAIM} Here: {'; '.join(outcomes)}."
    )
    return drawing.save(_panels(panels, first, pictures, drawing.seeds(shown)), file, content, noisy=True)


def _panels(
    panels: Sequence[tuple[str, Sequence[Mapping[str, Any]]]],
    found: Mapping[str, Any],
    shown: Sequence[tuple[int, Image.Image]],
    over: str,
) -> Figure:
    how, steps = found["measure"], found["measure"]["steps"]

    def draw(axes: Axes, place: int) -> None:
        seeds = panels[place][1]
        for kind, ink, dash, legend in (
            ("true", drawing.TRUE, "-", "objects in the picture"),
            ("partner", drawing.PARTNER, "--", "usual partner, not in the picture"),
        ):
            for one in seeds if len(seeds) > 1 else ():
                axes.plot(steps, one[kind]["mean"], color=ink, ls=dash, lw=0.7, alpha=0.35)
            values = drawing.mean([one[kind]["mean"] for one in seeds])
            axes.plot(steps, values, color=ink, ls=dash, lw=2, label=legend)
            if len(seeds) == 1:
                error = np.asarray(seeds[0][kind]["se"])
                axes.fill_between(steps, values - error, values + error, color=ink, alpha=0.2, lw=0)

    said = f"the response begins {how['prefix'].format('a …')!r}; {how['pictures']} pictures, {over}"
    heading = "What does the model name next, as noise hides the picture?", said
    return _over_steps([name for name, _ in panels], draw, heading, shown)


def _over_steps(
    names: Sequence[str],
    draw: Callable[[Axes, int], None],
    heading: tuple[str, str],
    pictures: Sequence[tuple[int, Image.Image]],
) -> Figure:
    """Panels of probabilities over noise steps, above the noised pictures; ``draw`` fills the panel of a number."""
    across = min(len(names), 3)
    down = -(-len(names) // across)
    heights = [2.3 * down] + ([1.35] if pictures else [])
    figure = drawing.canvas(sum(heights) + 0.6)
    top, *bottom = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    drawing.title(top, *heading)
    grid = top.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    for place, axes in enumerate(grid.flat):
        if place >= len(names):
            axes.set_visible(False)
            continue
        draw(axes, place)
        axes.set_title(names[place], fontsize=10)
        axes.grid(alpha=0.25)
        if place % across == 0:
            axes.set_ylabel("probability")
        if place + across >= len(names):
            axes.set_xlabel("noise step")
            axes.tick_params(labelbottom=True)
    grid[0][0].set_ylim(0, None)  # all panels share it
    handles, labels = grid[0][0].get_legend_handles_labels()
    top.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9.5, frameon=False)
    if bottom:
        row = bottom[0].subplots(1, len(pictures), squeeze=False)[0]
        for axes, (step, picture) in zip(row, pictures, strict=True):
            drawing.bare(axes, picture, f"step {step}")
    return figure


# --- one picture -----------------------------------------------------------------------------------------------------


def _one_picture(options: argparse.Namespace, models: Sequence[Subject], noise: Noise) -> list[Path]:
    """The probabilities of chosen words after a prefix, for one picture and every model."""
    image, first = options.image, models[0]
    asked = options.question or (first.pictures.prompt if first.pictures else None)
    if not asked:
        raise Fault("--question is missing: what is asked about the picture")
    question = Question(image.stem, image, asked)
    measured, shown = [], []
    for subject in models:
        print(f"{subject.row}, seed {subject.seed}: {image}", file=sys.stderr)
        policy, template = subject.load()
        views = noise.views(template, question, options.seed, 0)
        p_VW, next_VT = probabilities(
            policy, template, question, options.prefix, options.words, views, options.batch_size
        )
        best = next_VT.max(-1)
        tokenizer = template.processor.tokenizer
        found: dict[str, Any] = {"run": subject.record(), "words": {}}
        found["words"] = {word: p_VW[:, place].tolist() for place, word in enumerate(options.words)}
        found["most_likely"] = [
            {"token": tokenizer.decode([token]), "probability": value}
            for token, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
        measured.append((subject, found))
        shown = shown or _seen(noise.steps, views, template)
    content = {
        "analysis": NAME,
        "image": {"name": image.name, "digest": files.digest(image)},
        "question": asked,
        "prefix": options.prefix,
        "noise": {key: value for key, value in noise.settings.items() if key != "step"},
        "steps": list(noise.steps),
        "seed": options.seed,
        "models": [found for _, found in measured],
    }
    rows = drawing.rows(measured)
    content["caption"] = (
        f"Probability that the response continues with a word after {options.prefix!r}, for {image.name}, by noise "
        f"step (one picture, one draw of noise, {drawing.seeds(rows)}). {CLAIM}"
    )
    return drawing.save(
        _words(rows, content, shown), out_folder(options) / f"{NAME}_{image.stem}.png", content, noisy=True
    )


def _words(
    shown: Sequence[drawing.Shown], content: Mapping[str, Any], pictures: Sequence[tuple[int, Image.Image]]
) -> Figure:
    inks = (drawing.TRUE, drawing.PARTNER, *drawing.MORE)

    def draw(axes: Axes, place: int) -> None:
        found = shown[place].found
        for number, word in enumerate(found[0]["words"]):
            values = drawing.mean([one["words"][word] for one in found])
            ink, dash = inks[number % len(inks)], ("-", "--", ":", "-.")[number % 4]
            axes.plot(content["steps"], values, color=ink, ls=dash, lw=2, label=word)

    heading = f"What comes after {content['prefix']!r}?", "one picture, one draw of noise"
    return _over_steps([row.label for row in shown], draw, heading, pictures)
