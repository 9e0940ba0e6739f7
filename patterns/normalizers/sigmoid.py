"""Sigmoid attention."""

from __future__ import annotations

import attn_compiler.algebra.expr as e
from attn_compiler.algebra.variant import Normalizer
from attn_compiler.planning.words import Number


def sigmoid(bias: Number | None = None) -> Normalizer:
    """sigmoid(score + bias), whose rows need not sum to one."""
    return Normalizer("sigmoid", e.sigmoid(e.score if bias is None else e.score + bias), e.acc)
