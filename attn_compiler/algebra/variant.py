"""What one attention computes: a mask, a score and a normalizer, as expressions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import lru_cache

from attn_compiler.algebra.expr import Expr, acc, const, dim, exp, mass, peak, score, sqrt, true
from attn_compiler.algebra.integers import IntegerSet
from attn_compiler.algebra.storage import PLAIN, Storage


class EmptyRows(Enum):
    """What a query that sees no key gets."""

    ZERO = "zero"
    MEAN = "mean"  # of v over all keys: a finite fill replaced or absorbed every score
    NAN = "nan"  # a plain softmax over nothing but -inf
    UNMASKED = "unmasked"  # a finite fill was added to every score, which changes nothing


@dataclass(frozen=True)
class Normalizer:
    """Weights from scores, and the output from what they accumulate.

    `weight` speaks of `score` and `peak` (the row's largest visible score), `output` of `acc` (the sum of weight · v),
    `mass` (the sum of weights) and `peak`. A law that tests hold it to: shifting `peak` must not change the output.
    """

    name: str
    weight: Expr
    output: Expr

    @property
    def tracks_peak(self) -> bool:
        return self.weight.mentions(peak)

    @property
    def total(self) -> Expr | None:
        """What `acc` is divided by, whose log plus `peak` is the log-sum-exp; None when rows are not normalized."""
        return self.output.args[1] if self.output.op == "div" and self.output.args[0] == acc else None


SOFTMAX = Normalizer("softmax", weight=exp(score - peak), output=acc / mass)


@dataclass(frozen=True)
class DerivedTable:
    """A table that follows from a length (a random order, a Hilbert curve): made once, when the length is known."""

    name: str
    make: Callable[[int], Sequence[int]] = field(compare=False)


@dataclass(frozen=True)
class Variant:
    """What an attention computes.

    `dot`, the product of q and k, times `scale` is what `score` stands for in the slot `score`, which may change it; `mask`
    says who sees whom, `normalizer` makes weights. `groups` gives sets of query heads variants of their own, without groups.
    `storage` says how operands are held, which rounds them.
    """

    mask: Expr = true
    empty_rows: EmptyRows = EmptyRows.ZERO
    scale: Expr = field(default=const(1.0) / sqrt(dim))
    score: Expr = score
    normalizer: Normalizer = SOFTMAX
    groups: tuple[tuple[IntegerSet, Variant], ...] = ()
    derived: tuple[DerivedTable, ...] = ()
    dropout: float = 0.0
    storage: Storage = PLAIN

    def parts(self) -> tuple[Variant, ...]:
        """The variant of all heads that no group names, and those of the groups."""
        return (self, *(of_group for _, of_group in self.groups))

    def expressions(self) -> tuple[Expr, ...]:
        """All expressions of this variant and its groups."""
        own = (self.mask, self.scale, self.score, self.normalizer.weight, self.normalizer.output)
        return own + tuple(e for _, variant in self.groups for e in variant.expressions())

    def tables(self) -> frozenset[str]:
        """The names of the run-time tables this reads."""
        return frozenset(str(node.value) for node in reads(self))

    def map(self, change: Callable[[Expr], Expr]) -> Variant:
        """The same variant with `change` applied to each of its expressions."""
        normalizer = self.normalizer
        return replace(
            self,
            mask=change(self.mask),
            scale=change(self.scale),
            score=change(self.score),
            normalizer=replace(normalizer, weight=change(normalizer.weight), output=change(normalizer.output)),
            groups=tuple((heads, variant.map(change)) for heads, variant in self.groups),
        )


# Fields that change what is computed and that most variants leave as they are: whoever carries one has to know it.
EXTRAS = {"storage": PLAIN}


def passed_over(variant: Variant, carried: Collection[str] = ()) -> str | None:
    """What someone has against a variant who carries, of all EXTRAS, no others than these; None: nothing."""
    wanted = (slot for slot, nothing in EXTRAS.items() for part in variant.parts() if getattr(part, slot) != nothing)
    slot = next((slot for slot in wanted if slot not in carried), None)
    return None if slot is None else f"it does not carry `{slot}`"


@lru_cache(maxsize=1024)
def reads(variant: Variant) -> tuple[Expr, ...]:
    """All that a variant and its groups read of run-time tables."""
    nodes = (node for expression in variant.expressions() for node in expression.walk())
    return tuple(dict.fromkeys(node for node in nodes if node.op == "table"))
