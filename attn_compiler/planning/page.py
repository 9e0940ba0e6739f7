"""A report as a page of its own: no scripts, nothing loaded from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from attn_compiler.planning.findings import Finding, Row, visits
from attn_compiler.planning.plan import Plan

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2733; --soft: #67727e; --paper: #faf8f4; --card: #fff; --line: #e4dfd5;
  --full: #1f4e79; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e6e1; --soft: #9aa4ae; --paper: #15191e; --card: #1d2329; --line: #303840; --full: #7fb2e0; } }
body { font: 15px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 60rem; margin: 3rem auto;
  padding: 0 1.2rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font: 600 1rem ui-monospace, monospace; margin: 0; overflow-wrap: anywhere; }
.soft, dt { color: var(--soft); } article { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 1rem 1.3rem; margin: 1rem 0; }
dl { display: grid; grid-template-columns: 6.5rem 1fr; gap: .25rem .8rem; margin: .7rem 0 0; }
dd { margin: 0; overflow-wrap: anywhere; }
.math { font-family: ui-monospace, monospace; white-space: pre-wrap; }
.map { font: 7px/1 ui-monospace, monospace; color: var(--full); margin: .8rem 0 0; }
.tag { float: right; border-radius: 99px; padding: 0 .7rem; font-size: .85rem; color: #fff; background: #3b7d4f; }
.approximate { background: #b5651d; } .kept { background: #67727e; } .tag.refused { background: #b5402d; }
dd.refused, p.refused { color: #b5402d; }
"""


def page(title: str, because: str, found: tuple[Finding, ...], plan: Plan) -> str:
    """The whole page."""
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
            f"<title>attn-compiler</title><style>{_STYLE}</style>\n<h1>Attentions of this model</h1>",
            f'<p class="soft">{escape(title)}{f"<br>{escape(because)}" if because else ""}</p>',
            *(f'<p class="refused">warning: {escape(warning)}</p>' for warning in plan.warnings),
            *(_card(finding, plan.uses.because(finding.first.rule)) for finding in found),
            *_near_misses(plan),
            "</html>\n",
        ]
    )


def _card(finding: Finding, because: str) -> str:
    first = finding.first
    count = f' <span class="soft">({len(finding.decisions)} alike)</span>' if len(finding.decisions) > 1 else ""
    rows = "".join(map(_row, finding.rows(because)))
    visited = visits(first.site, first.variant)
    picture = f'<pre class="map">{visited.text(96)}</pre>' if 0 < visited.density < 1 else ""
    return (
        f'<article><span class="tag {first.outcome}">{finding.outcome}</span><h2>{escape(finding.name)}{count}</h2>'
        f"<dl>{rows}</dl>{picture}</article>"
    )


def _row(row: Row) -> str:
    style = "refused" if row.term == "refused" else "math" if row.term in ("computes", "becomes", "") else ""
    return f'<dt>{row.term}</dt><dd class="{style}">{escape(row.name + row.says)}</dd>'


def _near_misses(plan: Plan) -> Iterator[str]:
    if plan.near_misses:
        texts = [f"{miss.name or '(no module)'}: {miss.anchor}: {miss.reason}" for miss in plan.near_misses]
        misses = "".join(f"<li>{escape(text)}</li>" for text in texts)
        yield f"<article><h2>Left alone: what looked like an attention, and did not match</h2><ul>{misses}</ul></article>"
