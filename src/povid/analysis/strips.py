"""A picture under every distortion of conf/noise: at several steps where it has steps, else in several draws."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from povid import files
from povid.analysis import drawing
from povid.analysis.subject import compose, node
from povid.fault import Fault
from povid.method.distortions import distort_picture, generator
from povid.preferences.pictures import Pictures, open_picture
from povid.run.overrides import options as options_of

STEPS = (0, 250, 500, 750, 999)
SIDE = 320  # pixels of the longer side that is distorted and drawn


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", type=Path, metavar="IMAGE", help="the picture")
    parser.add_argument("noise", nargs="*", metavar="NAME", help="files of conf/noise (default: all of them)")
    parser.add_argument(
        "--others", type=Path, nargs="+", default=(), metavar="IMAGE", help="other records' pictures, for other_picture"
    )
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS, metavar="K", help="noise steps")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    parser.add_argument("--record", type=int, default=0, help="number of the picture's record (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/analysis"), metavar="DIR", help="folder (default: %(default)s)"
    )


def measure(options: argparse.Namespace) -> list[Path]:
    """Distort the picture as training would in its first epochs, on the picture's own pixels.

    The numbers are the root mean square of the change and the correlation with the picture, both over 8-bit colours
    in [0, 1].

    Raises:
        Fault: the picture cannot be opened, or there is no such distortion or step.
    """
    picture = open_picture(options.image)
    picture.thumbnail((SIDE, SIDE))
    content: dict[str, Any] = {
        "analysis": "strips",
        "image": {"name": options.image.name, "digest": files.digest(options.image)},
        "seed": options.seed,
        "record": options.record,
        "distortions": {},
    }
    strips = []
    for name in options.noise or options_of("noise"):
        settings = compose([f"noise={name}"])["noise"]
        try:
            views = list(_views(settings, picture, options))
        except Fault as fault:
            if options.noise:
                raise
            content.setdefault("left_out", {})[name] = str(fault)
            continue
        strips.append((name, [(label, view) for label, view, _ in views]))
        content["distortions"][name] = {"settings": settings, "views": [numbers for _, _, numbers in views]}
    content["caption"] = (
        f"{options.image.name} under {len(strips)} distortions, the same noise at every step (seed {options.seed}, "
        f"record {options.record}), added to colours in [0, 1]. In space=normalized, noise is added to colours divided "
        "by the standard deviation of the model's processor, so a model sees it weaker by that factor. The paper "
        "(section 3.2): a noised picture should remain easily recognizable; it uses step 500 of sigmoid."
        + "".join(f" Left out: {name} ({reason})." for name, reason in content.get("left_out", {}).items())
    )
    return drawing.save(_figure(strips), options.out / f"strips_{options.image.stem}.png", content, noisy=True)


def _views(settings: Mapping[str, Any], picture: Image.Image, options: argparse.Namespace) -> Any:
    """(label, distorted picture, numbers) for each step, or for each of as many epochs."""
    stepped = "step" in settings
    for epoch, step in enumerate(sorted(set(options.steps))):
        distortion = node({"noise": {**settings, "step": step} if stepped else settings}, "noise")
        distortion = distortion.among(Pictures(options.others))
        source = generator(seed=options.seed, epoch=0 if stepped else epoch, record=options.record)
        view = distort_picture(distortion, picture, source)
        clean, other = (np.asarray(one, dtype=float).ravel() / 255 for one in (picture, view))
        varies = clean.std() > 0 and other.std() > 0
        numbers = {
            "step" if stepped else "epoch": step if stepped else epoch,
            "rms_change": round(float(np.sqrt(((other - clean) ** 2).mean())), 6),
            "correlation": round(float(np.corrcoef(clean, other)[0, 1]), 6) if varies else None,
        }
        yield (f"step {step}" if stepped else f"draw {epoch + 1}"), view, numbers


def _figure(strips: Sequence[tuple[str, Sequence[tuple[str, Image.Image]]]]) -> Any:
    across = max(len(views) for _, views in strips)
    side = drawing.WIDTH / (across + 0.6)
    figure = drawing.canvas(len(strips) * (side + 0.3) + 0.4)
    drawing.title(figure, "What each distortion leaves of a picture")
    grid = figure.subplots(len(strips), across, squeeze=False)
    for row, (name, views) in zip(grid, strips, strict=True):
        for axes, (label, view) in zip(row, views):
            drawing.bare(axes, view, label)
        for axes in row[len(views) :]:
            axes.set_visible(False)
        row[0].set_ylabel(name.replace("_", " "), fontsize=10)
    return figure
