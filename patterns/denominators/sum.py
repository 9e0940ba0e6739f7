"""The sum of the weights, as in linear attention since Katharopoulos et al."""

from __future__ import annotations

from attn_compiler.algebra.expr import Expr, acc, mass
from attn_compiler.planning.words import EPS


def sum() -> Expr:
    """The sum of the weights, plus eps."""
    return acc / (mass + EPS)
