"""Means in place of sums, as in LinFusion: what eps adds does not depend on how many keys there are."""

from __future__ import annotations

from attn_compiler.algebra.expr import Expr, acc, mass, seen
from attn_compiler.planning.words import EPS


def mean() -> Expr:
    """The mean of the weights, plus eps, below the mean of weight * v."""
    return acc / (mass + EPS * seen)
