"""Rows of codes: how a cache holds keys and values, each token in few bits beside the scale that brings it back."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from attn_compiler.algebra.storage import Held, Numbers, Scaling
from attn_compiler.algebra.variant import Variant
from attn_compiler.errors import ShapeError
from attn_compiler.targets.scaled import largest_of, nearest, scaled, within

SCALE = 4  # bytes of a float
# The types that rows are made of: how a tensor holds the numbers, by their mantissa and what is below all leading ones.
_FLOATS = {(3, -6): torch.float8_e4m3fn, (2, -14): torch.float8_e5m2, (7, -126): torch.bfloat16, (10, -14): torch.float16}


@dataclass(frozen=True, eq=False)
class Codes:
    """[batch, heads, tokens, dim] numbers in few bits: a row of codes for each token, which ends in its scale."""

    rows: Tensor
    held: Held
    dtype: torch.dtype  # of the numbers that became codes

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.rows.shape[:-1], dim_of(self.rows.shape[-1], self.held))

    def like(self) -> Tensor:
        """A tensor of the same shape, dtype and device that takes no memory and holds nothing."""
        return self.rows.new_empty((), dtype=self.dtype).expand(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes of memory the rows take."""
        return self.rows.nbytes

    def decode(self) -> Tensor:
        """The numbers, as they come back."""
        return decoded(self.rows, self.held, self.dtype)

    def append(self, x: Tensor) -> Codes:
        """The same with the rows of later tokens behind them."""
        reason = alone(self.held)
        if reason:
            raise ShapeError(f"codes in {self.held} cannot be appended to: {reason}")
        return Codes(torch.cat([self.rows, encoded(x, self.held)], dim=-2), self.held, self.dtype)


def objection(how: Held) -> str | None:
    """Why rows cannot hold numbers in that way; None if they can."""
    numbers = how.numbers
    if numbers.scaling not in (Scaling.REAL, Scaling.NONE):
        return f"{numbers.name} shares scales within a row, and rows have one scale each"
    if not _is_whole(numbers) and (numbers.mantissa, numbers.smallest) not in _FLOATS:
        return f"no codes are known for {numbers.name}"
    if how.per and how.per.name == "channel":
        return "rows have one scale each, not one for each channel"
    if how.outliers < math.inf:
        return "channels that are kept as they are follow from all tokens"
    if how.smooth:
        return "the means that are kept apart follow from all tokens"
    return None


def alone(how: Held) -> str | None:
    """Why the row of a token follows from other tokens, too; None if it does not, so that a cache can grow by rows."""
    if how.per and how.per.name != "token" and not how.largest:
        return f"a scale per {how.per} follows from tokens that are yet to come"
    return objection(how)


def encoded(x: Tensor, how: Held) -> Tensor:
    """[..., tokens, dim] as rows [..., tokens, bytes], or as plain numbers of 16 bits, which need no scales."""
    if x.shape[-1] * how.numbers.bits % 8:
        raise ShapeError(f"two numbers of {how.numbers.name} share a byte, so rows hold an even number; found {x.shape[-1]}")
    real = x.detach().to(torch.float32)
    if how.numbers.scaling is Scaling.NONE:
        return nearest(real, how.numbers).to(_FLOATS[how.numbers.mantissa, how.numbers.smallest])
    assert how.per is not None
    real, largest = within(real, how.largest[0]) if how.largest else (real, largest_of(real, how.per))
    codes, scale = scaled(real, how.numbers, largest)
    of_rows = scale.expand(*real.shape[:-1], 1).clone(memory_format=torch.contiguous_format)
    return torch.cat([_bytes(codes, how.numbers), of_rows.view(torch.uint8)], dim=-1)


def decoded(rows: Tensor, how: Held, dtype: torch.dtype) -> Tensor:
    """The numbers that rows mean."""
    if how.numbers.scaling is Scaling.NONE:
        return rows.to(dtype)
    codes, scale = rows[..., :-SCALE], rows[..., -SCALE:].contiguous().view(torch.float32)
    return (_numbers(codes, how.numbers) * scale).to(dtype)


@lru_cache(maxsize=256)
def without_cache(variant: Variant) -> Variant:
    """The variant of keys and values that come from a cache: what it held them in is done."""
    groups = tuple((heads, without_cache(group)) for heads, group in variant.groups)
    mix = variant.mix and replace(variant.mix, branches=tuple((name, without_cache(x)) for name, x in variant.mix.branches))
    return replace(variant.held(replace(variant.storage, kv_cache=None), variant.order), groups=groups, mix=mix)


def row_width(dim: int | torch.SymInt, how: Held) -> int | torch.SymInt:
    """How many elements of its tensor a row of `dim` numbers takes."""
    return dim if how.numbers.scaling is Scaling.NONE else dim * how.numbers.bits // 8 + SCALE


def dim_of(width: int, how: Held) -> int:
    """How many numbers such a row has."""
    return width if how.numbers.scaling is Scaling.NONE else (width - SCALE) * 8 // how.numbers.bits


def row_dtype(how: Held) -> torch.dtype:
    """What a tensor of rows is made of."""
    return torch.uint8 if how.numbers.scaling is not Scaling.NONE else _FLOATS[how.numbers.mantissa, how.numbers.smallest]


def _is_whole(numbers: Numbers) -> bool:
    return numbers.spacing == 1.0 and numbers.bits in (4, 8) and numbers.largest < 2 ** (numbers.bits - 1)


def _bytes(codes: Tensor, numbers: Numbers) -> Tensor:
    if not _is_whole(numbers):
        return codes.to(_FLOATS[numbers.mantissa, numbers.smallest]).view(torch.uint8)
    if numbers.bits == 8:
        return codes.to(torch.int8).view(torch.uint8)
    first, second = (codes.to(torch.int8) + 8).view(torch.uint8).chunk(2, dim=-1)
    return first | (second << 4)


def _numbers(codes: Tensor, numbers: Numbers) -> Tensor:
    if not _is_whole(numbers):
        return codes.contiguous().view(_FLOATS[numbers.mantissa, numbers.smallest]).to(torch.float32)
    if numbers.bits == 8:
        return codes.contiguous().view(torch.int8).to(torch.float32)
    return torch.cat([codes & 15, codes >> 4], dim=-1).to(torch.float32) - 8
