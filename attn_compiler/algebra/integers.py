"""Sets of integers, written as in `"0:4, -1"`: one grammar for layers, heads and tokens."""

from __future__ import annotations

import re
from dataclasses import dataclass

from attn_compiler.algebra.expr import Expr, Operand, const, either, every, lift, same
from attn_compiler.errors import LanguageError

_PART = re.compile(r"(?P<number>-?\d+)|(?P<start>-?\d+)?:(?P<stop>-?\d+)?(?::(?P<step>\d+)?)?")


@dataclass(frozen=True)
class IntegerSet:
    """Slices, as Python writes them; an integer is a slice of one. Negative bounds count from the end."""

    parts: tuple[slice | int, ...]

    @staticmethod
    def parse(text: str | int) -> IntegerSet:
        """Read `3`, `"0:4, -1"` or `"1::2"`."""
        if isinstance(text, bool) or not isinstance(text, int | str):
            raise LanguageError(f'a set of integers is written like 3 or "0:4, -1", not {text!r}')
        return IntegerSet(tuple(_part(part.strip(), text) for part in str(text).split(",")))

    def members(self, length: int) -> frozenset[int]:
        """The members below `length`; an integer outside is an error, a slice is clipped as in Python."""
        found: set[int] = set()
        for part in self.parts:
            if isinstance(part, slice):
                found.update(range(length)[part])
            elif -length <= part < length:
                found.add(part % length)
            else:
                raise LanguageError(f"{part} is outside of 0 … {length - 1}")
        return frozenset(found)

    def contains(self, x: Expr, length: Operand) -> Expr:
        """The condition that `x` is a member, where negative bounds count from `length`."""
        return either(*(_contains(part, x, lift(length)) for part in self.parts))

    def contains_signed(self, x: Expr) -> Expr:
        """The condition that `x` is a member, where a negative number means itself."""
        return either(*(_contains(part, x, const(0)) for part in self.parts))

    def __str__(self) -> str:
        return ", ".join(_written(part) for part in self.parts)

    def __hash__(self) -> int:
        return hash(str(self))


def _part(part: str, text: str | int) -> slice | int:
    found = _PART.fullmatch(part)
    if not found:
        raise LanguageError(f'{part!r} in {text!r} is neither an integer nor a slice like "0:4" or "1::2"')
    if found["number"] is not None:
        return int(found["number"])
    start, stop, step = (int(found[key]) if found[key] else None for key in ("start", "stop", "step"))
    if step == 0:
        raise LanguageError(f"the step in {text!r} must be at least 1")
    return slice(start, stop, step)


def _written(part: slice | int) -> str:
    if isinstance(part, int):
        return str(part)
    start, stop, step = ("" if bound is None else str(bound) for bound in (part.start, part.stop, part.step))
    return f"{start}:{stop}" + (f":{step}" if step else "")


def _contains(part: slice | int, x: Expr, length: Expr) -> Expr:
    def place(bound: int) -> Expr:
        return const(bound) if bound >= 0 or length == const(0) else length + bound

    if isinstance(part, int):
        return same(x, place(part))
    start = place(part.start or 0)
    conditions = [] if part.start is None else [start <= x]
    if part.stop is not None:
        conditions.append(x < place(part.stop))
    if part.step not in (None, 1):
        conditions.append(same((x - start) % part.step, 0))
    return every(*conditions)
