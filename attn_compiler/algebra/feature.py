"""A feature map: what becomes of each query and of each key before their product is taken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from attn_compiler.algebra.expr import Expr, Sort, symbol

x, norm = symbol("x", Sort.REAL), symbol("norm", Sort.REAL)
component, feature = symbol("component", Sort.INDEX), symbol("feature", Sort.INDEX)


@dataclass(frozen=True)
class Block:
    """Some of the features of a vector.

    The vector is multiplied with `weights`, a table over (component, feature), where there is one; then its components are
    multiplied with each other, `power` at a time (0: a single 1). `each` says what becomes of every such number `x`, and may
    speak of `norm`, the length of the vector that came in, and of `dim`. `softmax` makes weights of them that sum to one.
    """

    each: Expr = x
    power: int = 1
    weights: Expr | None = None
    softmax: bool = False

    def expressions(self) -> tuple[Expr, ...]:
        return (self.each,) if self.weights is None else (self.each, self.weights)

    def map(self, change: Callable[[Expr], Expr]) -> Block:
        return replace(self, each=change(self.each), weights=None if self.weights is None else change(self.weights))


@dataclass(frozen=True)
class Feature:
    """The features of queries and those of keys, block after block; without blocks a vector stays what it is."""

    name: str
    of_q: tuple[Block, ...] = ()
    of_k: tuple[Block, ...] = ()

    @property
    def is_identity(self) -> bool:
        return not (self.of_q or self.of_k)

    def width(self, dim: int) -> int:
        """How many features a vector of `dim` numbers gets, as far as that shows: tables are taken to be square."""
        return sum(dim**block.power for block in self.of_q) or dim

    def blocks(self) -> Iterator[Block]:
        yield from self.of_q
        yield from self.of_k

    def expressions(self) -> tuple[Expr, ...]:
        return tuple(e for block in self.blocks() for e in block.expressions())

    def map(self, change: Callable[[Expr], Expr]) -> Feature:
        return Feature(self.name, *(tuple(block.map(change) for block in side) for side in (self.of_q, self.of_k)))


def of_both(name: str, *blocks: Block) -> Feature:
    """The same map for queries and for keys."""
    return Feature(name, blocks, blocks)


IDENTITY = Feature("identity")
