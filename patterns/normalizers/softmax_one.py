"""Softmax off by one."""

from __future__ import annotations

from attn_compiler.algebra.expr import acc, exp, mass, peak, score
from attn_compiler.algebra.variant import Normalizer


def softmax_one() -> Normalizer:
    """exp(score) over one plus its sum."""
    return Normalizer("softmax_one", exp(score - peak), acc / (mass + exp(-peak)))
