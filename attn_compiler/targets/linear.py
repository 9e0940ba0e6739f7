"""Which variants are linear: their weights are products of features, so that keys may be summed up before a query meets them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.bounds import Interval, Occupancy, distance, occupancy
from attn_compiler.algebra.expr import Expr, either, every, symbol
from attn_compiler.algebra.linear import linear as sum_of
from attn_compiler.algebra.simplify import conjuncts, disjuncts
from attn_compiler.algebra.variant import EmptyRows, Variant
from attn_compiler.targets.operands import PLACE

NEAR = 64  # tokens that meet each other directly, where the others are summed up
_BEHIND = symbol("behind", e.Sort.INDEX)


@dataclass(frozen=True)
class Linear:
    """What a query and a key say by themselves of the weight between them, besides the product of their features.

    A query sees keys that stand at least `behind` it (None: all of them) and that are `shown`. `fades`, an expression over the
    key, is the running log of a decay: a weight is multiplied with exp(fades at the query - fades at the key), or each of its
    terms is, where that follows from the `component` of the features as well.
    """

    behind: int | None
    shown: Expr
    fades: Expr | None


def linear(variant: Variant) -> Linear | None:
    """What makes a variant without groups and branches linear; None where it is not."""
    return _linear(variant) if variant.normalizer.weight == e.score else None  # most calls of attention stop here


@lru_cache(maxsize=256)
def _linear(variant: Variant) -> Linear | None:
    if any(one.how == "extra" for one in variant.context):  # which all queries see, wherever they stand
        return None
    if variant.storage.pv or variant.empty_rows is not EmptyRows.ZERO:
        return None
    if variant.scale.mentions(e.k, PLACE, e.dot, e.q_norm, e.k_norm):
        return None
    parts = conjuncts(variant.mask)
    shown = every(*(part for part in parts if not part.mentions(e.q, e.i)))
    between = every(*(part for part in parts if part.mentions(e.q, e.i)))
    behind = None if between == e.true else _behind(between)
    faded = variant.score != e.score or variant.gates is not None
    fades = variant.gates if variant.score == e.score else _fades(variant.score) if variant.gates is None else None
    if (between != e.true and behind is None) or (faded and (fades is None or behind is None)):
        return None
    if fades is not None and behind is not None and behind < 0:
        return None
    return Linear(behind, shown, fades)


def _behind(mask: Expr) -> int | None:
    """n where a mask shows exactly the keys k <= q - n."""
    parts = conjuncts(mask)
    possible = (either(*(way for way in disjuncts(part) if not distance(mask & way).is_empty)) for part in parts)
    mask = every(*possible)  # `causal & ~window(n)` hides what a window's other side would show
    nearest, farthest = distance(mask)
    if not math.isfinite(nearest) or farthest != math.inf or mask.mentions(e.i):
        return None
    n = math.ceil(nearest)
    farther = mask.substitute({e.k: e.q - n - _BEHIND})
    return n if occupancy(farther, {_BEHIND: Interval(0, math.inf)}) is Occupancy.FULL else None


def _fades(score: Expr) -> Expr | None:
    """The running log where a score is multiplied with exp(-slope * |q - k|), or exp(min(log at q - log at k, 0))."""
    if score.op != "mul" or score.args[0] != e.score or score.args[1].op != "exp":
        return None
    exponent = score.args[1].args[0]
    if exponent.op == "mul" and _is_distance(exponent.args[1]) and not exponent.args[0].mentions(e.q, e.k, e.i, PLACE):
        return exponent.args[0] * e.real(e.k)
    if exponent.op == "min" and exponent.args[1] == e.const(0.0) and exponent.args[0].op == "sub":
        at_query, at_key = exponent.args[0].args
        if at_key.substitute({e.k: e.q}) == at_query and not at_key.mentions(e.q, e.i):
            return at_key
    return None


def _is_distance(x: Expr) -> bool:
    """Whether it is |q - k| as a real number."""
    if x.op != "real" or x.args[0].op != "abs":
        return False
    inner = sum_of(x.args[0].args[0])
    return inner.constant == 0 and dict(inner.factors) == {e.q: 1, e.k: -1}
