"""The operator that stands in a graph for keys of which states are left: a sign for the rewrite that nobody can compute."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attn_compiler.errors import ShapeError

_library = torch.library.Library("attn_compiler", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("recall(Tensor here, Tensor[] past, SymInt before, int latest) -> Tensor")  # type: ignore[no-untyped-call]


def recall(here: Tensor, past: Sequence[Tensor], before: int, latest: int) -> Tensor:
    """The tokens `here` [batch, heads, tokens, dim], behind so many places of earlier ones of which only states are left.

    As many of the `latest` before the new ones are promised to be here.
    """
    return torch.ops.attn_compiler.recall(here, past, before, latest)  # type: ignore[no-any-return]


def _recall(here: Tensor, past: Sequence[Tensor], before: int, latest: int) -> Tensor:
    raise ShapeError(
        "a layer of this cache remembers its past as the state of a linear attention, and the model attends otherwise there: "
        'compile it with the policy of the cache, as `torch.compile(model, backend="attn", options={"policy": …})`'
    )


def _places(here: Tensor, past: Sequence[Tensor], before: int, latest: int) -> Tensor:
    batch, heads, tokens, dim = here.shape
    return here.new_empty((batch, heads, before + tokens, dim))


_library.impl("recall", _recall, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("attn_compiler::recall", _places, lib=_library)
