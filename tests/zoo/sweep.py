"""Rebuilds the whole zoo in one way of compiling it, and counts what was found and what computes the same again."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from zoo.catalogue import ZOO
from zoo.entry import Outcome
from zoo.rebuilding import Rebuilt, in_precision, rebuild

# They have no gradients themselves: flex has none on a CPU, the other writes over what its own gradient needs.
ONLY_INFERRED = {"flex_hop", "inplace_after_use"}


@dataclass(frozen=True)
class Way:
    """How a model is compiled and run."""

    train: bool
    dtype: torch.dtype
    dynamic: bool

    def __str__(self) -> str:
        precision = str(self.dtype).removeprefix("torch.")
        return f"{'training' if self.train else 'inference'}-{precision}-{'dynamic' if self.dynamic else 'static'}"

    def rebuild(self, name: str, implementation: str) -> Rebuilt:
        model, inputs = in_precision(self.dtype, *ZOO[name].make(implementation))
        return rebuild(model, inputs, train=self.train, dynamic=self.dynamic)


_EVERY = itertools.product((False, True), (torch.float32, torch.bfloat16), (False, True))
WAYS = {str(way): way for way in itertools.starmap(Way, _EVERY)}


@dataclass
class Swept:
    """What became of all attentions of the zoo, but for those that are composed of several contractions."""

    way: str
    sites: int = 0
    found: int = 0
    rebuilt: int = 0  # from expressions and tables alone, with equal values and gradients
    invented: int = 0
    seconds: float = 0.0
    misses: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        counts = f"{self.found} of {self.sites} found, {self.rebuilt} rebuilt, {self.invented} invented"
        return "\n".join([f"{self.way}: {counts}, {self.seconds:.0f} s", *(f"    {miss}" for miss in self.misses)])

    def count(self, name: str, implementation: str, one: Rebuilt) -> None:
        expected = ZOO[name].found or 0
        self.sites += expected
        self.found += min(expected, len(one.sites))
        self.rebuilt += min(expected, one.exact)
        self.invented += max(0, len(one.sites) - expected)
        if not len(one.sites) == one.exact == expected:
            what = f"{len(one.sites)} found, {one.exact} rebuilt of {expected}"
            self.misses.append(f"{name}, {implementation}: {what}: {one.reason}")


def configurations() -> Iterator[tuple[str, str]]:
    """Every model that is counted, in every implementation."""
    for entry in ZOO.values():
        if entry.outcome is not Outcome.FRAGMENTS:
            yield from ((entry.name, implementation) for implementation in entry.implementations)


def sweep(way: Way) -> Swept:
    """Rebuild the whole zoo in one way; a model that fails to compile counts as not found."""
    swept, start = Swept(str(way)), time.perf_counter()
    for name, implementation in configurations():
        if way.train and name in ONLY_INFERRED:
            continue
        try:
            one = way.rebuild(name, implementation)
        except RuntimeError as failure:
            one = Rebuilt(differences=[f"{type(failure).__name__}: {str(failure).strip().splitlines()[0]}"])
        swept.count(name, implementation, one)
    swept.seconds = time.perf_counter() - start
    return swept
