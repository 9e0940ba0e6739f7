"""What operands become by being held in few bits: rounded to what their codes and scales say, exactly as a kernel would."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from attn_compiler.algebra.storage import PLAIN, Held, Numbers, Scaling, Shared, Storage
from attn_compiler.targets.operands import Operands
from attn_compiler.targets.scaled import rounded

_CHANNELS, _TOKENS = -1, -2  # the axes that products sum over


def held(operands: Operands, storage: Storage) -> Operands:
    """The operands as they come back from their storage, in float32 at least. Gradients pass as if nothing was rounded."""
    if storage == PLAIN:
        return operands
    real = torch.promote_types(operands.q.dtype, torch.float32)
    q, k, v = (x.to(real) for x in (operands.q, operands.k, operands.v))
    if storage.kv_cache:
        k, v = (held_tensor(x, storage.kv_cache.of(n)) for n, x in enumerate((k, v)))
    if storage.qk:
        # What all scores of a query share, a softmax does not notice: nothing is gained by smoothing q.
        q, k = held_tensor(q, replace(storage.qk.of(0), smooth=False)), held_tensor(k, storage.qk.of(1))
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
    back = rounded(stored, how.numbers, how.per, along, how.largest)
    back = (back if mean is None else back + mean).to(given.dtype)
    back = back if apart is None else torch.where(apart, given.detach(), back)
    return straight_through(given, back)


def held_weights(weights: Tensor, numbers: Numbers) -> Tensor:
    """[..., queries, keys] as they come back; each row has a scale, and no sign where nothing is negative."""
    if weights.numel() == 0:
        return weights
    real = weights.detach().to(torch.float32)
    per = Shared("token") if numbers.scaling is Scaling.REAL else None
    back = rounded(real, numbers, per, -1)
    if numbers.unsigned:
        back = torch.where((real < 0).any(dim=-1, keepdim=True), back, rounded(real, _without_sign(numbers), per, -1))
    return straight_through(weights, back.to(weights.dtype))


def _without_sign(numbers: Numbers) -> Numbers:
    return replace(numbers, mantissa=numbers.mantissa + 1, smallest=numbers.smallest + 1, largest=numbers.unsigned)


def straight_through(given: Tensor, back: Tensor) -> Tensor:
    """`back`, whose gradient is that of `given`."""
    if not torch.is_grad_enabled():
        return back
    return back.detach() + (given - given.detach())  # the difference is zero, exactly
