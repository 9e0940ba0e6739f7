"""The features of BASED: their product is the first terms of a Taylor series."""

from __future__ import annotations

import math

from attn_compiler.algebra.expr import const, dim
from attn_compiler.algebra.feature import Block, Feature, of_both, x
from attn_compiler.planning.words import Count


def taylor(order: Count = 2) -> Feature:
    """Products of up to `order` components: the dot product is the Taylor series of exp(q·k / √dim)."""
    powers = (x / (math.sqrt(math.factorial(n)) * dim ** (n / 4)) for n in range(1, order + 1))
    return of_both("taylor", Block(const(1.0), power=0), *(Block(each, power=n) for n, each in enumerate(powers, start=1)))
