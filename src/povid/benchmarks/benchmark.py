"""What a benchmark tells others about itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Column:
    """``key`` is ``benchmark.score`` in results.json; ``better`` the direction, None for what is not a contest."""

    key: str
    title: str
    better: Literal["low", "high"] | None
    decimals: int
    subscript: str = ""

    @property
    def heading(self) -> str:
        return self.title + (f"_{self.subscript}" if self.subscript else "") + self.arrow

    @property
    def arrow(self) -> str:
        return {"low": " ↓", "high": " ↑", None: ""}[self.better]
