"""What was found, decided and refused, for people (text, HTML) and for programs (JSON)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from html import escape
from itertools import groupby
from pathlib import Path

from attn_compiler.algebra.notation import notation
from attn_compiler.algebra.variant import EmptyRows, Variant
from attn_compiler.planning.cost import Cost
from attn_compiler.planning.plan import Decision, NearMiss, Plan, Refusal
from attn_compiler.planning.schedule import schedule
from attn_compiler.planning.site import Site

JSON_VERSION = 1


@dataclass(frozen=True)
class Report:
    """The plan of a whole model, ready to be read."""

    plan: Plan
    policy: str = "exact"
    graphs: int = 1

    @property
    def decisions(self) -> tuple[Decision, ...]:
        return self.plan.decisions

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(decision.site for decision in self.plan.decisions)

    @property
    def refusals(self) -> tuple[tuple[str, Refusal], ...]:
        """Every refusal with the name of its site."""
        return tuple((d.site.name, refusal) for d in self.plan.decisions for refusal in d.refusals)

    @property
    def near_misses(self) -> tuple[NearMiss, ...]:
        return self.plan.near_misses

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def to_json(self) -> str:
        """All of it as JSON; `version` tells the shape of the document."""
        document = {
            "version": JSON_VERSION,
            "policy": self.policy,
            "graphs": self.graphs,
            "sites": [_record(d) for d in self.plan.decisions],
            "near_misses": [vars(miss) for miss in self.plan.near_misses],
            "warnings": list(self.plan.warnings),
        }
        return json.dumps(document, indent=2, ensure_ascii=False)

    def to_html(self, path: str | Path) -> None:
        """Write the text as a page of its own."""
        page = f"<!doctype html><meta charset=utf-8><title>attn-compiler</title><pre>{escape(str(self))}</pre>\n"
        Path(path).write_text(page, encoding="utf-8")

    def _lines(self) -> Iterator[str]:
        rewritten = sum(d.target is not None for d in self.plan.decisions)
        found = len(self.plan.decisions)
        yield (
            f"policy {self.policy} · {_count(found, 'attention')} in {_count(self.graphs, 'graph')} · "
            f"{rewritten} rewritten, {found - rewritten} left as written"
        )
        for alike, group in groupby(self.plan.decisions, _what_is_done):
            yield ""
            yield from _paragraph(list(group), alike)
        if self.plan.near_misses:
            yield f"\nlooked like an attention, but {_count(len(self.plan.near_misses), 'anchor')} did not match"
            yield from (f"  {miss.name or '(no module)'}: {miss.anchor}: {miss.reason}" for miss in self.plan.near_misses)
        for warning in self.plan.warnings:
            yield f"\nwarning: {warning}"


def meaning(variant: Variant) -> str:
    """A variant as mathematics, in one line."""
    if variant.groups:
        return "; ".join(f"heads {heads}: {meaning(group)}" for heads, group in variant.groups)
    parts = [f"{variant.normalizer.name}( {notation(variant.score)} )", f"score = q·k × {notation(variant.scale)}"]
    if variant.mask.value is not True:
        parts.append(f"where {notation(variant.mask)}")
    if variant.empty_rows is not EmptyRows.ZERO:
        parts.append(f"a row that sees nothing: {variant.empty_rows.value}")
    if variant.dropout:
        parts.append(f"dropout {variant.dropout:g}")
    return ", ".join(parts)


def _what_is_done(decision: Decision) -> tuple[str, ...]:
    site = decision.site
    return (
        _shape(site),
        meaning(site.computes),
        meaning(decision.variant),
        decision.rule,
        f"{decision.target or ''} {decision.form}",
        *(f"{r.by}: {r.reason}" for r in decision.refusals),
    )


def _paragraph(group: list[Decision], alike: tuple[str, ...]) -> Iterator[str]:
    first = group[0]
    names = [d.site.name or "(no module)" for d in group]
    yield names[0] if len(names) == 1 else f"{names[0]} … {names[-1]} ({len(names)} alike)"
    shape, computes, becomes, rule, _, *refusals = alike
    yield f"  {shape}"
    yield f"  computes  {computes}"
    if becomes != computes:
        yield f"  becomes   {becomes}"
    yield f"  decided   {'exact' if first.exact else 'approximate'}, by {rule}"
    yield f"  runs      {f'{first.target}: {first.form}' if first.target else 'its original code'}"
    yield f"  costs     {_costs(first)}"
    yield from (f"  refused   {refusal}" for refusal in refusals)


def _shape(site: Site) -> str:
    heads = f"{site.heads} heads" if site.heads == site.kv_heads else f"{site.heads} heads ({site.kv_heads} kv)"
    dims = f"{site.head_dim}" if site.head_dim == site.value_dim else f"{site.head_dim}/{site.value_dim}"
    frame = site.frame.because if site.frame else "unknown"
    return (
        f"{site.kind.value} · {site.phase.value} · {heads} of {dims} · "
        f"{site.q_len} queries × {site.k_len} keys · {site.dtype} · positions: {frame}"
    )


def _costs(decision: Decision) -> str:
    before, after = costs(decision)
    return f"{_si(before.flops)}FLOP → {_si(after.flops)}FLOP, {_si(before.bytes)}B → {_si(after.bytes)}B of memory traffic"


def costs(decision: Decision) -> tuple[Cost, Cost]:
    """What the model's own code costs, and what the decision does, at the likely lengths."""
    site = decision.site
    planned = schedule(decision.variant, site.q_hint, site.k_hint, heads=site.heads, kv_heads=site.kv_heads)
    saved = planned.cost(site.heads, site.head_dim, site.value_dim, site.dtype)
    return saved.dense, saved.scheduled if decision.form.startswith("blocks") else saved.dense


def _record(decision: Decision) -> dict[str, object]:
    site = decision.site
    return {
        "name": site.name,
        "layer": site.layer,
        "kind": site.kind.value,
        "phase": site.phase.value,
        "idiom": site.idiom,
        "where": site.where,
        "heads": site.heads,
        "kv_heads": site.kv_heads,
        "q_len": site.q_len,
        "k_len": site.k_len,
        "head_dim": site.head_dim,
        "value_dim": site.value_dim,
        "dtype": site.dtype,
        "frame": site.frame and site.frame.because,
        "computes": meaning(site.computes),
        "becomes": meaning(decision.variant),
        "tables": sorted(site.computes.tables()),
        "rule": decision.rule,
        "exact": decision.exact,
        "target": decision.target,
        "form": decision.form,
        "costs": dict(zip(("before", "after"), (asdict(cost) for cost in costs(decision)), strict=True)),
        "refusals": [{"by": r.by, "reason": r.reason} for r in decision.refusals],
    }


def _count(n: int, word: str) -> str:
    return f"{n} {word}{'' if n == 1 else 's'}"


def _si(amount: float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if amount < 1000:
            return f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:.3g} P"
