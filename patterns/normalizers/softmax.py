"""Softmax, perhaps with a learned sink that takes part in the denominator."""

from __future__ import annotations

from attn_compiler.algebra.expr import Sort, acc, exp, h, layer, mass, peak, score, table
from attn_compiler.algebra.variant import SOFTMAX, Normalizer
from attn_compiler.planning.words import TableName


def softmax(sink: TableName | None = None) -> Normalizer:
    """exp(score) over its sum, plus exp of a per-head sink if one is named."""
    if sink is None:
        return SOFTMAX
    extra = exp(table(sink, layer, h, sort=Sort.REAL) - peak)
    return Normalizer("softmax", exp(score - peak), acc / (mass + extra))
