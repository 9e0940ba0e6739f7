"""Which body an exported attention gets: what suits its mask, and what is fastest at its lengths."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from attn_compiler.algebra.variant import Variant
from attn_compiler.errors import ExportError, did_you_mean
from attn_compiler.targets.reach import Sides, sides

FORMS: Mapping[str, str] = {
    "dense": "standard operators over all keys",
    "scan": "a scan over blocks of queries, each with the keys in reach",
}
SHORTEST = 512  # queries below which a loop costs more than it saves


@dataclass(frozen=True)
class Lengths:
    """What is known of the lengths when exporting: the likely ones where they change from call to call."""

    queries: int
    keys: int
    follow: bool  # whether the queries' positions follow each other


def choose(variant: Variant, lengths: Lengths, wanted: str) -> str:
    """The name of a body; `wanted` is one of them, or `auto`."""
    if wanted not in ("auto", *FORMS):
        raise ExportError(f'there is no strategy "{wanted}"{did_you_mean(wanted, ("auto", *FORMS))}')
    if wanted != "auto":
        return wanted if wanted == "dense" or suits(variant, lengths) else "dense"
    return "scan" if suits(variant, lengths) and _pays(variant, lengths) else "dense"


def suits(variant: Variant, lengths: Lengths) -> bool:
    """Whether some keys are out of reach for some blocks of queries."""
    return lengths.follow and any(sides(part.mask).bounded for part in variant.parts())


def _pays(variant: Variant, lengths: Lengths) -> bool:
    widest = max(_width(sides(part.mask), lengths) for part in variant.parts())
    return lengths.queries >= SHORTEST and 2 * widest <= lengths.keys * 1.5


def _width(reach: Sides, lengths: Lengths) -> float:
    """How many keys a query meets on average."""
    closed = [side for side in (reach.farthest, -reach.nearest) if math.isfinite(side)]
    width = sum(closed) + (2 - len(closed)) * lengths.keys / 2
    return min(lengths.keys, reach.prefix + width)
