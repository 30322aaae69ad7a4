"""Which objects are in a picture, as COCO's annotations or a plain list say."""

from __future__ import annotations

import re
from pathlib import Path

from povid.fault import Fault
from povid.preferences.records import mapping, parse_json, show
from povid.preferences.stored import Picture


def key_of(name: str) -> str:
    """A picture's key: COCO's number where the name ends in twelve digits, else the file's stem."""
    stem = Path(name).stem
    digits = re.search(r"(\d{12})$", stem)
    return str(int(digits.group(1))) if digits else stem


def read_objects(path: Path) -> dict[str, list[str]]:
    """Objects per picture (see :func:`key_of`) from COCO's instances JSON, or from ``{picture: [objects]}``.

    Raises:
        Fault: names the file and the invalid entry.
    """
    whole = mapping(parse_json(Path(path)), str(path), "the file")
    if "annotations" in whole and "categories" in whole:
        try:
            names = {entry["id"]: str(entry["name"]) for entry in whole["categories"]}
            files = {entry["id"]: key_of(str(entry["file_name"])) for entry in whole["images"]}
            found: dict[str, list[str]] = {key: [] for key in files.values()}
            for entry in whole["annotations"]:
                found[files[entry["image_id"]]].append(names[entry["category_id"]])
        except (KeyError, TypeError) as error:
            raise Fault(
                f"{path} is not a COCO instances file ({type(error).__name__}: {show(error.args[:1])}); give "
                "instances_*.json or an objects.json"
            ) from None
        return found
    for name, listed in whole.items():
        if not isinstance(listed, list) or not all(isinstance(one, str) for one in listed):
            raise Fault(f"{path}: {show(name)} must be a list of object names, found {show(listed)}; correct it")
    return {key_of(name): listed for name, listed in whole.items()}


def picture_of(image: Picture, id: str) -> str:
    """The key of a record's picture: its file's (:func:`key_of`), or the record's ``id`` if it has none of its own."""
    return key_of(image.name) if isinstance(image, Path) else id
