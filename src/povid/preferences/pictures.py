"""Pictures of records: finding, opening and checking them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
from PIL import Image

from povid import files
from povid.fault import Fault
from povid.preferences.records import IMAGE_MARKER, MissingPicture, one_line, show, text
from povid.preferences.stored import Base64, Picture, Stored, decoded, digests, picture_bytes
from povid.preferences.triple import Image as Shown
from povid.preferences.triple import pictures_of

PICTURE_BYTES = 2**19  # of a larger file only the size and this many bytes count: a second for a thousand pictures


def rgb(picture: Image.Image) -> Image.Image:
    """The picture in RGB, eight bits a channel; its transparency is dropped.

    Of sixteen bits the upper eight are kept. Pillow does so for colour, but cuts shades of grey off at 255, which makes
    nearly all of them white.
    """
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PNG"):
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    return picture.convert("RGB")


def open_picture(image: Picture | Image.Image) -> Image.Image:
    """An RGB picture, as :func:`rgb` makes it: not rotated by its EXIF. One that is open already is returned as it is.

    Raises:
        Fault: names the file when it is missing or cannot be decoded.
    """
    if isinstance(image, Image.Image):
        return image
    found = image if isinstance(image, Path) else picture_bytes(image)
    name = f"image {found}" if isinstance(found, Path) else f"an image of {len(found)} bytes"
    try:
        return rgb(Image.open(found if isinstance(found, Path) else BytesIO(found)))
    except FileNotFoundError:
        raise Fault(f"{name} does not exist; correct the path or data.images") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise Fault(
            f"{name} cannot be decoded ({error}); replace the file, remove its record, or skip it with "
            "data.skip_bad=true"
        ) from None


class Pictures(Sequence[Image.Image]):
    """The pictures of records, opened one at a time when they are indexed, by :func:`open_picture`."""

    def __init__(self, images: Sequence[Picture]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, record: Any) -> Any:
        if isinstance(record, slice):
            return Pictures(self.images[record])
        return open_picture(self.images[record])


def digest_of(image: Shown, whole: int | None = None) -> str:
    """What names the content of a question's picture or pictures (``files.digest``); "none" for none."""
    found = (picture.read() if isinstance(picture, Stored) else picture for picture in pictures_of(image))
    return "+".join(files.digest(picture, whole) for picture in found) or "none"


def picture_fault(image: Picture) -> str | None:
    """Why a picture cannot be used and what to do, as part of a sentence; None if it decodes completely."""
    found = examine(image)
    return found if isinstance(found, str) else None


def examine(image: Picture) -> Image.Image | str:
    """The picture in RGB or, if it cannot be used, why and what to do, as part of a sentence.

    A picture with more pixels than Pillow's limit against decompression bombs is refused without decoding it.
    """
    try:
        found = image if isinstance(image, Path) else picture_bytes(image)
    except Fault as fault:
        return str(fault)
    name = f"picture {found}" if isinstance(found, Path) else f"the picture of {len(found)} bytes"
    try:
        if isinstance(found, Path) and not found.is_file():
            return f"{name} does not exist; add the file or remove the record"
        source = found if isinstance(found, Path) else BytesIO(found)
        with Image.open(source) as picture:
            width, height = picture.size
            if width * height > (Image.MAX_IMAGE_PIXELS or 2**62):
                return f"{name} has {width} x {height} pixels, too many to decode safely; scale it down"
            picture.verify()
        if isinstance(source, BytesIO):
            source.seek(0)
        with Image.open(source) as picture:
            picture.load()
            return rgb(picture)
    except Image.DecompressionBombError:
        return f"{name} has far too many pixels to decode safely; scale it down"
    except MemoryError:
        return f"{name} needs more memory than there is; scale it down"
    except Exception as error:  # a damaged file can make Pillow's decoders raise anything
        return f"{name} cannot be decoded ({one_line(error)}); replace it or remove the record"


def damage(file: Path) -> str | None:
    """Why a picture file is not whole; None if it is.

    A JPEG that has its first and its last mark is taken as whole without decoding it, which for thousands takes a
    second; everything else is decoded.
    """
    with file.open("rb") as source:
        start = source.read(3)
        source.seek(max(os.fstat(source.fileno()).st_size - 2, 0))
        end = source.read()
    return None if (start, end) == (b"\xff\xd8\xff", b"\xff\xd9") else picture_fault(file)


def side_by_side(pictures: Sequence[Image.Image]) -> Image.Image | None:
    """Pictures in a row, to be looked at: each as high as the lowest of them. One stays as it is; None for none."""
    if len(pictures) < 2:
        return pictures[0] if pictures else None
    height = min(picture.height for picture in pictures)
    scaled = [p.resize((max(1, round(p.width * height / p.height)), height)) for p in pictures]
    row = Image.new("RGB", (sum(picture.width for picture in scaled), height))
    at = 0
    for picture in scaled:
        row.paste(picture, (at, 0))
        at += picture.width
    return row


def find_pictures(value: Any, images: Path | None, record: str, key: str, marks: int) -> Shown:
    """The pictures that a record names, each found by :func:`find_picture`: one, several, or None for an empty list.

    ``marks``: how many image markers the record's questions hold. Unless it has one picture, these must be as many as
    its pictures, or none.

    Raises:
        MissingPicture: there is no such file.
        Fault: as :func:`find_picture`; the number of markers is not that of the pictures.
    """
    if not isinstance(value, list) or len(value) == 1:
        return find_picture(value, images, record, key)
    if marks not in (0, len(value)):
        raise Fault(
            f"{record}: pictures in {key}: {len(value)}, markers {IMAGE_MARKER} in its questions: {marks}; list every "
            "picture, in the order of the markers"
        )
    return tuple(find_picture(one, images, record, key) for one in value) or None


def picture_digests(images: Sequence[Picture], of_file: Callable[[Path], str]) -> list[str]:
    """What names the content of each picture: ``of_file`` for a file, else a digest of all its bytes."""
    different = list(dict.fromkeys(images))
    stored = [image for image in different if isinstance(image, Stored)]
    with ThreadPoolExecutor(8) as threads:
        others = [image for image in different if not isinstance(image, Stored)]
        each = threads.map(lambda image: of_file(image) if isinstance(image, Path) else files.digest(image), others)
        known: dict[Picture, str] = dict(zip(others, each))
    known.update(zip(stored, digests(stored)))
    return [known[image] for image in images]


def find_picture(value: Any, images: Path | None, record: str, key: str = "image") -> Picture:
    """The picture that a record names: a file inside ``images``, or encoded bytes, which stay in the records' file.

    ``value`` is a path, bytes, base64 (with or without a ``data:`` prefix), a ``{"bytes", "path"}`` object, or a list
    with one of these. A path is looked up in ``images`` as it is, then without its first folder, its first two and so
    on down to its basename, because released files carry the folders of the machine that wrote them. COCO's pictures
    are also found under the names of its other years.

    Raises:
        MissingPicture: there is no such file.
        Fault: the path leads out of ``images`` (by ``..``, absolute, through a link) or is not a path.
    """
    if isinstance(value, list):
        if len(value) != 1:
            raise Fault(
                f"{record}: {key} must hold one picture in this format, found {len(value)}; use the format povid or "
                "trl, or remove the record"
            )
        value = value[0]
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, Stored):
        return value
    if isinstance(value, bytes | bytearray):
        if not value:
            raise Fault(f"{record}: {key} is an empty picture; remove the record")
        return bytes(value)
    if isinstance(value, str):
        found = decoded(value)
        if found is not None:
            return value.stored(found) if isinstance(value, Base64) else found
    return _file(text(value, record, key), images, record, key)


def _file(name: str, images: Path | None, record: str, key: str = "image") -> Path:
    """The file inside the folder ``images`` that ``name`` means (see :func:`find_picture`)."""
    if images is None:
        raise Fault(f"{record}: {key} is the path {show(name)} but no image folder was given; give the folder")
    if "\0" in name or len(name) > 1024 or name.count("/") > 32:
        what = "a NUL character" if "\0" in name else f"{len(name):,} characters and {name.count('/')} folders"
        raise Fault(f"{record}: {key} is a path with {what} ({show(name)}); fix it or remove the record")
    root = os.path.realpath(images)
    posix = PurePosixPath(name)
    outside = ".." in posix.parts or ".." in PureWindowsPath(name).parts or bool(PureWindowsPath(name).drive)
    if posix.is_absolute():
        outside = outside or not _within(os.path.realpath(name), root)
    if outside:
        raise Fault(f"{record}: {key} {show(name)} leads out of the image folder {images}; give a path inside it")
    names = [Path(*posix.parts[start:]) for start in range(len(posix.parts))]
    for candidate in (Path(images) / name for name in names + _other_coco_names(posix.name)):
        try:
            there = candidate.is_file()
        except OSError:  # a part of the name is longer than the file system allows
            there = False
        if there:
            if not _within(os.path.realpath(candidate), root):
                raise Fault(
                    f"{record}: {key} {show(name)} is a link that leads out of the image folder {images}; "
                    "copy the picture into the folder"
                )
            return candidate
    raise MissingPicture(record, name)


def _other_coco_names(name: str) -> list[str]:
    """The same picture of COCO in other years' naming: 2014's names carry the split, 2017's only the number."""
    match = re.fullmatch(r"(?:COCO_(?:train|val)2014_)?(\d{12}\.jpg)", name)
    if not match:
        return []
    return [other + match.group(1) for other in ("COCO_train2014_", "COCO_val2014_", "")]


def _within(real: str, root: str) -> bool:
    return os.path.commonpath([real, root]) == root
