"""What becomes of keys and values before queries meet them."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar, Literal

from attn_compiler.algebra.expr import Expr, Sort, b, h, k, kv, layer, q, symbol, table
from attn_compiler.algebra.feature import component

added = symbol("added", Sort.INDEX)  # one of the keys that a variant brings along


@dataclass(frozen=True)
class Context:
    """`pool`: means of as many neighbors as `sizes` say; `agents`: so many pooled queries, which have gathered the values first.

    Tokens lie on a `grid` that has as many axes as `sizes`; an empty one is the axis of tokens, however long. The tables `name`
    and `second` are added to the scores of agents and tokens, and to those of queries and agents.
    `extra`: so many keys and values from the tables `name`_k and `name`_v, `by_row` those of a call.
    """

    how: Literal["pool", "agents", "extra"]
    sizes: tuple[int, ...]
    grid: tuple[int, ...] = ()
    name: str = ""
    by_row: bool = False
    second: str = ""

    def __str__(self) -> str:
        count = " by ".join(map(str, self.sizes))
        if self.how == "extra":
            return f"{count} of {self.name} in front, which every query sees"
        if self.how == "pool":
            return f"means of {count} tokens"
        biases = " and ".join(f"`{name}`" for name in (self.name, self.second) if name)
        return f"{count} agents, pooled queries that gather the values first" + (f", biased by {biases}" if biases else "")

    @property
    def count(self) -> int:
        """How many keys it brings along, or how many agents there are."""
        return prod(self.sizes)

    def expressions(self) -> tuple[Expr, ...]:
        """The keys and the values that it brings along, over kv, `added` and `component`; or both biases of `added` agents."""
        if self.how == "agents":
            places = ((self.name, (layer, h, added, k)), (self.second, (layer, h, q, added)))
            return tuple(table(name, *at, sort=Sort.REAL) for name, at in places if name)
        sides = ("k", "v") if self.how == "extra" else ()
        first = b if self.by_row else layer
        return tuple(table(f"{self.name}_{side}", first, kv, added, component, sort=Sort.REAL) for side in sides)

    def words(self) -> list[object]:
        """As text can hold it."""
        return [self.how, list(self.sizes), list(self.grid), self.name, self.by_row, self.second]

    @staticmethod
    def of(words: list[object]) -> Context:
        how, sizes, grid, *rest = words
        return Context(how, tuple(sizes), tuple(grid), *rest)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Merge:
    """Tokens of a `grid` that are much alike become one, in queries, keys and values; its result is that of all of them.

    One token of each `cell`, the first, waits for others; all others look for the likest of those that wait, and the likest
    `share` of all tokens are averaged with what they found. Alike is what the table `metric` says of tokens, [batch, tokens,
    numbers], or their keys, averaged over heads. With `agents`, queries of which that larger share is merged gather the
    values first, and queries attend to these, at the scale to the `power`; `shortcut` of each value is added to its result.
    """

    share: float
    cell: tuple[int, int]
    grid: tuple[int, ...] = ()
    metric: str = ""
    agents: float | None = None
    power: float = 1.0
    shortcut: float = 0.0
    how: ClassVar[Literal["merge"]] = "merge"

    def __str__(self) -> str:
        whose = f"`{self.metric}`" if self.metric else "keys"
        says = [f"{self.left(self.share)} of {prod(self.grid)} tokens, the likest by their {whose} averaged"]
        if self.agents is not None:
            says.append(f"{self.left(self.agents)} agents, merged likewise, gather the values first")
        if self.power != 1:
            says.append(f"queries meet these at the scale to the power {self.power:g}")
        if self.shortcut:
            says.append(f"{self.shortcut:g} of each value is added to its result")
        return "; ".join(says)

    @property
    def waiting(self) -> int:
        """How many tokens others are merged into: one of each whole cell."""
        return prod(size // own for size, own in zip(self.grid, self.cell, strict=True))

    def left(self, share: float) -> int:
        """How many tokens there are once so many of them are merged."""
        tokens = prod(self.grid)
        return tokens - min(int(tokens * share), tokens - self.waiting)

    def expressions(self) -> tuple[Expr, ...]:
        """What it reads of each token, over `component`."""
        return (table(self.metric, b, k, component, sort=Sort.REAL),) if self.metric else ()

    def words(self) -> list[object]:
        """As text can hold it."""
        return [self.how, self.share, list(self.cell), list(self.grid), self.metric, self.agents, self.power, self.shortcut]


def read_context(words: list[object]) -> Context | Merge:
    """What was written as `words`."""
    if words[0] != Merge.how:
        return Context.of(words)
    _, share, cell, grid, *rest = words
    return Merge(share, tuple(cell), tuple(grid), *rest)  # type: ignore[arg-type]
