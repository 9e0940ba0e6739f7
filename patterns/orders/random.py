"""A random order, the same on every machine."""

from __future__ import annotations

from attn_compiler.algebra.expr import k, table
from attn_compiler.algebra.variant import DerivedTable
from attn_compiler.errors import LanguageError
from attn_compiler.planning.words import PerToken, Seed

MASK = 2**64 - 1


def random(seed: Seed) -> PerToken:
    """Positions sorted by splitmix64 of (seed, position)."""
    name = f"random:{'layer' if seed is None else seed}"

    def ranks(length: int) -> list[int]:
        if seed is None:
            raise LanguageError("random(seed=layer) needs the number of the layer, which is unknown here")
        ranked = [0] * length
        for rank, position in enumerate(sorted(range(length), key=lambda n: (splitmix64(splitmix64(seed) ^ n), n))):
            ranked[position] = rank
        return ranked

    return PerToken(table(name, k), (DerivedTable(name, ranks),))


def splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)
