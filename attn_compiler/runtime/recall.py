"""Operators that stand in a graph for what only a rewrite computes: keys of which states are left, and traits of new tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attn_compiler.errors import ShapeError
from attn_compiler.targets.traits import Trait, empty

_library = torch.library.Library("attn_compiler", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "recall(Tensor here, Tensor new, Tensor[] past, SymInt before, int latest, str summed, str[] names, Tensor[] traits)"
    " -> Tensor"
)
_library.define("trait(Tensor new, str name, int heads, bool wide) -> Tensor")  # type: ignore[no-untyped-call]


def recall(
    here: Tensor,
    new: Tensor,
    past: Sequence[Tensor],
    before: int,
    latest: int,
    summed: str,
    traits: Sequence[tuple[Trait, Tensor]] = (),
) -> Tensor:
    """The tokens `here` [batch, heads, tokens, dim], behind so many places of earlier ones of which only states are left.

    The last of them are `new`; as many of the `latest` before these are promised to be here, and so are the `traits` of all.
    What the states are sums of is said by `summed` (`targets/held_past.py`).
    """
    names, rows = [of.name for of, _ in traits], [x for _, x in traits]
    return torch.ops.attn_compiler.recall(here, new, past, before, latest, summed, names, rows)  # type: ignore[no-any-return]


def trait(new: Tensor, of: Trait, heads: int) -> Tensor:
    """What the attention of these new keys asks of their tokens."""
    return torch.ops.attn_compiler.trait(new, of.name, heads, of.wide)  # type: ignore[no-any-return]


def _missing(*_: object) -> Tensor:
    raise ShapeError(
        "a layer of this cache remembers its past as the state of a linear attention, and the model attends otherwise there: "
        'compile it with the policy of the cache, as `torch.compile(model, backend="attn", options={"policy": …})`'
    )


def _places(
    here: Tensor,
    new: Tensor,
    past: Sequence[Tensor],
    before: int,
    latest: int,
    summed: str,
    names: Sequence[str],
    traits: Sequence[Tensor],
) -> Tensor:
    batch, heads, tokens, dim = here.shape
    return here.new_empty((batch, heads, before + tokens, dim))


def _rows(new: Tensor, name: str, heads: int, wide: bool) -> Tensor:
    return empty(Trait(name, wide=wide), new, heads)


for _name, _shape in (("recall", _places), ("trait", _rows)):
    _library.impl(_name, _missing, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"attn_compiler::{_name}", _shape, lib=_library)
