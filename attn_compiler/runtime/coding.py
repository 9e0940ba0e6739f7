"""Brings the operands of one call into the codes that a kernel multiplies."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from attn_compiler.algebra.storage import Held, Shared, Storage
from attn_compiler.runtime.compiler import call, load
from attn_compiler.targets.cpp.coded import K_MEAN, K_SCALE, Q_SCALE, is_bfloat16
from attn_compiler.targets.cpp.source import encoder
from attn_compiler.targets.rounded import AS_THEY_COME, Places, held_tensor
from attn_compiler.targets.scaled import warn_of_cut

WORTH_THREADS = 1 << 18  # numbers below which starting threads costs more than they save


@dataclass(frozen=True, eq=False)
class Coded:
    """The operands as a kernel reads them, the scales of v's channels, and the tables of the others."""

    q: Tensor
    k: Tensor
    v: Tensor
    value_scale: Tensor | None
    tables: tuple[tuple[str, Tensor], ...]


def coded(q: Tensor, k: Tensor, v: Tensor, storage: Storage, places: Places = AS_THEY_COME) -> Coded:
    """The operands of a call, those of them encoded that `storage` holds in few bits, blocks of tokens cut at `places`."""
    of_q, of_k = places
    value_scale, tables = None, list[tuple[str, Tensor]]()
    if storage.kv_cache:  # where no cache holds them, they become what it would give back
        k, v = (held_tensor(x, storage.kv_cache.of(n), places=of_k).to(x.dtype) for n, x in enumerate((k, v)))
    if storage.qk:
        k, k_scale, mean = _encoded(k, storage.qk.of(1), of_k, biased=True, smooth=storage.qk.smooth)
        q, q_scale, dots = _encoded(q, storage.qk.of(0), of_q, biased=True, others=mean)
        tables = [(Q_SCALE, q_scale), (K_SCALE, k_scale)]
        if dots is not None:
            tables.append((K_MEAN, dots))
    if storage.pv and is_bfloat16(storage.pv):
        v = v.to(torch.bfloat16)
    elif storage.pv:
        v, value_scale, _ = _encoded(v, replace(storage.pv, per=Shared("head")) if storage.pv.largest else storage.pv)
        if storage.pv.per and storage.pv.per.name != "channel":  # the same for all tokens; a kernel asks for that of a channel
            value_scale = value_scale[..., :1].expand(*v.shape[:2], v.shape[3]).contiguous()
    return Coded(q, k, v, value_scale, tuple(tables))


def _encoded(
    x: Tensor,
    how: Held,
    places: Tensor | None = None,
    *,
    biased: bool = False,
    smooth: bool = False,
    others: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales, and the means that rows lost or, with `others`, what of them comes back times these."""
    assert how.per is not None
    batch, heads, tokens, dim = x.shape
    by_channel = how.per.name == "channel"
    # A fixed scale is that of every token, but for one that holds NaN.
    group = {"token": 1, "tensor": 1, "block": how.per.size}.get(how.per.name, tokens)
    codes = x.new_empty(x.shape, dtype=torch.uint8 if biased else torch.int8)
    scales = x.new_empty((batch, heads, dim if by_channel else tokens), dtype=torch.float32)
    extra = None
    if smooth or others is not None:
        extra = x.new_empty((batch, heads, dim if smooth else tokens), dtype=torch.float32)
    means, dots = (extra, None) if smooth else (None, extra)
    places = None if places is None or how.per.name != "block" else places.expand(batch, heads, tokens, 1)
    pointers = [0 if t is None else t.data_ptr() for t in (x, codes, scales, means, others, dots, places)]
    strides = [*x.stride()[:3], *((0, 0, 0) if places is None else places.stride()[:3])]
    other_heads = heads if others is None else others.shape[1]
    words = [batch, heads, tokens, *strides, max(1, group), by_channel, other_heads, biased, x.numel() >= WORTH_THREADS]
    fixed, cut = how.largest[0] if how.largest else 0.0, ctypes.c_int64()
    words += [int.from_bytes(struct.pack("<d", fixed), "little"), ctypes.addressof(cut)]
    call(_kernel(str(x.dtype).removeprefix("torch."), dim, how.numbers.largest), [*pointers, *map(int, words)])
    if cut.value:
        warn_of_cut(fixed)
    return codes, scales, extra


@lru_cache(maxsize=64)
def _kernel(dtype: str, dim: int, largest: float) -> Callable[[int], object]:
    kernel = load(encoder(dtype, dim, largest)).encode
    kernel.argtypes = [ctypes.c_void_p]
    return kernel
