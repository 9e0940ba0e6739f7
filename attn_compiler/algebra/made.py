"""Tables that an attention makes of the input of its block: what gates and deltas follow from, token by token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from attn_compiler.algebra.expr import Expr, Sort, symbol
from attn_compiler.algebra.feature import x

channel = symbol("channel", Sort.INDEX)  # one number of the block's input


@dataclass(frozen=True)
class Made:
    """The table `name`, [batch, heads, tokens] or [batch, heads, tokens, components].

    A token's numbers are multiplied with `weights` (read at `channel`, and perhaps at `component`) and added up; `each` is an
    expression over that, `x`. A `running` table is then summed up over the tokens.
    """

    name: str
    weights: Expr
    each: Expr = x
    running: bool = False

    def expressions(self) -> tuple[Expr, ...]:
        return self.weights, self.each

    def map(self, change: Callable[[Expr], Expr]) -> Made:
        return replace(self, weights=change(self.weights), each=change(self.each))


@dataclass(frozen=True)
class Taken:
    """The table `name`, [batch, tokens, channels]: the input of the block, `x`, or the `residual` that its norm was given."""

    name: str
    source: Literal["x", "residual"]

    def expressions(self) -> tuple[Expr, ...]:
        return ()

    def map(self, change: Callable[[Expr], Expr]) -> Taken:
        return self
