"""The backward kernels of a spec: the same expressions and their derivatives, seen from the queries and from the keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.derivative import derivative
from attn_compiler.algebra.expr import Expr, Sort, const
from attn_compiler.algebra.storage import PLAIN
from attn_compiler.algebra.variant import Variant
from attn_compiler.errors import AlgebraError
from attn_compiler.targets.cpp import dropout
from attn_compiler.targets.cpp.printer import KEYS_IN_LANES, LEAVES, Leaves, Level, Printer
from attn_compiler.targets.cpp.source import assembled, chunk, printer_of, unit_of
from attn_compiler.targets.cpp.spec import FIRST_KEY, Spec
from attn_compiler.targets.operands import PLACE

_ZERO = const(0.0)

# Of a pair: the gradients of its weight and score. Of a query: its output times the gradient of that, that of its log-sum-exp.
OF_WEIGHT, OF_SCORE, ALONG, OF_TOTAL = (e.symbol(name, Sort.REAL) for name in ("of_weight", "of_score", "along", "of_total"))
_NUMBERS: Leaves = {
    OF_WEIGHT: ("of_weight", Level.PAIR),
    OF_SCORE: ("of_score", Level.PAIR),
    ALONG: ("along", Level.LANE),
    OF_TOTAL: ("of_total", Level.LANE),
}
_BY_QUERY: Leaves = {**LEAVES, **_NUMBERS}
_BY_KEY: Leaves = {**KEYS_IN_LANES, **_NUMBERS}


@dataclass(frozen=True)
class Slopes:
    """What the gradients of a spec are made of."""

    spec: Spec

    @property
    def weight(self) -> Expr:
        """d weight / d score, where weights do not follow the peak: those that do are their own."""
        return _ZERO if self.spec.by_peak else derivative(self.spec.variant.normalizer.weight, e.score)

    def score(self, leaf: Expr) -> Expr:
        """d score / d dot, or a norm."""
        return derivative(self.spec.score, leaf)

    def of_pair(self, read: Expr) -> Expr:
        """What a pair adds to the gradient of a table where it is read."""
        by_score, by_weight = (derivative(x, read) for x in (self.spec.score, self._weight))
        return _sum(*(_ZERO if x == _ZERO else s * x for s, x in ((OF_SCORE, by_score), (OF_WEIGHT, by_weight))))

    def reads(self, *wanted: str) -> tuple[Expr, ...]:
        """Where tables are read that may want gradients."""
        normalizer = self.spec.variant.normalizer
        roots = (self.spec.score, normalizer.weight, normalizer.output, normalizer.total)
        found = (node for root in roots if root is not None for node in root.walk())
        return tuple(dict.fromkeys(x for x in found if x.op == "table" and x.sort is Sort.REAL and x.value in wanted))

    @property
    def _weight(self) -> Expr:
        return _ZERO if self.spec.by_peak else self.spec.variant.normalizer.weight

    def through_factor(self, leaf: Expr) -> Expr:
        """`along` · d log factor / d leaf; nothing for an output that has no share in it, whatever the factor is."""
        output = self.spec.variant.normalizer.output
        changed = _ZERO if output == e.acc else derivative(output.args[1], leaf)
        if changed == _ZERO:
            return _ZERO
        slope = changed / output.args[1]
        return e.where(e.same(ALONG, 0.0), 0.0, ALONG * (-slope if output.op == "div" else slope))

    def through_total(self, leaf: Expr) -> Expr:
        """`of_total` · d log-sum-exp / d leaf. The peak has no share: where it is another one, so is the mass."""
        total = self.spec.variant.normalizer.total
        changed = _ZERO if total is None else derivative(total, leaf)
        if total is None or changed == _ZERO:
            return _ZERO
        return e.where(e.same(OF_TOTAL, 0.0), 0.0, OF_TOTAL * (changed / total))

    def of_query(self, leaf: Expr) -> Expr:
        """What a query adds to the gradient of its mass, or of a table where it is read."""
        return _sum(self.through_factor(leaf), self.through_total(leaf))


def _sum(left: Expr, right: Expr) -> Expr:
    return right if left == _ZERO else left if right == _ZERO else left + right


def refuse(variant: Variant) -> str | None:
    """Why there are no gradients of a variant that has a forward kernel; None if there are."""
    if variant.storage != PLAIN:
        return "its kernels have no gradients through what is rounded"
    try:
        for _ in _needed(Slopes(Spec(variant, 1, 1, "float32", ()))):
            pass
    except AlgebraError as failure:
        return f"its gradients are unknown: {failure}"
    return None


def is_owned(spec: Spec, name: str, shape: Sequence[int], *, heads: int, kv_heads: int, k_len: int, first_key: int) -> bool:
    """Whether each number of a table belongs to one key of one head: then no two tasks add to the same one."""
    slopes = Slopes(spec)
    reads = slopes.reads(name)
    if len(reads) != 1 or slopes.of_query(reads[0]) != _ZERO:
        return False
    size = dict(zip(reads[0].args, shape, strict=True))
    by_key = size.get(PLACE if first_key else PLACE + FIRST_KEY, 0), size.get(PLACE, 0)
    return max(by_key) >= k_len and (kv_heads == 1 or size.get(e.h, 0) >= heads)


def _needed(slopes: Slopes) -> Iterator[Expr]:
    yield slopes.weight
    yield slopes.of_query(e.mass)
    yield from (slopes.score(leaf) for leaf in (e.dot, e.q_norm, e.k_norm))
    for read in slopes.reads(*slopes.spec.variant.tables()):
        yield slopes.of_pair(read)
        yield slopes.of_query(read)


@lru_cache(maxsize=256)
def by_query(spec: Spec, wanted: tuple[str, ...]) -> str:
    """The kernel that finds the gradients of q and of the tables in the factor that want one."""
    return _source(spec, wanted, _BY_QUERY, e.q_norm, "backward_q.cpp")


@lru_cache(maxsize=256)
def by_key(spec: Spec, wanted: tuple[str, ...]) -> str:
    """The kernel that finds the gradients of k, v and of all other tables, from what the other one found for each query."""
    return _source(spec, wanted, _BY_KEY, e.k_norm, "backward_kv.cpp")


def _source(spec: Spec, wanted: tuple[str, ...], leaves: Leaves, norm: Expr, skeleton: str) -> str:
    printer, slopes = printer_of(spec, leaves), Slopes(spec)
    pairs = {x: slopes.of_pair(x) for x in slopes.reads(*wanted)}
    queries = {x: slopes.of_query(x) for x in slopes.reads(*wanted)}
    pair_sums = [] if leaves is _BY_QUERY else _sums(printer, pairs)
    assert spec.factor is not None
    holes = {
        "visible": printer.function(spec.variant.mask, real="exact"),
        "score": printer.function(spec.score),
        "weight": printer.function(_ZERO if spec.by_peak else spec.variant.normalizer.weight),
        "weight slope": printer.function(slopes.weight),
        "score slope": printer.function(slopes.score(e.dot)),
        "norm slope": printer.function(slopes.score(norm)),
        "pair sums": pair_sums,
        "drop": dropout.in_backward(by_query=leaves is _BY_QUERY) if spec.variant.dropout else (),
    }
    if leaves is _BY_QUERY:
        holes |= {
            "factor": printer.function(spec.factor),
            "pull": printer.function(slopes.of_query(e.mass)),
            "query sums": _sums(printer, queries),
        }
    constants = (
        f"constexpr bool BY_QUERY = {str(leaves is _BY_QUERY).lower()};  // whether queries stand in lanes",
        "constexpr int NUMBERED = BY_QUERY ? VECTORS : CHUNK;",
        f"constexpr bool SUMS = {str(bool(pair_sums)).lower()};  // pairs add to the gradients of tables",
        f"constexpr bool NORMED = {str(slopes.score(norm) != _ZERO).lower()};  // scores follow the norm of what stands in lanes",
    )
    return assembled(
        spec,
        printer,
        holes,
        ("rows.h", "tiles.h", unit_of(spec), "view.h", "backward.h", skeleton),
        chunk(spec) // 2,  # beside scores stand the gradients of weights
        *constants,
        by_query=leaves is _BY_QUERY,
    )


def _sums(printer: Printer, added: Mapping[Expr, Expr]) -> list[str]:
    return [line for read, value in added.items() if value != _ZERO for line in printer.addition(read, value)]
