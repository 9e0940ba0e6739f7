"""From a graph to a plan and, if it is wanted, to the rewritten graph: what the backend, explain and export share."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from attn_compiler.graph import torch_private as private
from attn_compiler.graph.capture import capture
from attn_compiler.graph.describe import Described, describe, with_layers
from attn_compiler.graph.match import match
from attn_compiler.graph.rewrite import Replacement, rewrite
from attn_compiler.graph.supply import Supply
from attn_compiler.graph.symbolic import SymbolicReader
from attn_compiler.planning.plan import NearMiss, Plan
from attn_compiler.planning.site import Site
from attn_compiler.planning.sources import Source

_ANCHOR = re.compile(r"softmax|attention|exp|transformer")
Planner = Callable[[Sequence[Site], Sequence[NearMiss]], Plan]


@dataclass(frozen=True)
class Analysis:
    """A captured graph, its attentions, and what was decided for each of them, in one order."""

    graph: fx.GraphModule
    described: tuple[Described, ...]
    plan: Plan


def analyze(gm: fx.GraphModule, example_inputs: Sequence[private.Traced] | None, planner: Planner) -> Analysis:
    """Find every attention of a graph, work out what it computes, and decide it. Nothing changes."""
    captured = capture(gm, example_inputs)
    matches = match(captured)
    reader = SymbolicReader(captured)
    described, near_misses = [], list(matches.near_misses)
    for found in matches.sites:
        one = describe(captured, found, reader)
        if isinstance(one, NearMiss):
            near_misses.append(one)
        else:
            described.append(one)
    sites = with_layers(described)
    return Analysis(captured, sites, planner([one.site for one in sites], near_misses))


def carry_out(analysis: Analysis, sources: Mapping[str, Source], given: Mapping[str, Tensor]) -> tuple[Tensor, ...] | None:
    """Rewrite the captured graph as its plan says; the tensors that it reads besides its inputs, or None if nothing changed."""
    supply = Supply(analysis.graph, sources, given)
    replacements = [
        Replacement(one, decision.variant, supply.nodes(sorted(decision.variant.tables() - set(one.tables))))
        for one, decision in zip(analysis.described, analysis.plan.decisions, strict=True)
        if decision.target is not None
    ]
    if not replacements:
        return None
    rewrite(analysis.graph, replacements)
    private.forget_values(analysis.graph)
    return tuple(supply.extra)


def has_anchor(gm: fx.GraphModule) -> bool:
    """Whether a graph that Dynamo made could hold an attention at all; most do not, and are not looked at any further."""
    return any(_ANCHOR.search(str(node.target).lower()) for node in gm.graph.nodes if node.op.startswith("call_")) or any(
        isinstance(module, fx.GraphModule) and has_anchor(module) for module in gm.children()
    )
