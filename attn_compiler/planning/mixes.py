"""Mixes as a policy writes them: branches by name, each a variant, and what each weighs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from attn_compiler.algebra.expr import Expr, const, sigmoid
from attn_compiler.algebra.variant import How
from attn_compiler.errors import PolicyError, did_you_mean
from attn_compiler.planning.entries import located, mapping, one_of
from attn_compiler.planning.yaml_text import Entry

if TYPE_CHECKING:
    from attn_compiler.planning.slots import Slots

HOW = ("sum", "gate", "lse", "shared_denominator", "lerp")
_TWO = ("gate", "lerp")  # what one branch weighs, the other one lacks


@dataclass(frozen=True)
class MixSlots:
    """How branches are mixed: what each sets (None: `exact`), and its weight, in one order."""

    how: How
    branches: tuple[tuple[str, Slots | None], ...]
    weights: tuple[Expr, ...]


def read_mix(entry: Entry, branch: Callable[[Entry], Slots | None], number: Callable[[str], Expr]) -> MixSlots:
    """Read `{how: …, branches: {…}, weights: …}`; branches are sorted by name, so that their order means nothing."""
    given = mapping(entry, ("how", "branches", "weights"), "key of a mix", "{how: …, branches: {…}}")
    if "how" not in given or "branches" not in given:
        raise PolicyError(f"{entry.place}: a mix needs `how` and `branches`")
    how, branches = one_of(given["how"], HOW), given["branches"]
    if not isinstance(branches.value, Mapping) or not branches.value:
        raise PolicyError(f"{branches.place}: expected branches by name, found {branches.kind}")
    names = sorted(branches.value)
    read = tuple((name, branch(branches.value[name])) for name in names)
    for name, slots in read:
        if slots is not None and (slots.heads or slots.mix):
            raise PolicyError(f"{branches.value[name].place}: a branch has no heads and no branches of its own")
    weights = _weights(given["weights"], names, number) if "weights" in given else {}
    negative = [x.value for x in weights.values() if isinstance(x.value, int | float) and x.value < 0]
    if how == "lse" and negative:
        raise PolicyError(f"{given['weights'].place}: a weight of `lse` is at least 0, found {negative[0]}")
    if how in _TWO:
        weights = _both(how, weights, names, given.get("weights", entry))
    kind = How.SUM if how in _TWO else How(how)
    return MixSlots(kind, read, tuple(weights.get(name, const(1.0)) for name in names))


def _weights(entry: Entry, names: list[str], number: Callable[[str], Expr]) -> dict[str, Expr]:
    """One for all branches, or one for each by its name: a number, a parameter, an expression of them."""
    if not isinstance(entry.value, Mapping):
        return dict.fromkeys(names, located(entry, number))
    for name in entry.value:
        if name not in names:
            raise PolicyError(f'{entry.keys.get(name, entry.place)}: there is no branch "{name}"{did_you_mean(name, names)}')
    return {name: located(inner, number) for name, inner in entry.value.items()}


def _both(how: str, weights: dict[str, Expr], names: list[str], entry: Entry) -> dict[str, Expr]:
    """`lerp` gives one branch its weight and the other one what is left of 1; `gate` does so with the sigmoid of a weight."""
    if len(names) != 2 or len(weights) != 1:
        raise PolicyError(f"{entry.place}: `{how}` is for two branches, one of which has a weight: {{{names[0]}: 0.5}}")
    (name, weight), *_ = weights.items()
    share = sigmoid(weight) if how == "gate" else weight
    return {name: share, **{other: 1.0 - share for other in names if other != name}}
