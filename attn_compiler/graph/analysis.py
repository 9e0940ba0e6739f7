"""From a graph to a plan and, if it is wanted, to the rewritten graph: what the backend, explain and export share."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, fx

from attn_compiler import torch_private as private
from attn_compiler.algebra.storage import Held
from attn_compiler.errors import TableError, did_you_mean
from attn_compiler.graph.bodies import Part, parts
from attn_compiler.graph.capture import capture
from attn_compiler.graph.describe import Described, describe, with_layers
from attn_compiler.graph.match import match
from attn_compiler.graph.projections import with_projections
from attn_compiler.graph.rewrite import Replacement, rewrite
from attn_compiler.graph.sideways import turn_softmaxes
from attn_compiler.graph.supply import Supply
from attn_compiler.planning.parameters import starts
from attn_compiler.planning.plan import Decision, NearMiss, Plan
from attn_compiler.planning.site import Site
from attn_compiler.planning.sources import Source
from attn_compiler.runtime.targets import TARGETS, Target
from attn_compiler.targets.fused import swallows

Planner = Callable[[Sequence[Site], Sequence[NearMiss]], Plan]


@dataclass(frozen=True)
class Analysis:
    """A captured graph, its attentions, the graphs they stand in, and what was decided for each of them, in one order."""

    graph: fx.GraphModule
    described: tuple[Described, ...]
    homes: tuple[Part, ...]
    plan: Plan
    parts: tuple[Part, ...]

    def forget_values(self) -> None:
        """Drop what is known of every node, which a compiler of the rewritten graph finds out again."""
        for part in self.parts:
            private.forget_values(part.graph)


def analyze(gm: fx.GraphModule, example_inputs: Sequence[private.Traced] | None, planner: Planner) -> Analysis:
    """Find every attention of a graph, work out what it computes, and decide it. Nothing changes."""
    captured = capture(gm, example_inputs)
    found: list[Described] = []
    homes: list[Part] = []
    near_misses: list[NearMiss] = []
    every = tuple(parts(captured))
    for number, part in enumerate(every):
        described, missed = _described(part, number)
        found += described
        homes += [part] * len(described)
        near_misses += missed
    sites = with_layers(found)
    return Analysis(captured, sites, tuple(homes), planner([one.site for one in sites], near_misses), every)


def _described(part: Part, number: int) -> tuple[Sequence[Described], list[NearMiss]]:
    """The attentions of one graph, and what looked like one."""
    matches = match(part.graph)
    described, missed = [], list(matches.near_misses)
    for found in matches.sites:
        one = describe(part.graph, found, part.reader)
        if isinstance(one, NearMiss):
            missed.append(one)
        else:
            described.append(replace(one, site=replace(one.site, blocked=part.blocked or one.site.blocked)))
    return with_projections(described, part.blocked, number), missed


def compiling(decision: Decision) -> Target:
    """The target of a decision for graphs that are compiled here."""
    return TARGETS[str(decision.target)]


def _check_read(sources: Mapping[str, Source], given: Mapping[str, Tensor]) -> None:
    """Whoever gives a table means it to be read."""
    read = {source.name for source in sources.values() if source.origin == "given"}
    for name in given:
        if name not in read:
            raise TableError(
                f'the policy reads no table "{name}" from the option "tables" (`labels: {{{name}: {{given: {name}}}}}` would)'
                + did_you_mean(name, read)
            )


def carry_out(
    analysis: Analysis,
    sources: Mapping[str, Source],
    given: Mapping[str, Tensor],
    target: Callable[[Decision], Target] = compiling,
) -> tuple[Tensor, ...] | None:
    """Rewrite the captured graph as its plan says; the tensors that it reads besides its inputs, or None if nothing changed."""
    supply = Supply(analysis.graph, {**sources, **starts(analysis.plan.decisions, sources)}, given)
    wanted: dict[int, list[Replacement]] = defaultdict(list)
    rounded: dict[int, dict[fx.Node, Held]] = defaultdict(dict)
    for one, home, decision in zip(analysis.described, analysis.homes, analysis.plan.decisions, strict=True):
        if decision.target is not None:
            own = supply.nodes(sorted(decision.variant.tables() - set(one.tables)))
            reached = {name: home.reach(node) for name, node in own.items()}
            wanted[id(home)].append(Replacement(one, decision.variant, target(decision), reached))
        if decision.projections is not None:
            rounded[id(home)] |= dict.fromkeys((*one.makers, *one.takers), decision.projections)
    _check_read(sources, given)
    unfused = {one.found.anchor for one in analysis.described if swallows(one.site.computes.score, one.site.risky)}
    touched: set[int] = set()
    for part in reversed(analysis.parts):  # the inner graphs first: the outer ones hold them
        mine, its = wanted[id(part)], rounded[id(part)]
        replaced = {one.described.found.anchor for one in mine}
        turned = not part.blocked and turn_softmaxes(part.graph.graph, replaced, unfused)
        if mine or its or turned or id(part) in touched:
            rewrite(part.graph, mine, its)
            part.put_back()
            touched |= {id(part), id(part.outer)}
    return tuple(supply.extra) if touched else None
