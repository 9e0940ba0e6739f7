"""Brings the operands of one call into the codes that Triton kernels multiply, by a kernel of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attn_compiler.algebra.storage import Held, Scaling, Storage
from attn_compiler.runtime.triton_launch import beside, load
from attn_compiler.targets.cpp.coded import K_MEAN, K_SCALE, Q_SCALE
from attn_compiler.targets.rounded import AS_THEY_COME, Places, held_tensor
from attn_compiler.targets.rows import encoded
from attn_compiler.targets.triton.coded import V_SCALE, encoder, said, stored

Operands = tuple[Tensor, Tensor, Tensor]


def coded(
    q: Tensor, k: Tensor, v: Tensor, storage: Storage, places: Places = AS_THEY_COME
) -> tuple[Operands, Mapping[str, Tensor]]:
    """The operands of a call, those of them encoded that `storage` holds in few bits, and the scales that kernels read.

    Blocks of tokens that share a scale are cut at `places`.
    """
    of_q, of_k = places
    read: dict[str, Tensor] = {}
    if storage.kv_cache:  # where no cache holds them, they become what it would give back
        k, v = (held_tensor(x, storage.kv_cache.of(n), places=of_k) for n, x in enumerate((k, v)))
        k, v = k if storage.qk else k.to(q.dtype), v if storage.pv else v.to(q.dtype)
    if storage.qk:
        k, read[K_SCALE], mean = _codes(k, storage.qk, smooth=storage.qk.smooth, places=of_k)
        q, read[Q_SCALE], dots = _codes(q, storage.qk, others=mean, places=of_q)
        read |= {} if dots is None else {K_MEAN: dots}
    if storage.pv and storage.pv.numbers.scaling is Scaling.NONE:
        v = v if v.dtype == getattr(torch, stored(storage.pv)) else encoded(v, storage.pv)
    elif storage.pv:
        v, read[V_SCALE], _ = _codes(v, storage.pv)
    return (q, k, v), read


def _codes(x: Tensor, how: Held, **more: Any) -> tuple[Tensor, Tensor, Tensor]:
    most, dtype, per = said(how)
    with beside(x):
        found: tuple[Tensor, Tensor, Tensor] = load(encoder()).codes_of(x, most, getattr(torch, dtype), per, **more)
    return found
