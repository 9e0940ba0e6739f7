"""What becomes of keys and values before queries meet them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from attn_compiler.algebra.expr import Expr, Sort, b, kv, layer, symbol, table
from attn_compiler.algebra.feature import component

added = symbol("added", Sort.INDEX)  # one of the keys that a variant brings along


@dataclass(frozen=True)
class Context:
    """`pool`: means of as many neighbors as `sizes` say; `agents`: so many pooled queries, which have gathered the values first.

    Tokens lie on a `grid` that has as many axes as `sizes`; an empty one is the axis of tokens, however long.
    `extra`: so many keys and values from the tables `name`_k and `name`_v, `by_row` those of a call.
    """

    how: Literal["pool", "agents", "extra"]
    sizes: tuple[int, ...]
    grid: tuple[int, ...] = ()
    name: str = ""
    by_row: bool = False

    def __str__(self) -> str:
        count = " by ".join(map(str, self.sizes))
        if self.how == "extra":
            return f"{count} of {self.name} in front, which every query sees"
        return (
            f"means of {count} tokens" if self.how == "pool" else f"{count} agents, pooled queries that gather the values first"
        )

    def expressions(self) -> tuple[Expr, ...]:
        """The keys and the values that it brings along, over kv, `added` and `component`."""
        sides = ("k", "v") if self.how == "extra" else ()
        first = b if self.by_row else layer
        return tuple(table(f"{self.name}_{side}", first, kv, added, component, sort=Sort.REAL) for side in sides)

    def words(self) -> list[object]:
        """As text can hold it."""
        return [self.how, list(self.sizes), list(self.grid), self.name, self.by_row]

    @staticmethod
    def of(words: list[object]) -> Context:
        how, sizes, grid, *rest = words
        return Context(how, tuple(sizes), tuple(grid), *rest)  # type: ignore[arg-type]
