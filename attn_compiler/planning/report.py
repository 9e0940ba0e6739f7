"""What was found, decided and refused, for people (text, HTML) and for programs (JSON)."""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

from attn_compiler.planning.findings import Row, costs, findings
from attn_compiler.planning.formula import formulas, whole
from attn_compiler.planning.kept import Holding
from attn_compiler.planning.page import page
from attn_compiler.planning.plan import Decision, NearMiss, Outcome, Plan, Refusal
from attn_compiler.planning.policy import Policy
from attn_compiler.planning.site import Site
from attn_compiler.whole_file import whole_file

JSON_VERSION = 1
WIDTH = 100
INDENT = 12  # of what stands beside a term
MOST_LINES = 8  # of one formula


_SAYS: Mapping[Outcome, str] = {"kept": "kept as written"}


@dataclass(frozen=True)
class Report:
    """The plan of a whole model, ready to be read."""

    plan: Plan
    policy: str = "exact"
    graphs: int = 1
    because: str = ""
    digest: str = ""

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
        """All of it as JSON; `version` tells the shape of the document, docs/report.md what it holds."""
        document = {
            "version": JSON_VERSION,
            "policy": self.policy,
            "digest": self.digest,
            "because": self.because,
            "graphs": self.graphs,
            "rules": [{"rule": r.title, "because": r.because, "decides": r.decided} for r in self.plan.uses.rules],
            "sites": [_record(d) for d in self.plan.decisions],
            "near_misses": [vars(miss) for miss in self.plan.near_misses],
            "warnings": list(self.plan.warnings),
        }
        return json.dumps(document, indent=2, ensure_ascii=False)

    def to_html(self, path: str | Path) -> None:
        """Write a page of its own: whole, or not at all."""
        with whole_file(Path(path)) as file:
            file.write_text(page(self.title, self.because, findings(self.plan.decisions), self.plan), encoding="utf-8")

    @property
    def title(self) -> str:
        """The policy, and what became of how many attentions."""
        counted = Counter(decision.outcome for decision in self.plan.decisions)
        found = f"{_count(len(self.plan.decisions), 'attention')} in {_count(self.graphs, 'graph')}"
        became = ", ".join(f"{counted[one]} {_SAYS.get(one, one)}" for one in get_args(Outcome) if counted[one])
        return f"policy {self.policy} · {found}" + (f": {became}" if became else "")

    def _lines(self) -> Iterator[str]:
        yield self.title
        if self.because:
            yield _wrapped(Row("because", self.because))
        for finding in findings(self.plan.decisions):
            yield ""
            yield finding.title
            yield from map(_wrapped, finding.rows(self.plan.uses.because(finding.first.rule)))
        yield from _near_misses(self.plan.near_misses)
        for warning in self.plan.warnings:
            yield "\n" + textwrap.fill(f"warning: {warning}", WIDTH, subsequent_indent="  ")


def report_of(plan: Plan, policy: Policy, graphs: int = 1) -> Report:
    """The report of a plan that was made by a policy."""
    return Report(plan, policy.name, graphs, policy.because.strip(), policy.digest)


def _near_misses(misses: Sequence[NearMiss]) -> Iterator[str]:
    if misses:
        yield "\nleft alone: what looked like an attention, and did not match"
    for miss in misses:
        says = f"{miss.name or '(no module)'}: {miss.anchor}: {miss.reason}"
        yield textwrap.fill(says, WIDTH, initial_indent="  ", subsequent_indent="    ", break_long_words=False)


def _wrapped(row: Row) -> str:
    """A row in lines that fit a terminal, those after the first below the beginning of what is said."""
    first = f"  {row.term:{INDENT - 2}}{row.name}"
    text = textwrap.TextWrapper(WIDTH, initial_indent=first, subsequent_indent=" " * len(first), break_long_words=False)
    text.max_lines, text.placeholder = MOST_LINES, " … (all of it in the JSON)"
    return text.fill(row.says)


def _record(decision: Decision) -> dict[str, object]:
    site, found = decision.site, formulas(decision.site.computes, decision.site)
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
        "computes": whole(found),
        "parts": [{"name": part.name, "says": part.says} for one in found for part in one.parts],
        "tables": sorted(site.computes.tables()),
        "rule": decision.rule,
        "outcome": decision.outcome,
        "becomes": whole(formulas(decision.variant, site)) if decision.target else None,
        "target": decision.target,
        "form": decision.form,
        "projections": decision.projections and {"names": list(site.projections.names), "held": str(decision.projections)},
        "notes": list(site.notes),
        "costs": asdict(costs(decision)),
        "caches": decision.caches and {"own": _holding(decision.caches.own), "decided": _holding(decision.caches.decided)},
        "error": decision.error,
        "refusals": [{"by": r.by, "reason": r.reason} for r in decision.refusals],
    }


def _holding(holding: Holding) -> dict[str, object]:
    return {
        "holds": str(holding),
        "token": holding.token,
        "most": holding.most,
    }


def _count(n: int, word: str) -> str:
    return f"{n} {word}{'' if n == 1 else 's'}"
