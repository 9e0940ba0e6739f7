"""Finds keys that a cache holds only some of, by the operator that says where these stand (`runtime/placed.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import SymInt, Tensor, fx

from attn_compiler.algebra.variant import Variant
from attn_compiler.graph.calls import Argument, call
from attn_compiler.graph.record import GraphSite
from attn_compiler.planning.kept import Kept
from attn_compiler.targets.operands import Operands


@dataclass(frozen=True)
class Placed:
    """The keys and values that are there, their places (None: the latest), how many tokens there are, and how many are kept."""

    k: fx.Node
    v: fx.Node
    places: fx.Node | None
    tokens: Argument  # a number, or the node of one
    kept: Kept

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """What a computation has to be given of this."""
        return tuple(x for x in (self.places, self.tokens) if isinstance(x, fx.Node))

    def count(self, operands: Operands, values: Sequence[Argument]) -> int | SymInt:
        """How many tokens there are, from values that begin with those of `nodes`."""
        found = values[len(self.nodes) - 1] if isinstance(self.tokens, fx.Node) else self.tokens
        assert isinstance(found, int | SymInt)
        return found

    def stand(self, operands: Operands, variant: Variant, values: Sequence[Argument]) -> tuple[Operands, Variant]:
        """The same call with each key in its place; the queries are the last of the keys."""
        if self.places is None:
            return replace(operands, q_positions=None, k_positions=self.count(operands, values) - operands.k_len), variant
        assert isinstance(values[0], Tensor)
        return replace(operands, q_positions=None, k_positions=values[0][:, None]), variant


def placed(site: GraphSite) -> Placed | None:
    """What a site's cache holds; None where it holds everything, or nobody says."""
    k, v = call(site.k.node), call(site.v.node)
    if k.op != "placed" or v.op != "placed" or k.get("places") is not v.get("places"):
        return None
    return Placed(k["held"], v["held"], k.get("places"), k["tokens"], Kept(k["first"], k["latest"]))
