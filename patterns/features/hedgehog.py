"""Learned features of Hedgehog, LoLCATs and Lizard, one map for each head."""

from __future__ import annotations

from typing import Literal

from attn_compiler.algebra.expr import Sort, exp, h, layer, table
from attn_compiler.algebra.feature import Block, Feature, component, feature, x
from attn_compiler.planning.words import TableName


def hedgehog(q: TableName = "hedgehog_q", k: TableName = "hedgehog_k", how: Literal["softmax", "exp"] = "softmax") -> Feature:
    """softmax(x·W) beside softmax(-x·W), or `exp` of both; W from tables [layers, heads, dim, features] for q and for k."""
    sides = (table(name, layer, h, component, feature, sort=Sort.REAL) for name in (q, k))
    if how == "exp":
        of_q, of_k = ((Block(exp(x), weights=w), Block(exp(-x), weights=w)) for w in sides)
    else:
        of_q, of_k = ((Block(x, weights=w, softmax=True), Block(-x, weights=w, softmax=True)) for w in sides)
    return Feature("hedgehog", of_q, of_k)
