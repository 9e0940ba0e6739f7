"""How the tokens of a call are laid out before they meet: all at once, or some queries with some keys at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attn_compiler.algebra.variant import Variant
from attn_compiler.targets.arrays import Arrays
from attn_compiler.targets.explicit import Sums
from attn_compiler.targets.operands import Operands


@dataclass(frozen=True)
class Arrangement:
    """Operands as [..., heads, tokens, dim], what expressions read over them, and which of the keys exist (None: all).

    With blocks, axes are [batch, blocks, heads, tokens, dim].
    """

    q: Tensor
    k: Tensor
    v: Tensor
    arrays: Arrays
    exists: Tensor | None

    def to(self, dtype: torch.dtype) -> Arrangement:
        """The same with operands of another dtype."""
        return replace(self, q=self.q.to(dtype), k=self.k.to(dtype), v=self.v.to(dtype))


@dataclass(frozen=True)
class Layout:
    """Arrangements that hold every query between them; `joined` makes [batch, heads, tokens, dim] of what each of them finds."""

    parts: tuple[Arrangement, ...]
    joined: Callable[[Sequence[Tensor]], Tensor]
    shows_all: bool = False  # whether the mask hides nothing of what meets, so that nobody need ask it
    is_whole: bool = False  # whether every query meets every key, as they come

    def totals(self, found: Sequence[Tensor]) -> Tensor:
        """The same for one number per query."""
        return self.joined([x[..., None] for x in found])[..., 0]

    def sums(self, found: Sequence[Sums]) -> Sums:
        """The same for all that queries gather."""
        fields = zip(*(vars(one).values() for one in found), strict=True)
        return Sums(*(None if xs[0] is None else self.joined(xs) for xs in fields))  # type: ignore[arg-type]


LayOut = Callable[[Operands, Variant, torch.dtype], Layout]


def whole(operands: Operands, real: torch.dtype) -> Arrangement:
    """Every query meets every key: axes [batch, heads, tokens, dim]."""
    return Arrangement(operands.q, operands.k, operands.v, operands.arrays(real), None)


def undivided(operands: Operands, real: torch.dtype) -> Layout:
    """The same as a layout."""
    return Layout((whole(operands, real),), lambda found: found[0], is_whole=True)


def gathered(x: Tensor, places: Tensor) -> Tensor:
    """The tokens at [blocks, tokens of a block] places, as [batch, blocks, heads, tokens of a block, dim]."""
    return split(x.index_select(2, places.flatten()), places.shape[0])


def split(x: Tensor, count: int) -> Tensor:
    """[batch, heads, tokens, dim] as [batch, blocks, heads, tokens of a block, dim]."""
    batch, heads, tokens, dim = x.shape
    return x.reshape(batch, heads, count, tokens // count, dim).transpose(1, 2)


def in_a_row(x: Tensor) -> Tensor:
    """[batch, blocks, heads, tokens of a block, dim] as [batch, heads, tokens, dim]."""
    return x.transpose(1, 2).flatten(2, 3)
