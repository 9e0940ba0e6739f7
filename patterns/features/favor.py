"""Positive random features of Performer (Choromanski et al., 2021): their dot product is exp(q·k / √dim) in the mean."""

from __future__ import annotations

from attn_compiler.algebra.expr import Sort, dim, exp, h, layer, sqrt, table
from attn_compiler.algebra.feature import Block, Feature, component, feature, norm, of_both, x
from attn_compiler.planning.words import Count, TableName


def favor(features: Count = 256, projection: TableName = "favor") -> Feature:
    """exp(x·W / dim**(1/4) - |x|**2 / (2√dim)) over √features; W, drawn normally, from a table [layers, heads, dim, features]."""
    drawn = table(projection, layer, h, component, feature, sort=Sort.REAL)
    root = sqrt(dim)
    return of_both("favor", Block(exp(x / sqrt(root) - norm * norm / (2.0 * root)) / float(features) ** 0.5, weights=drawn))
