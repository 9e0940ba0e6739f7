"""Which attentions need no more of their past than states, and the latest tokens beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attn_compiler.algebra import wire
from attn_compiler.algebra.variant import Variant, with_tables_given
from attn_compiler.generation.kept import situations
from attn_compiler.planning.planner import agreed, settled
from attn_compiler.planning.policy import Policy
from attn_compiler.planning.site import Site
from attn_compiler.targets.held_past import latest, remembered_parts, summed
from attn_compiler.targets.traits import Trait, traits


@dataclass(frozen=True)
class Remembered:
    """An attention with linear parts, whose past are states: what it computes, as text, where, and the tables that it reads.

    Beside the states a layer holds as many of the `latest` tokens as its queries see one by one, with their `traits`.
    """

    what: str
    summed: str  # what the states are sums of, for the graph
    latest: int
    heads: int
    layer: int
    layers: int
    traits: tuple[Trait, ...] = ()
    tables: Mapping[str, Tensor] = field(default_factory=dict, hash=False)


def remembered_at(policy: Policy, site: Site, given: Mapping[str, Tensor]) -> Remembered | None:
    """What a site's states are of, at every phase and length; None where these are not enough, or where tables are missing."""
    decided = {None if site.blocked else _settled(agreed(policy, then).variant, site) for then in situations(site)}
    variant = decided.pop() if len(decided) == 1 else None
    if variant is None or not remembered_parts(variant, site.heads):
        return None
    made = {one.name for part in variant.parts() for one in part.made}
    asked, sums, near = traits(variant), summed(variant, site), latest(variant, site.heads)
    variant = with_tables_given(variant)
    tables = {name: _table(name, policy, given) for name in variant.tables() - made}
    known = {name: table for name, table in tables.items() if table is not None}
    if len(known) < len(tables):
        return None
    return Remembered(wire.write(variant), sums, near, site.heads, site.layer or 0, site.layers or 1, asked, known)


def _settled(asked: object, site: Site) -> Variant | None:
    return settled(asked, site) if isinstance(asked, Variant) else None


def _table(name: str, policy: Policy, given: Mapping[str, Tensor]) -> Tensor | None:
    """What the policy's file holds under a name, or the caller."""
    source = policy.tables.get(name)
    if source is None or source.origin == "input":
        return None
    return given.get(source.name) if source.array is None else torch.as_tensor(source.array)
