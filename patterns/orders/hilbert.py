"""Along a Hilbert curve."""

from __future__ import annotations

from attn_compiler.algebra.expr import k, table
from attn_compiler.algebra.variant import DerivedTable
from attn_compiler.errors import LanguageError
from attn_compiler.planning.geometry import Geometry
from attn_compiler.planning.words import PerToken


def hilbert(*, geometry: Geometry) -> PerToken:
    """Along the Hilbert curve of the smallest cube around the geometry."""
    sides = geometry.sides
    if sides is None:
        raise LanguageError("`hilbert` needs a geometry whose sizes are numbers")
    name = f"hilbert:{'x'.join(map(str, sides))}+{geometry.before}"
    first, last = geometry.before, geometry.before + _area(sides)

    def ranks(length: int) -> list[int]:
        ranked = list(range(length))
        for rank, position in enumerate(sorted(range(first, last), key=lambda n: distance(_unravel(n - first, sides), sides))):
            ranked[position] = first + rank
        return ranked

    return PerToken(table(name, k), (DerivedTable(name, ranks),))


def _area(sides: tuple[int, ...]) -> int:
    return sides[0] * _area(sides[1:]) if sides else 1


def _unravel(place: int, sides: tuple[int, ...]) -> list[int]:
    found = []
    for side in reversed(sides):
        place, at = divmod(place, side)
        found.append(at)
    return found[::-1]


def distance(at: list[int], sides: tuple[int, ...]) -> int:
    """How far along the curve a point lies (Skilling, 2004)."""
    bits = max(sides).bit_length()
    x = _inverse_undo(list(at), bits)
    for n in range(1, len(x)):
        x[n] ^= x[n - 1]
    flip = 0
    for bit in range(bits - 1, 0, -1):
        if x[-1] >> bit & 1:
            flip ^= (1 << bit) - 1
    x = [value ^ flip for value in x]
    return sum((value >> bit & 1) << (bit * len(x) + len(x) - 1 - n) for bit in range(bits) for n, value in enumerate(x))


def _inverse_undo(x: list[int], bits: int) -> list[int]:
    for bit in range(bits - 1, 0, -1):
        low = (1 << bit) - 1
        for n, value in enumerate(x):
            if value >> bit & 1:
                x[0] ^= low
            else:
                swap = (x[0] ^ value) & low
                x[0] ^= swap
                x[n] ^= swap
    return x
