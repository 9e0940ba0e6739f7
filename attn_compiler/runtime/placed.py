"""The operator behind which a cache says where the keys stand that it holds: all tokens, with zeros for those it let go of.

A target takes the keys and their places instead. Whoever computes the operator itself misses what was let go, which is an
error, unless the model's own mask hides that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attn_compiler.errors import ShapeError
from attn_compiler.planning.kept import Kept

_library = torch.library.Library("attn_compiler", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "placed(Tensor held, Tensor? places, SymInt tokens, int first, int latest, bool suffices) -> Tensor"
)


def placed(held: Tensor, places: Tensor | None, tokens: int, kept: Kept, *, suffices: bool) -> Tensor:
    """`held` [batch, heads, n, dim] at their `places` [1 or batch, n] among so many tokens; None: the latest ones.

    `kept` is what the cache promises to hold; does that suffice for the model itself, without any policy?
    """
    return torch.ops.attn_compiler.placed(held, places, tokens, kept.first, kept.latest, suffices)  # type: ignore[no-any-return]


def _placed(held: Tensor, places: Tensor | None, tokens: int, first: int, latest: int, suffices: bool) -> Tensor:
    batch, heads, count, dim = held.shape
    if count == tokens:
        return held.clone()
    if not suffices:
        raise ShapeError(
            f"a layer of this cache holds {Kept(first, latest)}, and the model attends to more: compile it with the policy of "
            'the cache, as `torch.compile(model, backend="attn", options={"policy": …})`'
        )
    at = torch.arange(tokens - count, tokens, device=held.device)[None] if places is None else places
    whole = held.new_zeros((batch, heads, tokens, dim))
    return whole.scatter_(2, at[:, None, :, None].expand(held.shape), held)


def _shape(held: Tensor, places: Tensor | None, tokens: int, first: int, latest: int, suffices: bool) -> Tensor:
    batch, heads, _, dim = held.shape
    return held.new_empty((batch, heads, tokens, dim))


_library.impl("placed", _placed, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("attn_compiler::placed", _shape, lib=_library)
