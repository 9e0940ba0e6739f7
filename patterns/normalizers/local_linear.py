"""Local linear attention (LLA): a regression around each query."""

from __future__ import annotations

from attn_compiler.algebra.expr import acc, exp, mass, minimum, peak, score
from attn_compiler.algebra.variant import Normalizer
from attn_compiler.planning.words import Number

_MOST = 60.0  # beyond exp(60) times the largest weight a ridge leaves nothing to solve for


def local_linear(ridge: Number = 1.0) -> Normalizer:  # type: ignore[assignment]
    """The values that a ridge regression, weighed by exp(score), gives at the query: a system of dim equations for each."""
    return Normalizer("local_linear", exp(score - peak), acc / mass, ridge * exp(minimum(-peak, _MOST)))
