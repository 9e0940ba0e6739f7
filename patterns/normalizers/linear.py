"""Linear attention: scores are weights."""

from __future__ import annotations

from attn_compiler.algebra.expr import acc, mass, score
from attn_compiler.algebra.variant import Normalizer
from attn_compiler.planning.words import EPS, Denominator, Number

SUM = acc / (mass + EPS)


def linear(denominator: Denominator = SUM, eps: Number = 1e-6) -> Normalizer:  # type: ignore[assignment]
    """The score itself, over a denominator: none, sum, clamp(100), mean or subtract."""
    return Normalizer("linear", score, denominator.substitute({EPS: eps}))
