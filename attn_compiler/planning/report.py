"""What was found, decided and refused, for people (text, HTML) and for programs (JSON)."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from attn_compiler.planning.findings import Finding, costs, findings, meaning, shape, si
from attn_compiler.planning.page import page
from attn_compiler.planning.plan import Decision, NearMiss, Plan, Refusal
from attn_compiler.planning.site import Site

JSON_VERSION = 1
WIDTH = 100


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
        """Write a page of its own: whole, or not at all."""
        path = Path(path)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            unfinished.write_text(page(self._title(), findings(self.plan.decisions), self.plan), encoding="utf-8")
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)

    def _title(self) -> str:
        rewritten = sum(d.target is not None for d in self.plan.decisions)
        found = len(self.plan.decisions)
        return (
            f"policy {self.policy} · {_count(found, 'attention')} in {_count(self.graphs, 'graph')} · "
            f"{rewritten} rewritten, {found - rewritten} left as written"
        )

    def _lines(self) -> Iterator[str]:
        yield self._title()
        for finding in findings(self.plan.decisions):
            yield ""
            yield from _paragraph(finding)
        if self.plan.near_misses:
            yield f"\nlooked like an attention, but {_count(len(self.plan.near_misses), 'anchor')} did not match"
            for miss in self.plan.near_misses:
                yield _wrapped("", f"{miss.name or '(no module)'}: {miss.anchor}: {miss.reason}")
        for warning in self.plan.warnings:
            yield "\n" + textwrap.fill(f"warning: {warning}", WIDTH, subsequent_indent="  ")


def _paragraph(finding: Finding) -> Iterator[str]:
    first, count = finding.first, len(finding.decisions)
    yield finding.name + (f" ({count} alike)" if count > 1 else "")
    computes, becomes = meaning(first.site.computes), meaning(first.variant)
    frame = first.site.frame.because if first.site.frame else "unknown"
    yield _wrapped("is", shape(first.site))
    yield _wrapped("positions", frame)
    yield _wrapped("computes", computes)
    if becomes != computes:
        yield _wrapped("becomes", becomes)
    yield _wrapped("decided", _decided(first))
    yield _wrapped("runs", f"{first.target}: {first.form}" if first.target else "its original code")
    yield _wrapped("costs", _costs(first))
    yield from (_wrapped("refused", f"{refusal.by}: {refusal.reason}") for refusal in first.refusals)
    yield from (_wrapped("note", note) for note in first.site.notes)


def _decided(decision: Decision) -> str:
    if decision.target is None and decision.refusals:
        return f"left as written: {decision.rule} was refused" if decision.rule != "no rule" else "left as written"
    return f"{'exact' if decision.exact else 'approximate'}, by {decision.rule}"


def _wrapped(term: str, said: str) -> str:
    """A term and what is said of it, in lines that fit a terminal."""
    indent = " " * (12 if term else 4)
    first = f"  {term:10}" if term else "  "
    return textwrap.fill(said, WIDTH, initial_indent=first, subsequent_indent=indent, break_long_words=False)


def _costs(decision: Decision) -> str:
    cost = costs(decision)
    return (
        f"{cost.density_before:.1%} → {cost.density_after:.1%} of the map, "
        f"{si(cost.before.flops)}FLOP → {si(cost.after.flops)}FLOP, "
        f"{si(cost.before.bytes)}B → {si(cost.after.bytes)}B of memory traffic"
    )


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
        "notes": list(site.notes),
        "costs": asdict(costs(decision)),
        "refusals": [{"by": r.by, "reason": r.reason} for r in decision.refusals],
    }


def _count(n: int, word: str) -> str:
    return f"{n} {word}{'' if n == 1 else 's'}"
