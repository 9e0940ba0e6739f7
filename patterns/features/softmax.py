"""Efficient attention of Shen et al.: queries that sum to one."""

from __future__ import annotations

from attn_compiler.algebra.feature import Block, Feature, of_both


def softmax() -> Feature:
    """exp(x) over its sum over the components."""
    return of_both("softmax", Block(softmax=True))
