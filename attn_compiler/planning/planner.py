"""Decides every site: rules against sites, slots laid over what a site computes, targets asked what they can carry."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from attn_compiler.algebra.bounds import Interval, bounds
from attn_compiler.algebra.expr import Expr, Sort, b, dim, h, heads, i, k, k_len, layer, layers, q, q_len
from attn_compiler.algebra.simplify import simplify
from attn_compiler.algebra.variant import Variant
from attn_compiler.errors import RefusedError
from attn_compiler.planning.plan import Decision, NearMiss, Plan, Refusal
from attn_compiler.planning.policy import Policy, Rule
from attn_compiler.planning.resolve import Asked, asked_of, uses
from attn_compiler.planning.site import Site


@dataclass(frozen=True)
class Carried:
    """How a target would run a variant, and whether that is better than the code the model already has."""

    form: str
    gains: bool
    instead: Variant | None = None  # what runs, where part of what was asked for would not pay
    because: str = ""


class Target(Protocol):
    """One kind of machine."""

    @property
    def name(self) -> str: ...

    def carry(self, site: Site, variant: Variant) -> Carried | Refusal: ...


def plan(sites: Sequence[Site], policy: Policy, targets: Sequence[Target], near_misses: Iterable[NearMiss] = ()) -> Plan:
    """Decide all sites of a graph. A refusal is fatal where the rule says so."""
    asked = [agreed(policy, site) for site in sites]
    decided = _sharing([decide(site, one, targets) for site, one in zip(sites, asked, strict=True)], asked)
    costs = policy.measured.sites if policy.measured and not policy.measured.foreign else {}
    decisions = tuple(replace(d, error=costs[d.site.name].whole.relative) if d.site.name in costs else d for d in decided)
    return Plan(decisions, tuple(near_misses), uses=uses(policy, sites, [one.rules for one in asked]))


def _sharing(decided: Sequence[Decision], asked: Sequence[Asked]) -> Sequence[Decision]:
    """The same, where no attention holds projections otherwise than another one that shares them."""
    for at, one in enumerate(decided):
        for other in decided if one.projections else ():
            if other.projections != one.projections and other.site.projections.numbers & one.site.projections.numbers:
                reason = f"it shares projections with {other.site.name}, which holds them otherwise"
                left = _left(one.site, asked[at], (*one.refusals, Refusal(one.rule, reason)))
                return _sharing([*decided[:at], left, *decided[at + 1 :]], asked)
    return decided


def agreed(policy: Policy, site: Site) -> Asked:
    """What a policy asks for, unless it promises a tolerance that it does not keep, or that nobody has measured."""
    asked = asked_of(policy, site)
    rule = _promising(policy, asked)
    if rule is None or isinstance(asked.variant, Refusal) or is_same(settled(asked.variant, site), site.computes, site):
        return asked
    if policy.measured is None:
        reason = "its `tolerance` was not measured: run `attn calibrate MODEL POLICY`, or use what `attn.calibrate` returns"
    else:
        reason = policy.measured.beyond(site.name, rule.tolerance)
    return replace(asked, variant=Refusal(rule.title, reason)) if reason else asked


def promised(policy: Policy, site: Site) -> Mapping[str, float]:
    """The tolerance of what a policy asks for at a site."""
    rule = _promising(policy, asked_of(policy, site))
    return rule.tolerance if rule else {}


def _promising(policy: Policy, asked: Asked) -> Rule | None:
    return next((rule for rule in policy.rules if rule.tolerance and rule.number in asked.rules), None)


def decide(site: Site, asked: Asked, targets: Sequence[Target]) -> Decision:
    """What the first target that can carry the variant makes of a site, or its original code with the reasons."""
    if isinstance(asked.variant, Refusal):
        return _left(site, asked, (asked.variant,))
    projections = asked.variant.storage.projections
    variant = settled(asked.variant.projected(None), site)
    exact = is_same(variant, site.computes, site)
    variant = (site.literal or site.computes) if exact else variant
    decided = partial(Decision, site, asked.rule, projections=projections)
    blocked = [site.blocked] if site.blocked else list(site.notes) if exact and not site.literal else []
    refusals = [Refusal("rewrite", reason) for reason in blocked]
    for target in () if blocked else targets:
        carried = target.carry(site, variant)
        if isinstance(carried, Refusal):
            refusals.append(carried)
            continue
        if carried.instead is not None:
            refusals.append(Refusal(target.name, carried.because))
            variant, exact = carried.instead, is_same(carried.instead, site.computes, site)
        if carried.gains or not exact:
            return decided(variant, exact and not projections, target.name, carried.form, tuple(refusals))
    if exact:
        return decided(variant, not projections, None, site.form, tuple(refusals))
    return _left(site, asked, tuple(refusals))


def _left(site: Site, asked: Asked, refusals: tuple[Refusal, ...]) -> Decision:
    if asked.fatal:
        reasons = "; ".join(f"{refusal.by}: {refusal.reason}" for refusal in refusals)
        raise RefusedError(f"{site.name}: {asked.rule} says `fallback: error`, and it cannot be carried out: {reasons}")
    return Decision(site, asked.rule, site.computes, exact=True, target=None, form=site.form, refusals=refusals, refused=True)


def settled(variant: Variant, site: Site) -> Variant:
    """The variant at the lengths of a site: conditions that always hold there are gone, and groups that differ in nothing."""
    facts = facts_of(site)
    variant = variant.map(lambda e: simplify(e, facts) if e.sort is Sort.BOOL else e)
    kinds = {group for _, group in variant.groups}
    return kinds.pop() if len(kinds) == 1 else variant


def is_same(a: Variant, other: Variant, site: Site) -> bool:
    """Whether two variants compute the same at a site: a comparison of canonical forms."""
    facts = facts_of(site)
    return a.map(lambda e: simplify(e, facts)) == other.map(lambda e: simplify(e, facts))


def facts_of(site: Site) -> dict[Expr, Interval]:
    """What is known of the leaves of a site's expressions."""
    known = {heads: site.heads, dim: site.head_dim, layer: site.layer, layers: site.layers, q_len: site.q_len, k_len: site.k_len}
    facts = {leaf: Interval(n, n) for leaf, n in known.items() if isinstance(n, int)}
    lengths = {b: site.batch, h: site.heads, i: site.q_len, k: site.k_len}
    facts |= {leaf: Interval(0, n - 1 if isinstance(n, int) else math.inf) for leaf, n in lengths.items()}
    if site.kept:  # what is decided here must serve a cache at every length: how far queries reach has to be seen in it
        return {leaf: fact for leaf, fact in facts.items() if leaf not in (k, k_len)}
    return facts | {q: bounds(site.frame.position, facts)} if site.frame else facts
