"""What the axis of tokens is: a grid of one to three axes, perhaps with tokens before and after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from attn_compiler.algebra.evaluate import evaluate_scalar
from attn_compiler.algebra.expr import Expr, const, every, floor, k_len, real, sqrt
from attn_compiler.errors import LanguageError, did_you_mean

Item = TypeVar("Item")


@dataclass(frozen=True)
class Geometry:
    """A grid in row-major order. Sizes are expressions, since they may follow from the length."""

    size: tuple[Expr, ...]
    before: int = 0
    after: int = 0

    @staticmethod
    def of(
        size: str | Sequence[int | str], before: int = 0, after: int = 0, values: Mapping[str, int | float] | None = None
    ) -> Geometry:
        """Read `[64, 64]`, `["h", "w"]` with the values of the names, or `square`."""
        if min(before, after) < 0:
            raise LanguageError(f"a geometry has at least 0 tokens before and after it, not {before} and {after}")
        if size == "square":
            side = floor(sqrt(real(k_len - (before + after))) + 0.5)
            return Geometry((side, side), before, after)
        if isinstance(size, str) or not 1 <= len(size) <= 3:
            raise LanguageError(f"the size of a geometry is a list of 1 to 3 sizes, or `square`, not {size!r}")
        return Geometry(tuple(_side(x, {} if values is None else values) for x in size), before, after)

    @staticmethod
    def plane(geometry: Geometry | None, word: str) -> tuple[int, int]:
        """The sizes of a grid of two axes that is all there is, and known; for a word that can use no other one."""
        sizes = tuple(size.value for size in geometry.size) if geometry else ()
        known = [size for size in sizes if isinstance(size, int)]
        if geometry is None or len(known) != 2 or len(sizes) != 2 or geometry.before or geometry.after:
            raise LanguageError(f"`{word}` with a list needs a `geometry` of two sizes that are numbers, with nothing beside it")
        return known[0], known[1]

    @property
    def count(self) -> Expr:
        """The number of tokens on the grid."""
        return _product(self.size)

    def tokens(self, length: int) -> int:
        """How many tokens there are on the grid, before it and after it, where an axis of `length` may say its sizes."""
        grid = evaluate_scalar(self.count, {k_len: length})
        return self.before + int(grid) + self.after

    def __str__(self) -> str:
        around = [f"{count} {side} it" for count, side in ((self.before, "before"), (self.after, "after")) if count]
        sides = " × ".join(str(side) for side in self.sides) if self.sides else "a square"
        return " with ".join([sides, *([" and ".join(around)] if around else [])])

    @property
    def sides(self) -> tuple[int, ...] | None:
        """The sizes as numbers, where they are known."""
        known = tuple(s.value for s in self.size if s.is_const and isinstance(s.value, int))
        return known if len(known) == len(self.size) else None

    def per_axis(self, given: tuple[Item, ...]) -> tuple[Item, ...]:
        """One for each axis; a single one stands for all."""
        if len(given) not in (1, len(self.size)):
            raise LanguageError(f"the geometry has {len(self.size)} axes, so {len(self.size)} numbers, not {len(given)}")
        return given * len(self.size) if len(given) == 1 else given

    def inside(self, position: Expr) -> Expr:
        on_grid = position - self.before
        return every(const(0) <= on_grid, on_grid < self.count)

    def coordinates(self, position: Expr) -> tuple[Expr, ...]:
        """The coordinate on each axis of a position on the grid."""
        rest, found = position - self.before, list[Expr]()
        for size in reversed(self.size[1:]):
            found.append(rest % size)
            rest = rest // size
        return (rest, *reversed(found))


def _side(x: int | str, values: Mapping[str, int | float]) -> Expr:
    value = values.get(x) if isinstance(x, str) else x
    if value is None:
        raise LanguageError(f'the size "{x}" is unknown: give it at compile time, options={{"values": {{"{x}": 64}}}}'
                            + did_you_mean(str(x), values))  # fmt: skip
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise LanguageError(f"a size is a whole number of at least 1, not {value!r}")
    return const(value)


def _product(factors: Sequence[Expr]) -> Expr:
    result = factors[0]
    for factor in factors[1:]:
        result = result * factor
    return result
