"""How much of the past a cache holds, and what memory that takes."""

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


@dataclass(frozen=True)
class Holding:
    """What a cache holds of the past of one row: all tokens, some, or states of so many bytes, perhaps beside some."""

    token: int  # bytes of a token's keys and values
    kept: Kept | None = None
    state: int = 0

    @property
    def most(self) -> int | None:
        """How many bytes that is at most; None if it grows with the text."""
        near = self.token * self.kept.most if self.kept else 0
        return self.state + near if self.state or self.kept else None

    def __str__(self) -> str:
        held = [*(["a state"] if self.state else []), *([str(self.kept)] if self.kept else [])]
        return " and ".join(held) or "every token"


@dataclass(frozen=True)
class Caches:
    """What an attention needs of its past: as the model computes it, which transformers' own caches hold, and as decided."""

    own: Holding
    decided: Holding


def together(needs: Iterable[Kept | None]) -> Kept | None:
    """What serves all of them; None for everything."""
    found = list(needs)
    if not found or None in found:
        return None
    return Kept(max(x.first for x in found if x), max(x.latest for x in found if x))
