"""How the operands of an attention are held: the numbers that a type has, what shares a scale, and what is kept apart."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from enum import Enum


class Scaling(Enum):
    """What a group of numbers is divided by before it is rounded."""

    NONE = "none"
    REAL = "real"  # a float, so that the group's largest number becomes the largest of the type
    E4M3 = "e4m3"  # the same, itself held in eight bits, times one float for the whole tensor
    POWER = "power"  # a power of two: the group's largest number gets the exponent of the type's largest


@dataclass(frozen=True)
class Numbers:
    """The numbers of a type: `mantissa` bits behind the leading one, and below 2 ** `smallest` evenly spaced.

    Whole numbers are such numbers, too: all of them are below that power. What is beyond the `largest` becomes the largest.
    """

    name: str
    bits: int
    mantissa: int
    smallest: int
    largest: float
    scaling: Scaling = Scaling.REAL
    unsigned: float = 0.0  # the largest code where nothing is negative and the sign's bit counts, too; 0: the same
    block: int = 0  # numbers along a product's sum that share a scale, where the type itself says so

    @property
    def spacing(self) -> float:
        """Between neighbors below 2 ** `smallest`."""
        return math.ldexp(1.0, self.smallest - self.mantissa)


@dataclass(frozen=True)
class Shared:
    """What shares a scale: `tensor`, `head`, `token`, `channel`, or a `block` of `size` tokens."""

    name: str
    size: int = 0

    def __str__(self) -> str:
        return f"{self.name}({self.size})" if self.size else self.name


@dataclass(frozen=True)
class Held:
    """How one operand is held. `per` is None where the type needs no scales, or says itself what shares one."""

    numbers: Numbers
    per: Shared | None = None
    smooth: bool = False  # the mean of each channel over the tokens is kept apart, exactly
    outliers: float = math.inf  # channels with a number of at least this magnitude are kept as they are
    largest: tuple[float, ...] = ()  # what scales are made for, one for all or for each of two operands; none: what comes

    def of(self, operand: int) -> Held:
        """How one operand is held: of q and k, or of k and v, the first (0) or the second (1)."""
        return replace(self, largest=self.largest[operand : operand + 1]) if len(self.largest) > 1 else self

    def __str__(self) -> str:
        said = [self.numbers.name, f"per {self.per}" if self.per else "", "smoothed" if self.smooth else ""]
        apart = [f"channels from {self.outliers:g} on apart"] if self.outliers < math.inf else []
        fixed = [f"up to {' and '.join(f'{x:g}' for x in self.largest)}"] if self.largest else []
        return ", ".join([*filter(None, said), *apart, *fixed])


@dataclass(frozen=True)
class Storage:
    """How operands are held in the products of an attention, and between calls; None: as they come."""

    qk: Held | None = None
    pv: Held | None = None
    kv_cache: Held | None = None
    projections: Held | None = None

    def held(self) -> Iterator[tuple[str, Held]]:
        """Each operand that is held otherwise than it comes, by its name."""
        for field in fields(self):
            how = getattr(self, field.name)
            if how is not None:
                yield field.name, how

    @property
    def shares_among_tokens(self) -> bool:
        """Whether some, not all, of the tokens share a scale, so that their order decides which."""
        return any(how.per is not None and how.per.size > 0 for _, how in self.held()) or bool(self.pv and self.pv.numbers.block)

    def words(self) -> list[object]:
        """All of it as plain values, for a text."""
        return [[name, _words(how)] for name, how in self.held()]

    @staticmethod
    def of(words: Sequence[Sequence[object]]) -> Storage:
        """The storage of such values."""
        return Storage(**{str(name): _held(how) for name, how in words})


PLAIN = Storage()


def _words(how: Held) -> list[object]:
    numbers = [x.value if isinstance(x, Scaling) else x for x in (getattr(how.numbers, f.name) for f in fields(Numbers))]
    per = [how.per.name, how.per.size] if how.per else None
    return [numbers, per, how.smooth, None if math.isinf(how.outliers) else how.outliers, [*how.largest]]


def _held(words: object) -> Held:
    assert isinstance(words, Sequence)
    numbers, per, smooth, outliers, fixed = words
    name, bits, mantissa, smallest, largest, scaling, unsigned, block = numbers
    of_type = Numbers(name, bits, mantissa, smallest, largest, Scaling(scaling), unsigned, block)
    return Held(of_type, Shared(*per) if per else None, smooth, math.inf if outliers is None else outliers, tuple(fixed))
