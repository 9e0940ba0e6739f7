"""Learned features of Hedgehog and LoLCATs, one map for each head."""

from __future__ import annotations

from attn_compiler.algebra.expr import Sort, h, layer, table
from attn_compiler.algebra.feature import Block, Feature, component, feature, x
from attn_compiler.planning.words import TableName


def hedgehog(q: TableName = "hedgehog_q", k: TableName = "hedgehog_k") -> Feature:
    """softmax(x·W) beside softmax(-x·W), W from tables [layers, heads, dim, features] for q and for k."""
    sides = (table(name, layer, h, component, feature, sort=Sort.REAL) for name in (q, k))
    of_q, of_k = ((Block(x, weights=w, softmax=True), Block(-x, weights=w, softmax=True)) for w in sides)
    return Feature("hedgehog", of_q, of_k)
