"""What becomes of keys and values before queries meet them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Context:
    """`pool`: means of as many neighbors as `sizes` say; `agents`: so many pooled queries, which have gathered the values first.

    Tokens lie on a `grid` that has as many axes as `sizes`; an empty one is the axis of tokens, however long.
    """

    how: Literal["pool", "agents"]
    sizes: tuple[int, ...]
    grid: tuple[int, ...] = ()

    def __str__(self) -> str:
        count = " by ".join(map(str, self.sizes))
        return (
            f"means of {count} tokens" if self.how == "pool" else f"{count} agents, pooled queries that gather the values first"
        )

    def words(self) -> list[object]:
        """As text can hold it."""
        return [self.how, list(self.sizes), list(self.grid)]

    @staticmethod
    def of(words: list[object]) -> Context:
        how, sizes, grid = words
        return Context(how, tuple(sizes), tuple(grid))  # type: ignore[arg-type]
