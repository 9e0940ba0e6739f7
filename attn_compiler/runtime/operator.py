"""The operator behind which generated kernels run: in eager mode, in compiled graphs and in exported ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from attn_compiler.algebra import wire
from attn_compiler.algebra.variant import Variant
from attn_compiler.errors import ShapeError
from attn_compiler.runtime import kernels
from attn_compiler.targets.cpp.spec import K_POSITIONS, LONGEST, Q_POSITIONS, Stored
from attn_compiler.targets.operands import Operands
from attn_compiler.targets.torch_target import Result

_library = torch.library.Library("attn_compiler", "DEF")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "attend(Tensor q, Tensor k, Tensor v, Tensor[] tables, SymInt[] first, str what, bool totals) -> (Tensor, Tensor)"
)


def attend_cpp(operands: Operands, variant: Variant, *, lse: bool = False) -> Result:
    """Attend by generated kernels. `operands` and `variant` are such that the target has nothing against them."""
    names = sorted(name for name in variant.tables())
    tables = [operands.tables[name] for name in names]
    q_at, k_at = operands.q_positions, operands.k_positions
    if q_at is None:
        q_at = k_at[..., operands.k_len - operands.q_len :] if isinstance(k_at, Tensor) else operands.first_query
    first: list[int | torch.SymInt] = []
    for name, at in ((Q_POSITIONS, q_at), (K_POSITIONS, k_at)):
        assert at is not None
        if isinstance(at, Tensor):
            names.append(name)
            tables.append(at)
            first.append(0)
        else:
            first.append(at)
    what = json.dumps([wire.write(variant), names, operands.layer, operands.layers])
    out, totals = torch.ops.attn_compiler.attend(operands.q, operands.k, operands.v, tables, first, what, lse)
    return out, totals if lse else None


@lru_cache(maxsize=1024)
def _read(what: str) -> tuple[Variant, tuple[str, ...], int, int]:
    variant, names, layer, layers = json.loads(what)
    return wire.read(variant), tuple(names), layer, layers


def _attend(
    q: Tensor, k: Tensor, v: Tensor, tables: Sequence[Tensor], first: Sequence[int], what: str, totals: bool
) -> tuple[Tensor, Tensor]:
    variant, names, layer, layers = _read(what)
    batch, heads, q_len, dim = q.shape
    _, kv_heads, k_len, value_dim = v.shape
    if max(q_len, k_len, *map(abs, first)) >= LONGEST:
        raise ShapeError(f"kernels count up to {LONGEST} tokens; found {q_len} queries and {k_len} keys from {list(first)}")
    out, sums = _empty(q, v, totals)
    if not out.numel() and not sums.numel():
        return out, sums
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    stored = tuple(Stored(dtype_name(t.dtype), t.ndim) for t in tables)
    counted = Q_POSITIONS not in names, K_POSITIONS not in names
    contents = kernels.contents_of(variant, names, tables)
    sizes = batch, heads, kv_heads, q_len, k_len, dim, value_dim
    shape = kernels.Shape(
        variant, names, stored, *counted, *sizes, dtype_name(q.dtype), layer, layers, first[0], first[1], contents
    )
    kernels.run(shape, q, k, v, out, sums if totals else None, tables)
    return out, sums


def _empty(q: Tensor, v: Tensor, totals: bool) -> tuple[Tensor, Tensor]:
    """Room for the result, laid out as models want it: they transpose heads and tokens, which then costs nothing."""
    batch, heads, q_len, _ = q.shape
    out = q.new_empty((batch, q_len, heads, v.shape[3])).transpose(1, 2)
    return out, q.new_empty((batch, heads, q_len) if totals else (0,), dtype=torch.float32)


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` and the like."""
    return str(dtype).removeprefix("torch.")


_library.impl("attend", _attend, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake(
    "attn_compiler::attend", lambda q, k, v, tables, first, what, totals: _empty(q, v, totals), lib=_library
)
