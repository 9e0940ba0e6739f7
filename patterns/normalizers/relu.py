"""ReLU attention."""

from __future__ import annotations

from attn_compiler.algebra.expr import acc, k_len, maximum, real, score
from attn_compiler.algebra.variant import Normalizer
from attn_compiler.planning.words import Number


def relu(divide: Number = k_len) -> Normalizer:
    """max(score, 0), divided by the length."""
    return Normalizer("relu", maximum(score, 0.0), acc * (1.0 / real(divide)))
