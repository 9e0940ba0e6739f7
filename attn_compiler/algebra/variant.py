"""What one attention computes: a mask, a score and a normalizer, as expressions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import lru_cache

from attn_compiler.algebra.context import Context, Merge
from attn_compiler.algebra.expr import Expr, acc, const, dim, exp, mass, peak, score, seen, sqrt, true, values
from attn_compiler.algebra.feature import IDENTITY, Feature
from attn_compiler.algebra.integers import IntegerSet
from attn_compiler.algebra.made import Made, Taken
from attn_compiler.algebra.output import Step, expressions_of, mapped
from attn_compiler.algebra.storage import PLAIN, Held, Storage


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
    `mass` (the sum of weights) and `peak`, and perhaps of `seen` and `values` (how many keys a query sees, and the sum of
    their v). A law that tests hold it to: shifting `peak` must not change the output.
    """

    name: str
    weight: Expr
    output: Expr
    ridge: Expr | None = None  # with it, weights are those of a ridge regression around each query (`targets/regressed.py`)

    @property
    def tracks_peak(self) -> bool:
        return self.weight.mentions(peak)

    @property
    def counts(self) -> bool:
        """Whether the output asks how many keys are seen, or for the sum of their values."""
        return self.output.mentions(seen, values)

    @property
    def total(self) -> Expr | None:
        """What `acc` is divided by, whose log (plus `peak`, where weights follow it) is the log-sum-exp; None for no division."""
        divides = self.ridge is None and self.output.op == "div" and self.output.args[0] == acc
        return self.output.args[1] if divides else None

    def expressions(self) -> tuple[Expr, ...]:
        return (self.weight, self.output) if self.ridge is None else (self.weight, self.output, self.ridge)

    def map(self, change: Callable[[Expr], Expr]) -> Normalizer:
        return Normalizer(self.name, *map(change, self.expressions()))


SOFTMAX = Normalizer("softmax", weight=exp(score - peak), output=acc / mass)


@dataclass(frozen=True)
class Delta:
    """A state that a key corrects instead of only adding to it.

    What is added is not v but beta · (v - what the state gives for k): `beta`, over b, h and k, says how much of the
    difference. `left` is what is left of a key at a query, a factor of the score; the state that is asked is faded alike.
    """

    beta: Expr
    left: Expr = field(default=const(1.0))


@dataclass(frozen=True)
class Gates:
    """A state whose features fade each by itself: `log`, over b, h, k and `component`, is the running log of what is left."""

    log: Expr


@dataclass(frozen=True)
class DerivedTable:
    """A table that follows from a length (a random order, a Hilbert curve): made once, when the length is known."""

    name: str
    make: Callable[[int], Sequence[int]] = field(compare=False)


@dataclass(frozen=True)
class Variant:
    """What an attention computes.

    `feature` maps q and k; `dot`, their product, times `scale` is what `score` stands for in the slot `score`, which may change
    it; `mask` says who sees whom, `normalizer` makes weights. `groups` gives sets of query heads variants of their own, without
    groups. Where there is a `mix`, its branches say all of that, and `mask` what any of them sees. `storage` says how operands
    are held, which rounds them; blocks of tokens that share a scale are cut where tokens are sorted by `order`, their rank at a
    position `k`, or as they come.
    """

    mask: Expr = true
    empty_rows: EmptyRows = EmptyRows.ZERO
    scale: Expr = field(default=const(1.0) / sqrt(dim))
    score: Expr = score
    normalizer: Normalizer = SOFTMAX
    feature: Feature = IDENTITY
    mix: Mix | None = None
    groups: tuple[tuple[IntegerSet, Variant], ...] = ()
    derived: tuple[DerivedTable, ...] = ()
    dropout: float = 0.0
    storage: Storage = PLAIN
    order: Expr | None = None
    delta: Expr | None = None  # how much of what it differs by a value writes into the state, as `Delta` has it
    gates: Expr | None = None  # the running log of a gate for each feature, as `Gates` has it: products fade one by one
    output: tuple[Step, ...] = ()  # what becomes of the result, step after step (`algebra/output.py`)
    context: tuple[Context | Merge, ...] = ()  # what becomes of keys and values first
    unrotated: tuple[str, ...] = ()  # which of q and k are taken as they are before the rotary embedding
    made: tuple[Made | Taken, ...] = ()  # tables that a call makes of the input of its block, before a target is given them

    def held(self, storage: Storage, order: Expr | None = None) -> Variant:
        """The same variant of operands that are held so, its blocks cut in an order where there are any."""
        return replace(self, storage=storage, order=order if storage.shares_among_tokens else None)

    def projected(self, how: Held | None) -> Variant:
        """The same variant, in all of whose parts projections are held so."""
        mix = self.mix and replace(self.mix, branches=tuple((name, one.projected(how)) for name, one in self.mix.branches))
        groups = tuple((heads, one.projected(how)) for heads, one in self.groups)
        return replace(self, storage=replace(self.storage, projections=how), mix=mix, groups=groups)

    def parts(self) -> tuple[Variant, ...]:
        """The variant of all heads that no group names, those of the groups, and the branches of each."""
        branches = () if self.mix is None else (branch for _, branch in self.mix.branches)
        return (self, *(part for inner in (*branches, *(group for _, group in self.groups)) for part in inner.parts()))

    def expressions(self) -> tuple[Expr, ...]:
        """All expressions of this variant, its branches and its groups."""
        own = (self.mask, self.scale, self.score, *self.normalizer.expressions(), *self.feature.expressions())
        mixed = () if self.mix is None else self.mix.expressions()
        own += tuple(one for one in (self.order, self.delta, self.gates) if one is not None)
        own += tuple(e for step in self.output for e in expressions_of(step))
        own += tuple(e for one in self.context for e in one.expressions())
        return own + mixed + tuple(e for _, variant in self.groups for e in variant.expressions())

    def tables(self) -> frozenset[str]:
        """The names of the run-time tables this reads."""
        return frozenset(str(node.value) for node in reads(self))

    def map(self, change: Callable[[Expr], Expr]) -> Variant:
        """The same variant with `change` applied to each of its expressions."""
        return replace(
            self,
            mask=change(self.mask),
            scale=change(self.scale),
            score=change(self.score),
            normalizer=self.normalizer.map(change),
            feature=self.feature.map(change),
            order=None if self.order is None else change(self.order),
            delta=None if self.delta is None else change(self.delta),
            gates=None if self.gates is None else change(self.gates),
            output=tuple(mapped(step, change) for step in self.output),
            made=tuple(one.map(change) for one in self.made),
            mix=None if self.mix is None else self.mix.map(change),
            groups=tuple((heads, variant.map(change)) for heads, variant in self.groups),
        )


class How(Enum):
    """What becomes of the outputs of branches, each times its weight."""

    SUM = "sum"
    LSE = "lse"  # weighed by how much each branch sees, as one softmax over the keys of all would
    SHARED = "shared_denominator"  # what they accumulate is added, then divided by the sum of all their weights


@dataclass(frozen=True)
class Mix:
    """Branches that attend by themselves, and how their results become one; a key that two branches see counts twice."""

    how: How
    branches: tuple[tuple[str, Variant], ...]
    weights: tuple[Expr, ...]

    def expressions(self) -> tuple[Expr, ...]:
        return self.weights + tuple(e for _, branch in self.branches for e in branch.expressions())

    def map(self, change: Callable[[Expr], Expr]) -> Mix:
        branches = tuple((name, branch.map(change)) for name, branch in self.branches)
        return replace(self, branches=branches, weights=tuple(map(change, self.weights)))


# Fields that change what is computed and that most variants leave as they are: whoever carries one has to know it.
EXTRAS: Mapping[str, object] = {
    "feature": IDENTITY,
    "mix": None,
    "storage": PLAIN,
    "order": None,
    "delta": None,
    "gates": None,
    "output": (),
    "context": (),
    "unrotated": (),
}


def passed_over(variant: Variant, carried: Collection[str] = ()) -> str | None:
    """What someone has against a variant who carries, of all EXTRAS, no others than these; None: nothing."""
    parts = variant.parts()
    wanted = (slot for slot, nothing in EXTRAS.items() for part in parts if getattr(part, slot) != nothing)
    slot = next((slot for slot in wanted if slot not in carried), None)
    if slot is None and "seen" not in carried and any(part.normalizer.counts for part in parts):
        return "it does not count the keys that a query sees, which the normalizer asks for"
    if slot is None and "ridge" not in carried and any(part.normalizer.ridge is not None for part in parts):
        return "it adds weights up, and solves no system of equations for each query, which the normalizer asks for"
    return None if slot is None else f"it does not carry `{slot}`"


def without_total(variant: Variant) -> str | None:
    """Why the rows of a variant, or of one of its groups, have no log-sum-exp; None if all have."""
    if any(part.output for part in variant.parts()):
        return "its results are changed after their rows were summed up, so they have no log-sum-exp"
    if any(one.how == "merge" for part in variant.parts() for one in part.context):
        return "its tokens are merged, and rows of several tokens have no log-sum-exp of one"
    names = [part.normalizer.name for part in variant.parts() if part.mix is None and part.normalizer.total is None]
    return f"the rows of `{names[0]}` are not normalized, so they have no log-sum-exp" if names else None


@lru_cache(maxsize=1024)
def reads(variant: Variant) -> tuple[Expr, ...]:
    """All that a variant and its groups read of run-time tables that they do not make."""
    made = [one for part in variant.parts() for one in part.made]
    names, expressions = {one.name for one in made}, (*variant.expressions(), *(e for one in made for e in one.expressions()))
    nodes = (node for expression in expressions for node in expression.walk())
    return tuple(dict.fromkeys(node for node in nodes if node.op == "table" and node.value not in names))


def with_tables_given(variant: Variant) -> Variant:
    """The same variant where the tables that it makes are given to it."""
    mix = variant.mix and replace(variant.mix, branches=tuple((n, with_tables_given(x)) for n, x in variant.mix.branches))
    return replace(variant, made=(), mix=mix, groups=tuple((heads, with_tables_given(x)) for heads, x in variant.groups))
