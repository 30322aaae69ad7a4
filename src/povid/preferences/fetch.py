"""Download a preference data set: its files from the hub, its pictures from where they are, as its YAML says.

Where the records name pictures of a large archive, the pictures that they name can be downloaded alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field

from povid.fault import Fault
from povid.fetching import download, hub
from povid.fetching.many import Outcome, fetch_many
from povid.fetching.source import Source
from povid.preferences.pictures import damage
from povid.preferences.records import Skipped

Choice = Literal["named", "all", "none"]
NAME = re.compile(r"[\w-][\w.-]*\.\w+")
Commit = Annotated[str, Field(pattern="^[0-9a-f]{40}$")]


class Album(BaseModel):
    """Pictures that do not come with the records.

    Args:
        archive: address of the zip archive with all of them. each: that of a single one, with ``{name}`` for its name.
        size, sha256: of the archive.
        folder: where they belong, below the data set's ``images``.
        license: in words, and where to read it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    archive: str
    each: str = Field(pattern=r"\{name\}")
    size: int | None = Field(None, gt=0)
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")
    folder: str = "."
    license: str = Field(min_length=1)


class DataSource(BaseModel):
    """Where a data set can be had.

    Args:
        hub: its repository among the hub's data sets.
        revision: the commit whose files were looked at; None for the newest, which is recorded when it is downloaded.
        files: names or patterns of its files; unpack: archive among them → folder that it is unpacked into.
        license: in words.
        pictures: what the records name and the repository does not hold; None if there is nothing of that kind.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    hub: str = Field(min_length=1)
    revision: Commit | None = None
    files: list[str] = Field(min_length=1)
    unpack: dict[str, str] = {}
    license: str = Field(min_length=1)
    pictures: Album | None = None


def fetch(
    name: str,
    source: DataSource,
    root: Path,
    images: Path,
    read: Callable[[list[str]], Any],
    *,
    pictures: Choice = "named",
    revision: str | None = None,
    files: list[str] | None = None,
    say: Callable[[str], None] = print,
) -> bool:
    """Download a data set's files into ``root`` and its pictures below ``images``; what is there stays.

    Args:
        name: of the data set. source: where it can be had.
        read: reads the records; its argument takes a sentence for each that cannot be used.
        pictures: those that the records name, the whole archive, or none.
        revision: a commit, branch or tag in place of the recorded one and of ``source.revision``.
        files: patterns in place of ``source.files``.
        say: takes the lines of the report.

    Returns whether nothing is missing.

    Raises:
        Fault: see :mod:`povid.fetching`; or ``root`` holds another revision than ``source.revision``.
    """
    patterns = files or source.files
    wanted = _revision(name, source, root, revision)
    say(f"{name}: {hub.page(source.hub)}, license: {source.license}")
    found = _recorded(source, root, wanted, patterns)
    if found is None:
        asked = hub.revision_of(source.hub, wanted, patterns, source.unpack)
        size = sum(each.size or 0 for each in asked.sources)
        say(f"revision {asked.commit}: {len(asked.sources)} file(s), {size / 1e6:,.1f} MB")
        if asked.license:
            say(f"the hub's card states the license {asked.license}")
        found = hub.download(asked, root)
    for file in found:
        say(f"{file} is complete")
    if source.pictures is None:
        return True
    say(f"pictures: license: {source.pictures.license}")
    if pictures == "none":
        say(f"pictures are left out; they belong into {images / source.pictures.folder}")
        return True
    if pictures == "all":
        return _whole_archive(source.pictures, images, say)
    return _named(name, source.pictures, images, read, say)


def _revision(name: str, source: DataSource, root: Path, asked: str | None) -> str | None:
    """The revision to download: what was asked for, else what ``root`` holds, else what the source names."""
    there = {
        str(entry["revision"])
        for entry in download.recorded(root).values()
        if entry.get("repository") == source.hub and "revision" in entry
    }
    if asked is not None or not there:
        return asked or source.revision
    held = ", ".join(sorted(there))
    if len(there) > 1 or (source.revision and there != {source.revision}):
        named = f", and conf/data names {source.revision}" if source.revision else ""
        raise Fault(
            f"{name}: {root} holds revision {held} of {source.hub} ({download.RECORD}){named}; add --revision COMMIT "
            "to say which one you want, or choose another --data folder"
        )
    return held


def _recorded(source: DataSource, root: Path, revision: str | None, patterns: list[str]) -> list[Path] | None:
    """The files, if ``root`` holds all of them at that revision, so that the hub need not be asked; else None."""
    known = download.recorded(root)
    if revision is None or any(set(pattern) & set("*?[") for pattern in patterns):
        return None
    found = []
    for file in patterns:
        entry = known.get(file, {})
        there = Source(str(entry.get("url")), file, unpack=source.unpack.get(file))
        if (entry.get("repository"), entry.get("revision")) != (source.hub, revision):
            return None
        if not download.is_complete(there, root):
            return None
        found.append(root / (there.unpack or file))
    return found


def _archive(album: Album) -> Source:
    return Source(
        album.archive,
        PurePosixPath(album.archive).name,
        size=album.size,
        sha256=album.sha256,
        unpack=album.folder,
        flat=True,
        each=album.each,
    )


def _whole_archive(album: Album, images: Path, say: Callable[[str], None]) -> bool:
    archive = _archive(album)
    if album.size and not download.is_complete(archive, images):
        say(f"{archive.file}: {album.size / 1e9:,.1f} GB, and as much again while it is unpacked")
    for folder in download.fetch([archive], images):
        say(f"the pictures in {folder} are complete")
    return True


def _named(
    name: str,
    album: Album,
    images: Path,
    read: Callable[[list[str]], Any],
    say: Callable[[str], None],
) -> bool:
    images.mkdir(parents=True, exist_ok=True)
    skipped = Skipped()
    shown = (picture for triple in read(skipped) for picture in triple.pictures)
    there = {picture for picture in shown if isinstance(picture, Path)}
    if others := len(skipped) - len(skipped.pictures):
        say(f"{others} record(s) cannot be used; python -m povid.preferences check lists them")
    wanted = {file: file.name for file in there}
    wanted |= {images / album.folder / file: file for file in (PurePosixPath(name).name for name in skipped.pictures)}
    return report(named_pictures(album.each, wanted, title=name), say)


def named_pictures(each: str, wanted: Mapping[Path, str], *, title: str) -> Outcome:
    """Download single pictures: file → name; those that are there and whole are left alone.

    ``each`` is the address of one, with ``{name}``.

    Raises:
        Fault: see :func:`povid.fetching.many.fetch_many`.
    """
    odd = {file: "it is no name of a picture" for file, name in wanted.items() if not NAME.fullmatch(name)}
    addresses = {each.format(name=quote(name)): file for file, name in wanted.items() if file not in odd}
    outcome = fetch_many(addresses, damage, title=title)
    outcome.missing |= odd
    return outcome


def report(outcome: Outcome, say: Callable[[str], None]) -> bool:
    """Say what is there, what came, and what is missing, reason by reason. Returns whether nothing is missing."""
    missing = len(outcome.missing)
    say(f"pictures: {outcome.there:,} were there, {outcome.came:,} were downloaded, {missing:,} are missing")
    reasons: dict[str, list[Path]] = {}
    for file, reason in outcome.missing.items():
        reasons.setdefault(reason, []).append(file)
    for reason, files in reasons.items():
        first = ", ".join(str(file) for file in files[:3])
        say(f"  {reason}: {len(files):,} (first: {first})")
    if missing:
        say("  the same command tries them again; data.skip_bad=true trains without their records")
    return not missing
