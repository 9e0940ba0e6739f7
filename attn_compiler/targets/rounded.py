"""What operands become by being held in few bits: rounded to what their codes and scales say, exactly as a kernel would."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from attn_compiler.algebra.storage import PLAIN, Held, Numbers, Scaling, Shared, Storage
from attn_compiler.targets.operands import Operands

LEAST = 2.0**-100  # groups of smaller numbers are scaled as if they held this one: its reciprocal is still a float
_E4M3 = Numbers("e4m3", 8, mantissa=3, smallest=-6, largest=448)
_CHANNELS, _TOKENS = -1, -2  # the axes that products sum over


def held(operands: Operands, storage: Storage) -> Operands:
    """The operands as they come back from their storage, in float32 at least. Gradients pass as if nothing was rounded."""
    if storage == PLAIN:
        return operands
    real = torch.promote_types(operands.q.dtype, torch.float32)
    q, k, v = (x.to(real) for x in (operands.q, operands.k, operands.v))
    if storage.kv_cache:
        k, v = (held_tensor(x, storage.kv_cache) for x in (k, v))
    if storage.qk:
        # What all scores of a query share, a softmax does not notice: nothing is gained by smoothing q.
        q, k = held_tensor(q, replace(storage.qk, smooth=False)), held_tensor(k, storage.qk)
    if storage.pv:
        v = held_tensor(v, storage.pv, _TOKENS)
    return replace(operands, q=q, k=k, v=v)


def held_tensor(x: Tensor, how: Held, along: int = _CHANNELS) -> Tensor:
    """[..., tokens, channels] as they come back; a product sums over the axis `along`, in which types cut their own blocks."""
    given = x.to(torch.promote_types(x.dtype, torch.float32))
    if x.numel() == 0:
        return given
    real = given.detach().to(torch.float32)  # in which codes are found, whatever is computed in: they are part of the meaning
    mean = real.mean(dim=-2, keepdim=True) if how.smooth else None
    centered = real if mean is None else real - mean
    apart = None if math.isinf(how.outliers) else real.abs().amax(dim=-2, keepdim=True) >= how.outliers
    stored = centered if apart is None else torch.where(apart, 0.0, centered)
    back = _scaled(stored, how.numbers, how.per, along)
    back = (back if mean is None else back + mean).to(given.dtype)
    back = back if apart is None else torch.where(apart, given.detach(), back)
    return straight_through(given, back)


def held_weights(weights: Tensor, numbers: Numbers) -> Tensor:
    """[..., queries, keys] as they come back; each row has a scale, and no sign where nothing is negative."""
    real = weights.detach().to(torch.float32)
    per = Shared("token") if numbers.scaling is Scaling.REAL else None
    back = _scaled(real, numbers, per, -1)
    if numbers.unsigned:
        back = torch.where((real < 0).any(dim=-1, keepdim=True), back, _scaled(real, _without_sign(numbers), per, -1))
    return straight_through(weights, back.to(weights.dtype))


def _without_sign(numbers: Numbers) -> Numbers:
    return replace(numbers, mantissa=numbers.mantissa + 1, smallest=numbers.smallest + 1, largest=numbers.unsigned)


def straight_through(given: Tensor, back: Tensor) -> Tensor:
    """`back`, whose gradient is that of `given`."""
    if not torch.is_grad_enabled():
        return back
    return back.detach() + (given - given.detach())  # the difference is zero, exactly


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


def _scaled(x: Tensor, numbers: Numbers, per: Shared | None, along: int) -> Tensor:
    """What becomes of `x`, each group of which is scaled to what the type holds."""
    if numbers.scaling is Scaling.NONE:
        return nearest(x, numbers)
    largest = _largest(x, per, numbers.block, along).clamp_min(LEAST)
    if numbers.scaling is Scaling.REAL:
        # A number divided by a tensor would be times its reciprocal, which rounds twice.
        inverse = torch.full_like(largest, numbers.largest) / largest
        return nearest(x * inverse, numbers) * (largest / numbers.largest)
    if numbers.scaling is Scaling.POWER:
        # The exponent of the largest number, by its bits; the type's largest has one of its own.
        exponent = (largest.view(torch.int32) >> 23) - math.frexp(numbers.largest)[1] + 1
        scale = (exponent << 23).view(torch.float32)
    else:
        whole = largest.amax() / (numbers.largest * _E4M3.largest)
        scale = nearest(largest / numbers.largest / whole, _E4M3) * whole
    codes = nearest(torch.where(scale > 0, x / scale, 0.0), numbers)
    return codes * scale


def _largest(x: Tensor, per: Shared | None, block: int, along: int) -> Tensor:
    """The greatest magnitude of each group, to broadcast over `x`."""
    magnitude = x.abs()
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
