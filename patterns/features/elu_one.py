"""The features of Katharopoulos et al., "Transformers are RNNs"."""

from __future__ import annotations

from attn_compiler.algebra.expr import exp, minimum, where
from attn_compiler.algebra.feature import Block, Feature, of_both, x


def elu_one() -> Feature:
    """elu(x) + 1: exp(x) below zero, x + 1 above."""
    return of_both("elu_one", Block(where(x > 0.0, x + 1.0, exp(minimum(x, 0.0)))))
