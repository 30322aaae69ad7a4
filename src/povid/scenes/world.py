"""The embedded world as ordinary files: POVID preferences, CHAIR and POPE files, pictures.

    folder/preferences.json, images/                      800 records <image, preferred, dispreferred>
    folder/habits.json                          objects of 2000 pictures like those that the base model learnt from
    folder/{tuning,evaluation}/images/
    folder/{tuning,evaluation}/objects.json, synonyms.txt                         CHAIR
    folder/{tuning,evaluation}/coco_pope_{random,popular,adversarial}.json        POPE

Everything is drawn from one seed, every split from its own stream; the same settings give the same bytes.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from filelock import FileLock
from pydantic import Field

from povid.dispreference.causes import Share
from povid.fault import Fault, validated
from povid.files import remove, write_json, write_text
from povid.scenes.hallucination import WorldShares, draw_answer_pair, draw_caption_pair
from povid.scenes.language import CAPTION_PROMPT, question
from povid.scenes.painter import paint
from povid.scenes.scene import BASE_PARTNER, HARD_PARTNER, Scene, draw_scene
from povid.scenes.vocabulary import NAMES, synonyms_file

VERSION = 1  # raised when a seed no longer gives the same bytes
Whole = Annotated[int, Field(ge=0)]
_STREAMS = {"preferences": 1, "tuning": 2, "evaluation": 3, "habits": 4}
HABITS = 2000  # pictures
POPE_SPLITS = ("random", "popular", "adversarial")


class World(WorldShares):
    """The settings of :func:`prepare`."""

    seed: Whole
    preferences: Whole
    tuning: Whole
    evaluation: Whole
    yes_no_share: Share
    partner: Share
    preference_partner: Share | None


def prepare(
    folder: Path | str,
    *,
    seed: Whole = 0,
    preferences: Whole = 800,
    tuning: Whole = 300,
    evaluation: Whole = 500,
    yes_no_share: Share = 0.25,
    object_share: Share = 0.7,
    swap_share: Share = 0.7,
    two_objects_share: Share = 0.5,
    stranger_share: Share = 0.7,
    any_object_share: Share = 0.3,
    partner: Share = HARD_PARTNER,
    preference_partner: Share | None = None,
) -> Path:
    """Write the world to ``folder`` unless it is already complete, and return ``folder``.

    Args:
        seed: of all draws; at least 0.
        preferences: number of preference records; ``tuning`` and ``evaluation``: numbers of pictures, each with 6 POPE
            questions for every split of POPE.
        yes_no_share: share of the records that ask a yes/no question, in [0, 1].
        object_share, swap_share, two_objects_share, stranger_share, any_object_share: how hallucinations are drawn, see
            :class:`povid.scenes.hallucination.WorldShares`.
        partner: P(partner | anchor) in all three splits, in [0, 1].
        preference_partner: P(partner | anchor) in the preferences, None for ``partner``. The nearer to 0.95, the nearer
            the preferred captions are to what the base model has already learnt, and the less they teach on their own.

    Raises:
        Fault: a setting is out of range, ``folder`` contains something else, or it cannot be written.
    """
    folder = Path(folder)
    settings: dict[str, Any] = {
        "version": VERSION,
        "seed": seed,
        "preferences": preferences,
        "tuning": tuning,
        "evaluation": evaluation,
        "yes_no_share": yes_no_share,
        "swap_share": swap_share,
        "partner": partner,
        "preference_partner": preference_partner,
    }
    shares = {
        "object_share": object_share,
        "two_objects_share": two_objects_share,
        "stranger_share": stranger_share,
        "any_object_share": any_object_share,
    }
    world = validated(World, {key: settings[key] for key in settings if key != "version"} | shares, "embedded world")
    # settings added later enter the manifest only if they differ from the default, so that older folders stay valid
    settings |= {key: value for key, value in shares.items() if value != World.model_fields[key].default}
    if preference_partner is None:
        del settings["preference_partner"]
    try:
        if _complete(folder, settings):
            if not (folder / "habits.json").exists():  # written before this file existed
                _write_habits(folder / "habits.json", seed)
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = folder.with_name(f".{folder.name}.part")
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if _complete(folder, settings):  # by the process that held the lock
                return folder
            remove(draft)  # what a killed process has left
            try:
                draft.mkdir()
                _write(draft, world)
                write_json(draft / "manifest.json", settings)
                _settle(draft, folder, settings)
            finally:
                remove(draft)
    except OSError as error:
        raise Fault(
            f"the embedded world cannot be written to {folder}: {error.strerror or error}; free space or "
            "choose another folder"
        ) from error
    return folder


def _write(folder: Path, world: World) -> None:
    partner = world.partner if world.preference_partner is None else world.preference_partner
    scenes = _scenes(world.seed, "preferences", world.preferences, partner)
    _write_preferences(folder, scenes, np.random.default_rng([world.seed, _STREAMS["preferences"], 1]), world)
    for split, number in (("tuning", world.tuning), ("evaluation", world.evaluation)):
        scenes = _scenes(world.seed, split, number, world.partner)
        _write_benchmarks(folder / split, split, scenes, np.random.default_rng([world.seed, _STREAMS[split], 1]))
    _write_habits(folder / "habits.json", world.seed)


def _settle(draft: Path, folder: Path, settings: dict) -> None:
    """Rename the draft to ``folder``. A folder that another process has completed meanwhile stays: it may be in use."""
    try:
        os.rename(draft, folder)
    except OSError:
        if not _complete(folder, settings):
            raise


def _complete(folder: Path, settings: dict) -> bool:
    """Whether the folder contains the world of these settings; False if it is empty or does not exist."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        found = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise Fault(
            f"{folder} is not empty and holds no embedded world (no readable manifest.json); choose another "
            "folder or remove it"
        ) from None
    if found != settings:
        other = found if isinstance(found, dict) else {}
        differing = sorted(key for key in {*settings, *other} if settings.get(key) != other.get(key))
        raise Fault(
            f"{folder} holds an embedded world with other settings ({', '.join(differing) or 'unreadable'}); "
            "choose another folder or remove it"
        )
    return True


def _scenes(seed: int, split: str, number: int, partner: float) -> list[Scene]:
    rng = np.random.default_rng([seed, _STREAMS[split], 0])
    return [draw_scene(rng, partner) for _ in range(number)]


def _write_habits(file: Path, seed: int) -> None:
    """The objects of scenes that the base model learnt from, for ``dispreference=cooccurrence`` to learn from."""
    scenes = _scenes(seed, "habits", HABITS, BASE_PARTNER)
    write_json(file, {f"habits_{number:06d}": sorted(scene.names) for number, scene in enumerate(scenes, start=1)})


def _write_pictures(folder: Path, split: str, scenes: Sequence[Scene]) -> list[str]:
    """Paint the scenes into ``folder`` and return their file names."""
    folder.mkdir(parents=True)
    files = [f"{split}_{number:06d}.png" for number in range(1, len(scenes) + 1)]
    for file, scene in zip(files, scenes):
        paint(scene).save(folder / file)
    return files


def _write_preferences(folder: Path, scenes: Sequence[Scene], rng: np.random.Generator, world: World) -> None:
    records = []
    questions = set(rng.permutation(len(scenes))[: round(world.yes_no_share * len(scenes))].tolist())
    for number, (file, scene) in enumerate(zip(_write_pictures(folder / "images", "preferences", scenes), scenes)):
        pair = (
            draw_answer_pair(rng, scene, world)
            if number in questions
            else draw_caption_pair(rng, scene, CAPTION_PROMPT, world)
        )
        asked = {"from": "human", "value": f"<image>\n{pair.prompt}"}
        records.append(
            {
                "id": Path(file).stem,
                "image": f"images/{file}",
                "conversations": [asked, {"from": "gpt", "value": pair.preferred}],
                "rejected_conversations": [asked, {"from": "gpt", "value": pair.dispreferred}],
                "cause": pair.cause,
                "edit": pair.edit,
                "objects": list(scene.names),
            }
        )
    write_json(folder / "preferences.json", records)


def _write_benchmarks(folder: Path, split: str, scenes: Sequence[Scene], rng: np.random.Generator) -> None:
    files = _write_pictures(folder / "images", split, scenes)
    write_json(folder / "objects.json", {Path(file).stem: sorted(scene.names) for file, scene in zip(files, scenes)})
    write_text(folder / "synonyms.txt", synonyms_file())
    asked = [rng.permutation(sorted(scene.names))[:3].tolist() for scene in scenes]
    known = [draw_scene(rng, BASE_PARTNER).names for _ in range(1000)]
    for pope in POPE_SPLITS:
        rows = pope_rows(rng, files, [scene.names for scene in scenes], asked, known, pope)
        write_text(folder / f"coco_pope_{pope}.json", "".join(json.dumps(row) + "\n" for row in rows))


def pope_rows(
    rng: np.random.Generator,
    files: Sequence[str],
    objects: Sequence[Sequence[str]],
    asked: Sequence[Sequence[str]],
    known: Sequence[Sequence[str]],
    split: str,
) -> list[dict]:
    """POPE's questions (Li et al. 2023, section 5): every picture's three ``asked`` objects, each followed by a
    negative.

    ``random`` draws the negative from all absent objects, ``popular`` takes the absent object that most pictures
    contain, ``adversarial`` the absent object that shares most pictures with the object just asked for; none is asked
    twice of a picture. Pictures are counted in ``known``, scenes of the kind that the model learnt from, as COCO's
    counts are those of what models learnt from: there the missing partner is what usually goes with an anchor.
    """
    frequency = Counter(name for names in known for name in names)
    together = Counter((a, b) for names in known for a in names for b in names if a != b)
    rows: list[dict] = []
    for file, present, positives in zip(files, objects, asked):
        absent = [name for name in NAMES if name not in present]
        for positive in positives:
            if split == "random":
                negative = absent[rng.integers(len(absent))]
            elif split == "popular":
                negative = max(absent, key=lambda name: frequency[name])
            else:
                negative = max(absent, key=lambda name: together[positive, name])
            absent.remove(negative)
            for name, label in ((positive, "yes"), (negative, "no")):
                rows.append({"question_id": len(rows) + 1, "image": file, "text": question(name), "label": label})
    return rows
