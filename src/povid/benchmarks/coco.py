"""COCO 2014: where its files come from, its annotations read as a stream, and the file of one of its images."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from povid.benchmarks import llava_format
from povid.fault import Fault
from povid.fetching.source import Source

_SPACE = re.compile(r"\s*")
_NUMBERED = re.compile(r"(?:COCO_(?:train|val|test)20\d\d_)?0*(\d+)")
_SUFFIXES = (".jpg", ".jpeg", ".png")

HOST = "https://s3.amazonaws.com/images.cocodataset.org"  # which images.cocodataset.org is, without a certificate
# Sizes and hashes as TensorFlow Datasets records them (url_checksums/coco.txt).
VAL2014 = Source(
    f"{HOST}/zips/val2014.zip",
    "val2014.zip",
    size=6645013297,
    sha256="fe9be816052049c34717e077d9e34aa60814a55679f804cd043e3cbee3b9fde0",
    unpack="images",
    each=f"{HOST}/val2014/{{name}}",
)
ANNOTATIONS = Source(
    f"{HOST}/annotations/annotations_trainval2014.zip",
    "annotations_trainval2014.zip",
    size=252872794,
    sha256="031296bbc80c45a1d1f76bf9a90ead27e94e99ec629208449507a4917a3bf009",
    unpack=".",
    only=("instances_train2014.json", "instances_val2014.json", "captions_train2014.json", "captions_val2014.json"),
)


@dataclass
class Annotation:
    """What people marked in one image: ``names`` of instance categories, and their ``captions``."""

    names: set[str] = field(default_factory=set)
    captions: list[str] = field(default_factory=list)


def image_key(name: int | str) -> int | str:
    """One key for the many ways to name an image: 42, "000000000042", "COCO_val2014_000000000042.jpg" are all 42.

    Another name ("kitchen_3.png") is its own key, without folder and suffix.
    """
    stem = str(name).rsplit("/", 1)[-1]
    for suffix in _SUFFIXES:
        stem = stem.removesuffix(suffix)
    numbered = _NUMBERED.fullmatch(stem)
    return int(numbered[1]) if numbered else stem


def picture(folder: Path, name: int | str) -> Path:
    """The file of an image, by its number or name: the first that exists, or the name it should have.

    Tried in ``folder`` and in its ``val2014``: the name itself, with .jpg, .jpeg and .png, and COCO's own form.
    """
    key, stem = image_key(name), str(name)
    names = [stem] if Path(stem).suffix.lower() in _SUFFIXES else []
    if isinstance(key, int):
        names += [f"COCO_val2014_{key:012d}.jpg", f"{key:012d}.jpg"]
    names += [stem + suffix for suffix in _SUFFIXES]
    return llava_format.picture([folder, folder / "val2014"], names)


def annotation_file(data: Path, name: str) -> Path:
    """``data/name``, or ``data/annotations/name`` as the official archive unpacks; the former where neither exists."""
    inner = data / "annotations" / name
    return inner if inner.is_file() else data / name


def image_ids(data: Path, split: str = "val") -> list[int]:
    """Ids of all images of a 2014 split, ascending."""
    file = annotation_file(data, f"captions_{split}2014.json")
    return sorted(item["id"] for key, item in entries(file) if key == "images")


def read_annotations(data: Path, wanted: Collection[int]) -> dict[int | str, Annotation]:
    """Instance categories and human captions of the wanted images, val and train together as CHAIR merges them.

    The train files (half a gigabyte) are opened only if some wanted image is not in val. Images in neither split
    are left out of the result. Raises Fault for a missing or broken file.
    """
    found: dict[int | str, Annotation] = {}
    for split in ("val", "train"):
        if missing := set(wanted) - set(found):
            found.update(_split_annotations(data, split, missing))
    return found


def _split_annotations(data: Path, split: str, wanted: Collection[int]) -> dict[int | str, Annotation]:
    found: dict[int | str, Annotation] = {}
    numbers: dict[int, set[int]] = {}
    category: dict[int, str] = {}
    file = annotation_file(data, f"instances_{split}2014.json")
    try:
        for key, item in entries(file):
            if key == "images" and item["id"] in wanted:
                found.setdefault(item["id"], Annotation())
            elif key == "annotations" and item["image_id"] in wanted:
                numbers.setdefault(item["image_id"], set()).add(item["category_id"])
            elif key == "categories":
                category[item["id"]] = item["name"]
        for image, ids in numbers.items():
            found.setdefault(image, Annotation()).names.update(category[number] for number in ids)
        file = annotation_file(data, f"captions_{split}2014.json")
        for key, item in entries(file):
            if key == "annotations" and item["image_id"] in wanted:
                found.setdefault(item["image_id"], Annotation()).captions.append(item["caption"])
    except (KeyError, TypeError) as error:
        raise Fault(f"{file} has an entry without {error}, which COCO's files have; download the file again") from None
    return found


def entries(file: Path, block: int = 1 << 24) -> Iterator[tuple[str, Any]]:
    """Yield (key, item) for every item of the lists in a file's top-level object, and (key, value) for other values.

    Holds ``block`` characters at a time, because instances_train2014.json as Python objects takes gigabytes.
    """
    try:
        source = file.open(encoding="utf-8")
    except OSError as error:
        raise Fault(
            f"{file} cannot be read ({error.strerror}); put COCO's 2014 annotation files there "
            f"(`python -m povid.benchmarks fetch chair --data {file.parent}`), or an objects.json for other images"
        ) from None
    decode = json.JSONDecoder().raw_decode
    text, at = "", 0

    def more() -> None:
        nonlocal text, at
        added = source.read(block)
        if not added:
            raise Fault(f"{file} is truncated or not JSON near {text[at : at + 40]!r}; download the file again")
        text, at = text[at:] + added, 0

    def peek() -> str:
        nonlocal at
        while (at := _SPACE.match(text, at).end()) == len(text):
            more()
        return text[at]

    def value() -> Any:
        nonlocal at
        peek()
        while True:
            try:
                found, end = decode(text, at)
                if end < len(text):  # a number at the end of the block may continue in the next
                    at = end
                    return found
            except json.JSONDecodeError:
                pass
            more()

    with source:
        opened = peek()
        if opened != "{":
            raise Fault(f"{file} begins with {opened!r} where a JSON object was expected; download the file again")
        at += 1
        while peek() != "}":
            if text[at] == ",":
                at += 1
                continue
            key = value()
            if peek() != ":":
                raise Fault(f"{file} is not JSON near {text[at : at + 40]!r}; download the file again")
            at += 1
            if peek() != "[":
                yield key, value()
                continue
            at += 1
            while peek() != "]":
                if text[at] == ",":
                    at += 1
                else:
                    yield key, value()
            at += 1
