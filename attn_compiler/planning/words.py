"""Words of the policy language: what they are, the types their arguments have, and what they give."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, get_type_hints

from attn_compiler.algebra.expr import Expr, Sort, const, exp, k, log, peak, symbol
from attn_compiler.algebra.variant import SOFTMAX, DerivedTable, Variant
from attn_compiler.planning.plan import Refusal


@dataclass(frozen=True)
class PerToken:
    """What each token has (a rank, a label, a block, being in a set), as an expression over `k`."""

    of_k: Expr
    derived: tuple[DerivedTable, ...] = ()

    def at(self, position: Expr) -> Expr:
        return self.of_k.substitute({k: position})


@dataclass(frozen=True)
class Seen:
    """Who sees whom, how many extra keys of logit 0 and value 0 a query sees, and how often a key counts."""

    keep: Expr
    phantoms: Expr = field(default=const(0))
    times: Expr = field(default=const(1))
    derived: tuple[DerivedTable, ...] = ()

    @property
    def adds_keys(self) -> bool:
        return (self.phantoms, self.times) != (const(0), const(1))


@dataclass(frozen=True)
class Declared:
    """A word whose arguments were checked and that nothing carries yet."""

    folder: str
    name: str
    arguments: tuple[tuple[str, object], ...] = ()


# The annotations of a word's parameters are its grammar; `planning/arguments.py` says how each is read.
Count = Annotated[int, "count"]
Number = Annotated[Expr, "number"]
TableName = Annotated[str, "table"]
Tokens = Annotated[PerToken, "tokens"]
Label = Annotated[PerToken, "label"]
Units = Annotated[PerToken, "units"]
Order = Annotated[PerToken, "order"]
Denominator = Annotated[Expr, "denominator"]
Seed = Annotated[int | None, "seed"]  # None: the number of the layer, which is not known yet
PerAxis = Annotated[tuple[int, ...], "per axis"]
CountPerAxis = Annotated[tuple[int, ...], "count per axis"]
FlagPerAxis = Annotated[tuple[bool, ...], "flag per axis"]


@dataclass(frozen=True)
class Word:
    """A function whose signature is its grammar. Keyword-only parameters are supplied by the scope."""

    folder: str
    name: str
    function: Callable[..., object]
    path: Path

    @cached_property
    def hints(self) -> Mapping[str, object]:
        return get_type_hints(self.function, include_extras=True)

    @cached_property
    def parameters(self) -> tuple[inspect.Parameter, ...]:
        return tuple(inspect.signature(self.function).parameters.values())

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    @property
    def is_carried(self) -> bool:
        """Whether it means something already, and is not only checked."""
        return self.hints.get("return") is not Declared


Words = Mapping[str, Mapping[str, Word]]
EPS = symbol("eps", Sort.REAL)  # stands in what a denominator divides by for the number that its normalizer adds


def with_phantoms(variant: Variant, seen: Seen) -> Variant | Refusal:
    """Carry a mask's extra keys: repeated ones as log-counts of scores, empty ones in the denominator."""
    if not seen.adds_keys:
        return variant
    normalizer = variant.normalizer
    if normalizer.weight != SOFTMAX.weight or normalizer.total is None:
        return Refusal("rule", f"its mask adds keys, which only a softmax can carry, not `{normalizer.name}`")
    output = normalizer.output.args[0] / (normalizer.total + seen.phantoms * exp(-peak))
    repeated = variant.score if seen.times == const(1) else variant.score + log(seen.times)
    return replace(variant, score=repeated, normalizer=replace(normalizer, output=output))


def plain(keep: Expr | Seen) -> Seen:
    return keep if isinstance(keep, Seen) else Seen(keep)
