"""The record that everything is trained on: <image, preferred, dispreferred> (paper, section 3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from povid.fault import Fault
from povid.preferences.stored import Picture

Role = Literal["user", "assistant"]
Image = Picture | tuple[Picture, ...] | None  # what a record or a question shows: one picture, several or none


def pictures_of(image: Image) -> tuple[Picture, ...]:
    """The pictures one by one, in their order."""
    if image is None:
        return ()
    return image if isinstance(image, tuple) else (image,)


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a conversation; ``text`` carries no image marker."""

    role: Role
    text: str


@dataclass(frozen=True, slots=True)
class Triple:
    """One preference record.

    ``preferred`` (y_w) and ``dispreferred`` (y_l^t) are whole conversations: user and assistant alternate, the user
    speaks first, an assistant turn ends them, their user turns are the same and at least one assistant turn differs.
    ``image`` is a picture, a tuple of several, or None; a tuple of one becomes that one, an empty one None. Pictures
    stand in front of the first user turn, in their order. A picture is a file, an encoded picture (JPEG, PNG ...), or
    the place of one inside the file of the records.

    Raises:
        Fault: names the record and the key that breaks one of these rules.
    """

    id: str
    image: Image
    preferred: tuple[Turn, ...]
    dispreferred: tuple[Turn, ...]
    source: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.image, tuple) and len(self.image) < 2:
            object.__setattr__(self, "image", self.image[0] if self.image else None)
        for key in ("preferred", "dispreferred"):
            turns = getattr(self, key)
            roles = [turn.role for turn in turns]
            if not turns or len(turns) % 2 or roles != ["user", "assistant"] * (len(turns) // 2):
                raise Fault(
                    f"record {self.id!r}: {key} must alternate user and assistant and end with the assistant, "
                    f"found {roles or 'no turn'}; fix the record or remove it"
                )
            for number, turn in enumerate(turns):
                if turn.role == "assistant" and not turn.text.strip():
                    raise Fault(
                        f"record {self.id!r}: {key} has an empty response in turn {number}; "
                        "write one or remove the record"
                    )
        if len(self.preferred) != len(self.dispreferred):
            raise Fault(
                f"record {self.id!r}: preferred has {len(self.preferred)} turns and dispreferred "
                f"{len(self.dispreferred)}; both must answer the same user turns"
            )
        for number, (good, bad) in enumerate(zip(self.preferred, self.dispreferred)):
            if good.role == "user" and good.text != bad.text:
                raise Fault(
                    f"record {self.id!r}: user turn {number} differs between preferred and dispreferred; "
                    "both must answer the same question"
                )
        if self.preferred == self.dispreferred:
            raise Fault(f"record {self.id!r}: preferred and dispreferred are equal; remove the record")

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """The record's pictures, in their order; empty for a record without one."""
        return pictures_of(self.image)

    @property
    def question(self) -> str:
        """Text of the first user turn."""
        return self.preferred[0].text


@dataclass(frozen=True, slots=True)
class Given:
    """Keeps the data's own text dispreferences (``dispreference=given``).

    What makes others instead is called in the same way: with all triples that were read, the run's seed, the number of
    triples wanted (None: all) and the list that takes a sentence for each skipped record (None: raise a Fault).
    """

    name: str = "given"

    def __call__(
        self, triples: list[Triple], seed: int = 0, limit: int | None = None, skipped: list[str] | None = None
    ) -> list[Triple]:
        """The first ``limit`` triples as they are."""
        return triples[:limit]
