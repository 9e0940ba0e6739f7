"""The delta rule as linear attention: what each key really adds to the state, which takes the place of its value.

A key adds u = beta · (v - k · S), where S is the state that it meets. Written out over the keys before it, that is a triangular
system (I + A) u = beta · v, A being beta · left · k·k below the diagonal; queries then gather u as they would gather v.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_compiler.algebra.expr import Sort
from attn_compiler.algebra.variant import Variant
from attn_compiler.targets.fading import fading, log_before, logs_of, shown_of
from attn_compiler.targets.linear import NEAR, linear
from attn_compiler.targets.operands import Operands

Solve = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]  # from k, v, beta and running logs at keys, or none


def refuse(variant: Variant) -> str | None:
    """Why the values of a variant cannot be corrected; None if they can, or if they are not to be."""
    if variant.delta is None:
        return None
    found = linear(variant)
    if found is None or found.behind is None:
        return "a delta rule goes from key to key, so it is for causal attention that is linear besides"
    return "its denominator counts keys, which a delta rule replaces instead of adding" if variant.normalizer.counts else None


def corrected(operands: Operands, variant: Variant, solve: Solve) -> tuple[Operands, Variant]:
    """The call of a variant, its features mapped, with what keys add in the place of v, and no rule that is left."""
    if variant.delta is None:
        return operands, variant
    found = linear(variant)
    assert found is not None
    real = torch.promote_types(operands.k.dtype, torch.float32)
    arrays, ratio = operands.arrays(real), operands.q.shape[1] // operands.k.shape[1]
    k, v = (x.to(real).repeat_interleave(ratio, dim=1) for x in (operands.k, operands.v))
    beta = arrays.tensor(arrays.read(variant.delta), Sort.REAL)
    beta = beta.expand(operands.q.shape[0], operands.q.shape[1], 1, operands.k_len)[:, :, 0, :, None]
    shown = shown_of(operands, found, arrays)
    if shown is not None:
        k, v, beta = (torch.where(shown[..., None], x, 0.0) for x in (k, v, beta))
    logs = logs_of(operands, found, arrays)
    if operands.past:  # what its state gives for a key is no part of what the key adds
        reached = k if logs is None else k * fading(logs[1], log_before(operands, found, arrays), k)[..., None]
        v = v - reached @ operands.past[0][..., :-1, :-1].to(real)
    added = solve(k, v, beta, logs[1] if logs else None)
    return replace(operands, q=operands.q.to(real), k=k, v=added), replace(variant, delta=None)


def at_once(k: Tensor, v: Tensor, beta: Tensor, log: Tensor | None) -> Tensor:
    """One system for all keys: the meaning."""
    return _solved(_system(k, beta, log), beta * v)


def by_chunks(k: Tensor, v: Tensor, beta: Tensor, log: Tensor | None) -> Tensor:
    """A system for each chunk of keys, which meet the state of all chunks before theirs (the WY form)."""
    tokens, width = k.shape[2], v.shape[3]
    if not isinstance(tokens, int) or tokens <= NEAR:
        return at_once(k, v, beta, log)
    count = -(-tokens // NEAR)
    rest = count * NEAR - tokens
    k, v, beta = (_cut(F.pad(x, (0, 0, 0, rest)), count) for x in (k, v, beta))
    reached, kept = k, k
    ends: Tensor | None = None
    if log is not None:
        log = _cut(torch.cat([log, log[..., -1:].expand(*log.shape[:-1], rest)], dim=-1), count)
        ends = torch.cat([log[:, :, :1, :1], log[:, :, :, -1:]], dim=2)  # before each chunk, and at its end
        reached = k * fading(log, ends[:, :, :-1], k)[..., None]
        kept = k * fading(ends[:, :, 1:], log, k)[..., None]
    solved = _solved(_system(k, beta, log), beta * torch.cat([v, reached], dim=-1))
    own, of_state = solved[..., :width], solved[..., width:]
    state = k.new_zeros((*k.shape[:2], k.shape[-1], width))
    parts = []
    for n in range(count):
        parts.append(own[:, :, n] - of_state[:, :, n] @ state)
        left = 1.0 if ends is None else fading(ends[:, :, n + 1], ends[:, :, n], k)[..., None]
        state = state * left + kept[:, :, n].mT @ parts[-1]
    return torch.cat(parts, dim=2)[:, :, :tokens]


def _cut(x: Tensor, count: int) -> Tensor:
    """Tokens as so many chunks of them."""
    return x.reshape(*x.shape[:2], count, NEAR, *x.shape[3:])


def _system(k: Tensor, beta: Tensor, log: Tensor | None) -> Tensor:
    """What each key takes back of the values before it; ones on the diagonal are understood."""
    near = k @ k.mT
    if log is not None:
        near = near * fading(log[..., None], log[..., None, :], k)
    return (near * beta).tril(-1)


def _solved(system: Tensor, right: Tensor) -> Tensor:
    solved: Tensor = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    return solved
