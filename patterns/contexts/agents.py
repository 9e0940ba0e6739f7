"""Agents in the place of keys: Agent Attention (Han et al., 2024)."""

from __future__ import annotations

from attn_compiler.algebra.context import Context
from attn_compiler.planning.geometry import Geometry
from attn_compiler.planning.words import CountPerAxis, TableName


def agents(
    count: CountPerAxis,
    first: TableName | None = None,
    second: TableName | None = None,
    *,
    geometry: Geometry | None = None,
) -> Context:
    """So many pooled queries (with a list: on the geometry) gather the values first, by a softmax; queries attend to these.

    Tables are added to the scores of the `first` softmax, [layers, heads, agents, tokens], and of the `second`, [layers, heads,
    tokens, agents].
    """
    grid = () if len(count) == 1 else Geometry.plane(geometry, "agents")
    return Context("agents", tuple(count), grid, first or "", second=second or "")
