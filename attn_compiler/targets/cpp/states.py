"""The kernel of linear attention: which variants it is for, and its source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from attn_compiler.algebra import expr as e
from attn_compiler.algebra import feature as f
from attn_compiler.algebra.expr import Expr, const
from attn_compiler.algebra.feature import Block
from attn_compiler.algebra.variant import Normalizer, Variant, passed_over
from attn_compiler.targets.cpp.printer import LEAVES, Leaves, Level
from attn_compiler.targets.cpp.source import assembled, printer_of
from attn_compiler.targets.cpp.spec import Spec
from attn_compiler.targets.fading import Fading
from attn_compiler.targets.linear import Linear, linear
from attn_compiler.targets.operands import PLACE

# No token is at work alone: what is left are parts of the task, and what a function is given.
_LEAVES: Leaves = {
    **{leaf: reached for leaf, reached in LEAVES.items() if reached[1] is Level.TASK},
    f.x: ("x", Level.LANE),
    e.mass: ("mass", Level.LANE),
}
_TOKENS = (e.i, e.q, e.k, PLACE)


FEW = 8  # tokens at work together where rows or columns of a state fade apart: a multiple of all `ROWS`


def serves(variant: Variant) -> Linear | None:
    """What makes a variant linear, if this kernel gives its output: the sums that it finds are all that is asked of it."""
    found = linear(variant)
    if found is None or variant.groups or variant.dropout or passed_over(variant, ("feature", "gates")):
        return None
    factor = Spec(variant, 1, 1, "float32", ()).factor
    known = factor is not None and not factor.mentions(e.peak, *_TOKENS) and not variant.scale.mentions(*_TOKENS)
    return found if known else None


def inlined(variant: Variant) -> bool:
    """Whether the kernel applies the feature map itself: one that knows nothing but a component."""
    return all(len(side) < 2 and all(map(_by_component, side)) for side in (variant.feature.of_q, variant.feature.of_k))


def _by_component(block: Block) -> bool:
    plain = block.power == 1 and block.weights is None and not block.softmax
    return plain and block.each.symbols() <= {f.x, e.dim} and not block.each.tables()


def stated(variant: Variant) -> Variant:
    """What the source says of a variant: which keys exist and what is left of them, the kernel is told with a call."""
    return replace(variant, mask=e.true, score=e.score, gates=None)


# The sums themselves: features are made before, and what divides comes after.
GATHERED = Variant(scale=const(1.0), normalizer=Normalizer("gathered", weight=e.score, output=e.acc))


@lru_cache(maxsize=256)
def states(spec: Spec, fading: Fading = Fading.TOGETHER) -> str:
    """The source for the spec of such a variant."""
    printer = printer_of(spec, _LEAVES)
    assert spec.factor is not None
    holes = {
        "feature of a query": printer.function(_of_one(spec.variant.feature.of_q)),
        "feature of a key": printer.function(_of_one(spec.variant.feature.of_k)),
        "scale": printer.function(spec.variant.scale),
        "factor": printer.function(spec.factor),
    }
    if fading is Fading.TOGETHER:
        return assembled(spec, printer, holes, _skeletons("fading_together.h"), "TILE")
    columns = f"constexpr bool COLUMNS = {str(fading is Fading.COLUMNS).lower()};  // what fades by logs of its own; else rows do"
    return assembled(spec, printer, holes, _skeletons("fading_apart.h"), FEW, columns)


def _skeletons(how: str) -> tuple[str, ...]:
    return "rows.h", "tiles.h", "states.h", how, "states.cpp"


def _of_one(blocks: Sequence[Block]) -> Expr:
    return blocks[0].each if blocks else f.x
