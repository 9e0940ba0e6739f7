"""Floats rounded to the numbers of a type, groups of them scaled to what it holds: where codes and scales come from."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from attn_compiler.algebra.storage import Numbers, Scaling, Shared

LEAST = 2.0**-100  # groups of smaller numbers are scaled as if they held this one: its reciprocal is still a float
_E4M3 = Numbers("e4m3", 8, mantissa=3, smallest=-6, largest=448)


def nearest(x: Tensor, numbers: Numbers) -> Tensor:
    """Floats rounded to the nearest numbers of a type, of two as near ones to the even one."""
    x = x.clamp(-numbers.largest, numbers.largest)
    even = torch.round(x / numbers.spacing) * numbers.spacing
    if numbers.largest < 2.0**numbers.smallest:
        return even
    dropped = 23 - numbers.mantissa  # bits of a float's mantissa: added half of what they are worth, they carry
    bits = x.view(torch.int32)
    carried = bits + ((1 << (dropped - 1)) - 1) + ((bits >> dropped) & 1)
    rounded = (carried & -(1 << dropped)).view(torch.float32)
    return torch.where(x.abs() < 2.0**numbers.smallest, even, rounded)


def scaled(x: Tensor, numbers: Numbers, largest: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers of a type that stand for groups of floats with these largest ones, and what brings them back."""
    # A number divided by a tensor would be times its reciprocal, which rounds twice.
    inverse = torch.full_like(largest, numbers.largest) / largest
    # Where not all numbers of a group are finite, its scale says so: NaN has no code that all types know.
    codes = torch.where(largest < math.inf, nearest(x * inverse, numbers), 0.0)
    return codes, torch.where(largest < math.inf, largest / numbers.largest, math.nan)


def rounded(x: Tensor, numbers: Numbers, per: Shared | None, along: int, fixed: Sequence[float] = ()) -> Tensor:
    """What becomes of `x`, each group of which is scaled to what the type holds; all of it for a number that is `fixed`."""
    if numbers.scaling is Scaling.NONE:
        return nearest(x, numbers)
    x, largest = within(x, fixed[0]) if fixed else (x, largest_of(x, per, numbers.block, along))
    if numbers.scaling is Scaling.REAL:
        codes, scale = scaled(x, numbers, largest)
        return codes * scale
    if numbers.scaling is Scaling.POWER:
        # The exponent of the largest number, by its bits; the type's largest has one of its own.
        exponent = (largest.view(torch.int32) >> 23) - math.frexp(numbers.largest)[1] + 1
        scale = (exponent << 23).view(torch.float32)
    else:
        whole = largest.amax() / (numbers.largest * _E4M3.largest)
        scale = nearest(largest / numbers.largest / whole, _E4M3) * whole
    codes = nearest(torch.where(scale > 0, x / scale, 0.0), numbers)
    return codes * scale


def within(x: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """Numbers that a fixed scale holds, and the largest of them; a warning where others were cut off."""
    inside = torch.ops.attn_compiler.within(x, largest)
    return inside, largest + 0.0 * inside.abs().amax(dim=-1, keepdim=True)  # NaN, which nothing cuts off, where a token has it


def _within(x: Tensor, largest: float) -> Tensor:
    if x.numel() and not bool(x.abs().amax() <= largest):
        warn_of_cut(largest)
    return x.clamp(-largest, largest)


def warn_of_cut(largest: float) -> None:
    """Say that numbers were beyond what a policy fixes."""
    text = f"numbers beyond the `largest` of {largest:g} that a policy fixes were cut off: measure it on such inputs"
    warnings.warn(text, RuntimeWarning, stacklevel=3)


_library = torch.library.Library("attn_compiler", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("within(Tensor x, float largest) -> Tensor")  # type: ignore[no-untyped-call]
_library.impl("within", _within, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("attn_compiler::within", lambda x, largest: torch.empty_like(x), lib=_library)


def largest_of(x: Tensor, per: Shared | None, block: int = 0, along: int = -1) -> Tensor:
    """The greatest magnitude of each group, to broadcast over `x`; at least one whose reciprocal is a float."""
    magnitude = x.abs().clamp_min(LEAST)
    if per is None:
        return _of_blocks(magnitude, along, block)
    axes = {"tensor": tuple(range(x.ndim)), "head": (-2, -1), "channel": (-2,), "token": (-1,), "block": (-1,)}[per.name]
    found = magnitude.amax(dim=axes, keepdim=True)
    return _of_blocks(found, -2, per.size) if per.size else found


def _of_blocks(magnitude: Tensor, axis: int, size: int) -> Tensor:
    """The greatest of each block of `size` along an axis, as often as there are members; the last block may be short."""
    last = magnitude.transpose(axis, -1)
    length = last.shape[-1]
    padded = torch.nn.functional.pad(last, (0, -length % size))
    greatest = padded.reshape(*padded.shape[:-1], -1, size).amax(dim=-1)
    return greatest.repeat_interleave(size, dim=-1)[..., :length].transpose(axis, -1)
