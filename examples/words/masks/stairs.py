"""Causal in steps: the tokens of one step see each other, as those of a video frame do."""

from __future__ import annotations

from attn_compiler.algebra.expr import Expr, k, q
from attn_compiler.planning.words import Count


def stairs(step: Count) -> Expr:
    """k // step <= q // step."""
    return k // step <= q // step
