"""All that determines the source of one kernel."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.bounds import Box, Interval, bounds
from attn_compiler.algebra.expr import Expr, Sort
from attn_compiler.algebra.variant import SOFTMAX, Variant
from attn_compiler.targets.cpp import coded
from attn_compiler.targets.operands import PLACE

FIRST_QUERY, FIRST_KEY = e.symbol("first_query", Sort.INDEX), e.symbol("first_key", Sort.INDEX)
Q_POSITIONS, K_POSITIONS = "attn.q_positions", "attn.k_positions"
SEED = "attn.seed"  # from which follows what is dropped
MOST_AXES = 4
LONGEST = 1 << 28  # of what counts tokens, so that narrow integers can hold them


class Unit(Enum):
    """What multiplies numbers of bfloat16, and sums them up as floats; the values are the instructions, by any of these names."""

    FLOATS = ("",)  # one by one, as floats
    PAIRS = ("__AVX512BF16__", "__ARM_FEATURE_BF16_VECTOR_ARITHMETIC")  # two at a time, in vectors
    TILES = ("__AMX_TILE__ __AMX_BF16__ __AVX512BF16__",)  # 16 rows of 16 pairs at a time, in a matrix unit

    def is_among(self, macros: frozenset[str]) -> bool:
        """Whether a compiler that defines these macros builds for it."""
        return any(macros.issuperset(names.split()) for names in self.value)


@dataclass(frozen=True)
class Stored:
    """A run-time tensor as a kernel reads it."""

    dtype: str
    axes: int


@dataclass(frozen=True)
class Spec:
    """One kernel: a variant without groups over (b, h, i, place), and how its operands are stored."""

    variant: Variant
    dim: int
    value_dim: int
    dtype: str
    tables: tuple[tuple[str, Stored], ...]
    unit: Unit = Unit.FLOATS  # what multiplies bfloat16
    rows: str = ""  # the codes that rows of k and v are made of, where a cache holds such

    @property
    def by_peak(self) -> bool:
        """Whether weights are relative to the row's largest score."""
        return self.variant.normalizer.tracks_peak

    @property
    def score(self) -> Expr:
        return coded.score(self.variant)

    @property
    def operands(self) -> str:
        """How q and k are stored."""
        return self.rows or ("biased" if self.variant.storage.qk else self.dtype)

    @property
    def values(self) -> str:
        """How v is stored."""
        pv = self.variant.storage.pv
        return self.rows or self.dtype if pv is None else "bfloat16" if coded.is_bfloat16(pv) else "int8"

    @property
    def most_weight(self) -> float:
        """The code of a weight of one."""
        pv = self.variant.storage.pv
        return pv.numbers.unsigned if pv and pv.numbers.unsigned else 1.0

    @property
    def factor(self) -> Expr | None:
        """What the sum of weight · v is multiplied with; None where the output is not proportional to it."""
        proportion, rate = _proportion(self.variant.normalizer.output), self.variant.dropout
        if proportion is None or not rate:
            return proportion
        return proportion * (1 / (1 - rate) if rate < 1 else 0.0)

    @property
    def total(self) -> Expr | None:
        """The log-sum-exp of a row."""
        total = self.variant.normalizer.total
        if total is None:
            return None
        return e.log(total) + e.peak if self.by_peak else e.log(total)

    @property
    def wide(self) -> bool:
        """Whether some index may need more than 32 bits."""
        return not all(is_narrow(node) for root in self.parts() for node in root.walk() if node.sort is Sort.INDEX)

    def parts(self) -> Iterator[Expr]:
        """The expressions of which a kernel is made."""
        for root in (self.variant.mask, self.score, self.variant.normalizer.weight, self.factor, self.total):
            if root is not None:
                yield root


def in_places(variant: Variant, *, q_counted: bool, k_counted: bool) -> Variant:
    """The variant with positions spelled out: by counting from the first, or by reading a table."""
    q = e.i + FIRST_QUERY if q_counted else e.table(Q_POSITIONS, e.b, e.h, e.i)
    k = PLACE + FIRST_KEY if k_counted else e.table(K_POSITIONS, e.b, e.h, PLACE)
    return variant.map(lambda expression: expression.substitute({e.q: q, e.k: k}))


OfStorage = Callable[[Variant], str | None]  # what a target's kernels have against how operands are held


def refuse(variant: Variant, tables: Mapping[str, Stored], of_storage: OfStorage = coded.objection) -> str | None:
    """Why no kernel can be made for a variant without groups; None if one can."""
    spec = Spec(variant, 1, 1, "float32", ())
    normalizer = variant.normalizer
    if spec.by_peak and normalizer.weight != SOFTMAX.weight:
        return f"the weights of `{normalizer.name}` follow the peak in another way than exp(score − peak)"
    if spec.factor is None:
        return f"the output of `{normalizer.name}` is not proportional to the sum of weight · v"
    if normalizer.weight.mentions(e.k, PLACE):
        return f"the weights of `{normalizer.name}` depend on the key besides its score"
    held = of_storage(variant)
    if held:
        return held
    wide = [name for name, stored in tables.items() if stored.axes > MOST_AXES]
    return f'the table "{wide[0]}" has more than {MOST_AXES} axes' if wide else None


def spec_of(
    variant: Variant, dim: int, value_dim: int, dtype: str, tables: Mapping[str, Stored], unit: Unit = Unit.FLOATS
) -> Spec:
    """The spec of a variant in places; only the tables that it reads count."""

    def at_last(node: Expr) -> Expr:
        """A table that has fewer axes than coordinates is read at the last ones."""
        return e.rebuild(node, node.args[len(node.args) - tables[str(node.value)].axes :]) if node.op == "table" else node

    own = replace(variant, derived=(), groups=()).map(lambda expression: expression.transform(at_last))
    read = {name: tables[name] for name in own.tables()} | ({SEED: Stored("int64", 0)} if own.dropout else {})
    read |= dict.fromkeys(coded.tables(own), Stored("float32", 3))
    spec = Spec(own, dim, value_dim, dtype, tuple((name, read[name]) for name in sorted(read)))
    return replace(spec, unit=unit if "bfloat16" in (spec.operands, spec.values) and dim % 2 == 0 else Unit.FLOATS)


def dropped(rate: float) -> int:
    """How many of 2^32 random words mean that a weight is dropped: those that are smaller."""
    return min(round(rate * 2**32), 2**32 - 1)


def _proportion(output: Expr) -> Expr | None:
    match output.op:
        case _ if output == e.acc:
            return e.const(1.0)
        case "div" if output.args[0] == e.acc and not output.args[1].mentions(e.acc):
            return 1.0 / output.args[1]
        case "mul" if output.args[0] == e.acc and not output.args[1].mentions(e.acc):
            return output.args[1]
    return None


_TOKENS, _COUNTS = Interval(0, LONGEST), Interval(0, 1 << 20)
SIZES: Box = {
    **dict.fromkeys((e.i, PLACE, e.q_len, e.k_len), _TOKENS),
    **dict.fromkeys((FIRST_QUERY, FIRST_KEY), Interval(-LONGEST, LONGEST)),
    **dict.fromkeys((e.b, e.h, e.kv, e.heads, e.dim, e.layer, e.layers), _COUNTS),
}


def is_narrow(node: Expr, box: Box = SIZES) -> bool:
    """Whether an index fits into 32 bits, whatever the sizes are."""
    lo, hi = bounds(node, box)
    return -math.inf < lo and lo >= -(1 << 31) and hi < (1 << 31)
