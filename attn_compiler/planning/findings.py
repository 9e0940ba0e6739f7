"""What a report says about alike attentions: where they are, what they compute, what they cost."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from attn_compiler.algebra.context import Merge
from attn_compiler.algebra.expr import Expr, i, layer, layers
from attn_compiler.algebra.notation import notation
from attn_compiler.algebra.variant import Variant
from attn_compiler.planning.cost import Cost, merged, pooled, solved, summed
from attn_compiler.planning.formula import Formula, formulas, whole
from attn_compiler.planning.kept import Caches, Holding
from attn_compiler.planning.plan import Decision
from attn_compiler.planning.schedule import Schedule, schedule
from attn_compiler.planning.site import Site

SKIPPING = ("blocks", "scaled_dot_product_attention(is_causal)", "a generated kernel")  # forms that leave out what a mask hides
SUMMING = ("chunk by chunk", "whose state stays in the cache", "adds keys up to states")  # and those that need no map


@dataclass(frozen=True)
class Costs:
    """Of one row of the batch at the likely lengths, and the part of the map that is computed."""

    before: Cost
    after: Cost
    density_before: float
    density_after: float


class Row(NamedTuple):
    """What is said under a term; a part of a formula has a name, filled up to the width of those around it."""

    term: str
    says: str
    name: str = ""


@dataclass(frozen=True)
class Finding:
    """Attentions that differ in nothing but their place."""

    decisions: tuple[Decision, ...]

    @property
    def first(self) -> Decision:
        return self.decisions[0]

    @property
    def name(self) -> str:
        """All their names as one: `model.layers.{0-4, 6-10}.self_attn`."""
        names = list(dict.fromkeys(d.site.name or "(no module)" for d in self.decisions))
        numbers = [d.site.layer for d in self.decisions if d.site.layer is not None]
        if len(names) == 1 or len(numbers) < len(names):
            return ", ".join(names)
        return _template(self.first.site).replace("{}", "{" + ranges(sorted(set(numbers))) + "}")

    @property
    def title(self) -> str:
        """Their names, how many they are, and what became of them."""
        count = f" ({len(self.decisions)} alike)" if len(self.decisions) > 1 else ""
        return f"{self.name}{count}: {self.outcome}"

    @property
    def outcome(self) -> str:
        """What became of them, and by which rule."""
        return _outcome(self.first)

    def rows(self, because: str = "") -> Iterator[Row]:
        """All that is said of them, the most important first; `because` is why their rule is there."""
        first = self.first
        site, written = first.site, formulas(first.site.computes, first.site)
        if because:
            yield Row("because", because)
        yield from (Row("refused", f"{refusal.by}: {refusal.reason}") for refusal in first.refusals)
        yield from _formula("computes", written)
        becomes = formulas(first.variant, site)
        if first.target is not None and not first.exact and whole(becomes) != whole(written):
            yield from _formula("becomes", becomes)
        yield Row("shape", shape(site))
        if site.frame is None:
            yield Row("positions", "nobody knows where its queries stand among its keys")
        elif site.frame.position != i:
            yield Row("positions", f"q = {notation(site.frame.position)}, from {site.frame.because}")
        yield Row("runs", _runs_as(first))
        if first.projections is not None:
            yield Row("rounds", f"{', '.join(site.projections.names)}: weights and what they meet held in {first.projections}")
        yield Row("costs", _costs(costs(first)))
        if first.caches:
            yield Row("cache", _caches(first.caches, site.k_hint))
        errors = [d.error for d in self.decisions if d.error is not None]
        if errors:
            yield Row("error", f"at most {max(errors):.3g} of its output, as calibration measured it (relative L2)")
        yield from (Row("note", note) for note in site.notes)


def findings(decisions: Sequence[Decision]) -> tuple[Finding, ...]:
    """Group what is alike, however it is interleaved, in the order of each group's first member."""
    groups: dict[tuple[object, ...], list[Decision]] = {}
    for decision in decisions:
        groups.setdefault(_alike(decision), []).append(decision)
    return tuple(Finding(tuple(group)) for group in groups.values())


def _alike(d: Decision) -> tuple[object, ...]:
    refusals = tuple((r.by, r.reason) for r in d.refusals)
    computes, becomes = (whole(formulas(variant, d.site)) for variant in (d.site.computes, d.variant))
    form, rounds = (d.site.form, d.form), d.projections and (d.projections, d.site.projections.names)
    return _template(d.site), shape(d.site), computes, becomes, d.rule, d.outcome, d.target, form, refusals, d.site.notes, rounds


def _template(site: Site) -> str:
    """A site's name with a hole where the number of its layer stands."""
    if site.layer is None:
        return site.name
    return re.sub(rf"(^|\.){site.layer}(?=\.|$)", r"\g<1>{}", site.name, count=1)


def ranges(numbers: Sequence[int]) -> str:
    """`0-4, 6-10`; a longer row of equal steps as `0, 2 … 30`."""
    steps = {b - a for a, b in pairwise(numbers)}
    if len(numbers) > 3 and len(steps) == 1 and steps != {1}:
        return f"{numbers[0]}, {numbers[1]} … {numbers[-1]}"
    return ", ".join(_runs(numbers))


def _runs(numbers: Sequence[int]) -> Iterator[str]:
    start = 0
    for at in range(1, len(numbers) + 1):
        if at == len(numbers) or numbers[at] != numbers[at - 1] + 1:
            yield str(numbers[start]) if at - start == 1 else f"{numbers[start]}-{numbers[at - 1]}"
            start = at


def _outcome(decision: Decision) -> str:
    by = "" if decision.rule == "no rule" else f", by {decision.rule}"
    match decision.outcome:
        case "refused":
            return f"kept as written, {decision.rule} is refused"
        case "kept":
            return f"kept as written{by}"
    return f"{decision.outcome}{by}"


def _formula(term: str, found: Sequence[Formula]) -> Iterator[Row]:
    """A formula under its term, its parts below it."""
    for one in found:
        heads = f"heads {one.heads}: " if one.heads else ""
        yield Row(term, heads + one.says)
        term = ""
        width = max((len(part.name) for part in one.parts), default=0)
        yield from (Row("", part.says, f"{part.name:{width}}  ") for part in one.parts)


def _runs_as(decision: Decision) -> str:
    if decision.target is None:
        return decision.form
    return f"{decision.form} (was: {decision.site.form})" if decision.form != decision.site.form else decision.form


def _costs(cost: Costs) -> str:
    work = change(cost.before.flops, cost.after.flops, "FLOP")
    traffic = change(cost.before.bytes, cost.after.bytes, "B")
    return f"{work}, {traffic} of memory traffic, {_part(cost.density_after)}"


def _part(density: float) -> str:
    if not density:
        return "no map"
    return f"{density:.1%} of the map" if density < 1 else "the whole map"


def _caches(caches: Caches, tokens: int) -> str:
    own, decided = (_holding(holding, tokens) for holding in (caches.own, caches.decided))
    return f"transformers' own holds {own}" + (f"; attn.cache {decided}" if decided != own else "; attn.cache the same")


def _holding(holding: Holding, tokens: int) -> str:
    """What is held, and in how much memory: of a row."""
    if holding.most is None:
        return f"{si(holding.token)}B a token, {si(holding.token * tokens)}B at {tokens}"
    return f"{si(holding.most)}B at most: {holding}"


def change(before: float, after: float, unit: str) -> str:
    """`17.2 GFLOP → 9.13 GFLOP`, or the amount that stays."""
    was, becomes = f"{si(before)}{unit}", f"{si(after)}{unit}"
    return was if was == becomes else f"{was} → {becomes}"


def shape(site: Site) -> str:
    """What kind of attention it is, and how large."""
    heads = f"{site.heads} heads" if site.heads == site.kv_heads else f"{site.heads} heads ({site.kv_heads} kv)"
    dims = f"{site.head_dim}" if site.head_dim == site.value_dim else f"{site.head_dim}/{site.value_dim}"
    return f"{site.kind.value}, {site.phase.value} · {heads} of {dims} · {site.q_len} queries × {site.k_len} keys · {site.dtype}"


def costs(decision: Decision) -> Costs:
    """What the model's own code costs, and what the decision does."""
    site = decision.site
    before, density_before = _cost(site, site.computes, site.form)
    after, density_after = _cost(site, decision.variant, decision.form)
    return Costs(before, after, density_before, density_after)


def _cost(site: Site, variant: Variant, form: str) -> tuple[Cost, float]:
    """Of a variant, and the part of all pairs that it computes."""
    if not variant.context:
        return _cost_of_tokens(site, variant, form)
    met, around = site, Cost(0, 0)
    for one in variant.context:
        found = merged(one, met) if isinstance(one, Merge) else pooled(one, met)
        met, around = found.site, around + found.cost
    cost, density = _cost_of_tokens(met, variant, form)
    return cost + around, density * met.q_hint * met.k_hint / (site.q_hint * site.k_hint)


def _cost_of_tokens(site: Site, variant: Variant, form: str) -> tuple[Cost, float]:
    if form.endswith(SUMMING):
        features = variant.feature.width(site.head_dim)
        return summed(site.q_hint, site.k_hint, site.heads, features, site.head_dim, site.value_dim, site.dtype), 0.0
    visited = visits(site, variant)
    saved = visited.cost(site.heads, site.head_dim, site.value_dim, site.dtype)
    cost, density = (saved.scheduled, visited.density) if form.startswith(SKIPPING) else (saved.dense, 1.0)
    if any(part.normalizer.ridge is not None for part in variant.parts()):
        solving = solved(round(density * site.q_hint * site.k_hint), site.q_hint, site.heads, site.head_dim)
        cost = replace(cost, flops=cost.flops + solving)
    return cost, density


def visits(site: Site, variant: Variant) -> Schedule:
    """The schedule of a variant at a site; equal ones of different layers are worked out once."""
    masks = (variant.mask, *(group.mask for _, group in variant.groups))
    place = (site.layer or 0, site.layers or 1) if any(mask.mentions(layer, layers) for mask in masks) else (0, 1)
    position = site.frame.position if site.frame else None
    return _schedule(variant, (site.q_hint, site.k_hint), (site.heads, site.kv_heads), place, position)


@lru_cache(maxsize=256)
def _schedule(
    variant: Variant, lengths: tuple[int, int], heads: tuple[int, int], place: tuple[int, int], position: Expr | None
) -> Schedule:
    return schedule(
        variant, *lengths, heads=heads[0], kv_heads=heads[1], layer=place[0], layers=max(place[1], 1), position=position
    )


def si(amount: float) -> str:
    """An amount with the prefix of its size."""
    for unit in ("", "k", "M", "G", "T"):
        if amount < 1000:
            return f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:.3g} P"
