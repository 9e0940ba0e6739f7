"""Agents in the place of keys: Agent Attention (Han et al., 2024)."""

from __future__ import annotations

from attn_compiler.algebra.context import Context
from attn_compiler.planning.geometry import Geometry
from attn_compiler.planning.words import CountPerAxis


def agents(count: CountPerAxis, *, geometry: Geometry | None = None) -> Context:
    """So many pooled queries (with a list: on the geometry) gather the values first, by a softmax; queries attend to these."""
    return Context("agents", tuple(count), () if len(count) == 1 else Geometry.plane(geometry, "agents"))
