"""The operator that stands in a graph for keys whose past is a state: a sign for the rewrite, which nobody can compute."""

from __future__ import annotations

import torch
from torch import Tensor

from attn_compiler.errors import ShapeError

_library = torch.library.Library("attn_compiler", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("recall(Tensor new, Tensor past, SymInt held) -> Tensor")  # type: ignore[no-untyped-call]


def recall(new: Tensor, past: Tensor, held: int) -> Tensor:
    """`new` tokens [batch, heads, tokens, dim], behind so many places of earlier ones of which only the state `past` is left."""
    return torch.ops.attn_compiler.recall(new, past, held)  # type: ignore[no-any-return]


def _recall(new: Tensor, past: Tensor, held: int) -> Tensor:
    raise ShapeError(
        "a layer of this cache remembers its past as the state of a linear attention, and the model attends otherwise there: "
        'compile it with the policy of the cache, as `torch.compile(model, backend="attn", options={"policy": …})`'
    )


def _places(new: Tensor, past: Tensor, held: int) -> Tensor:
    batch, heads, tokens, dim = new.shape
    return new.new_empty((batch, heads, held + tokens, dim))


_library.impl("recall", _recall, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("attn_compiler::recall", _places, lib=_library)
