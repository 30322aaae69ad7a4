"""What can be downloaded: one file, and what becomes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Source:
    """One official file: its address, its name in the data folder, its size (bytes) and sha256 where they are known.

    ``unpack`` is the folder (relative to the data folder, "." for itself) into which an archive is unpacked, or None;
    with ``only``, just the members whose names end so; with ``flat``, without the folders inside the archive.

    ``each`` is the address of a single picture of the archive, with ``{name}`` for its name, so that the pictures that
    are needed can be downloaded without the others. ``origin`` is recorded beside the file, such as the revision that
    it belongs to.
    """

    url: str
    file: str
    size: int | None = None
    sha256: str | None = None
    unpack: str | None = None
    only: tuple[str, ...] = ()
    flat: bool = False
    each: str | None = None
    origin: Mapping[str, str] = field(default_factory=dict)
    mirror: str | None = None

    @property
    def address(self) -> str:
        """Where it is asked for."""
        return self.mirror or self.url
