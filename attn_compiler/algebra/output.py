"""What becomes of the result of an attention, step after step.

Most steps are an expression over `x`, one number of the result; `Local` adds what stands beside a query.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from math import prod

from attn_compiler.algebra.expr import Expr, Sort, symbol
from attn_compiler.algebra.feature import component, x

# The mean of the squares of a result's components. Steps may also speak of b, h, i, layer and `component`.
mean_square = symbol("mean_square", Sort.REAL)
tap = symbol("tap", Sort.INDEX)  # one of the tokens that a convolution adds up, from the first one on

__all__ = ["Local", "Step", "component", "mean_square", "tap", "x"]


@dataclass(frozen=True)
class Local:
    """A convolution of v, each channel by itself, that is added: of tokens near a query, those that there are and that it sees.

    On a line they are the last ones up to the query, or lie on both sides of it where `centered`; on a `grid`, which begins
    `before` so many tokens, on all sides. Of an even size there is one more behind. `weights` and `bias` are over b, layer, h
    and `component`, weights over `tap` besides.
    """

    sizes: tuple[int, ...]
    weights: Expr
    bias: Expr | None = None
    grid: tuple[int, ...] = ()
    before: int = 0
    centered: bool = False

    @property
    def taps(self) -> int:
        """How many tokens are added up."""
        return prod(self.sizes)

    @property
    def near(self) -> tuple[tuple[int, ...], ...]:
        """Where the tokens stand that are added up, seen from the query, on each axis."""
        first = [-(size // 2) if self.grid or self.centered else 1 - size for size in self.sizes]
        return tuple(product(*(range(at, at + size) for at, size in zip(first, self.sizes, strict=True))))

    def offset(self, near: tuple[int, ...]) -> int:
        """The same as a number of tokens in the order in which these stand."""
        count = 0
        for size, away in zip(self.grid or (1,), near, strict=True):
            count = count * size + away
        return count

    @property
    def behind(self) -> int:
        """How many tokens before a query it reads at most."""
        return max(0, *(-self.offset(near) for near in self.near))

    def expressions(self) -> tuple[Expr, ...]:
        return (self.weights,) if self.bias is None else (self.weights, self.bias)

    def map(self, change: Callable[[Expr], Expr]) -> Local:
        return replace(self, weights=change(self.weights), bias=None if self.bias is None else change(self.bias))

    def __str__(self) -> str:
        where = f"on a grid of {' by '.join(map(str, self.grid))}" if self.grid else "around" if self.centered else "up to each"
        return f"a convolution of v over {' by '.join(map(str, self.sizes))} tokens {where}"


Step = Expr | Local


def expressions_of(step: Step) -> tuple[Expr, ...]:
    """The expressions of a step."""
    return (step,) if isinstance(step, Expr) else step.expressions()


def mapped(step: Step, change: Callable[[Expr], Expr]) -> Step:
    """The same step with `change` applied to each of its expressions."""
    return change(step) if isinstance(step, Expr) else step.map(change)
