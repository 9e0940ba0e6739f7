"""How much of the past a cache holds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

FAR = 1 << 28  # a token that no text reaches


@dataclass(frozen=True)
class Kept:
    """The first tokens of each row, and the latest ones before a query."""

    first: int
    latest: int

    @property
    def most(self) -> int:
        """How many there are at most."""
        return self.first + self.latest

    def covers(self, other: Kept | None) -> bool:
        """Whether whoever needs `other`, None for everything, misses nothing."""
        return other is not None and other.first <= self.first and other.latest <= self.latest

    def __str__(self) -> str:
        return f"the latest {self.latest} tokens" + (f" and the first {self.first}" if self.first else "")


def together(needs: Iterable[Kept | None]) -> Kept | None:
    """What serves all of them; None for everything."""
    found = list(needs)
    if not found or None in found:
        return None
    return Kept(max(x.first for x in found if x), max(x.latest for x in found if x))
