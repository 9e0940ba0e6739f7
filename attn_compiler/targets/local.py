"""The values near a query, added to its result: one convolution where it sees all of them, else tap by tap."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.expr import Expr, Sort, true
from attn_compiler.algebra.output import Local, component, tap
from attn_compiler.algebra.simplify import simplify
from attn_compiler.algebra.storage import Storage
from attn_compiler.algebra.variant import Variant
from attn_compiler.errors import ShapeError
from attn_compiler.targets.arrays import Arrays, Value
from attn_compiler.targets.operands import Operands
from attn_compiler.targets.rounded import held
from attn_compiler.torch_private import statically_known_true

_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)


def near(operands: Operands, variant: Variant, step: Local, real: torch.dtype) -> Tensor:
    """What a step adds to the result of each query, [batch, heads, queries, value dim]."""
    first_key = operands.k_positions
    if isinstance(first_key, Tensor):
        raise ShapeError("a convolution of v is over keys that follow each other, and these have positions of their own")
    v = _values(operands, variant).to(real).repeat_interleave(operands.q.shape[1] // operands.v.shape[1], dim=1)
    weights, bias = _parameters(operands, step, v.shape[-1], real)
    shown = [simplify(variant.mask.substitute({e.k: e.q + step.offset(one)})) for one in step.near]
    first = None if operands.first_query is None else operands.first_query - first_key
    if first is not None and all(one == true for one in shown) and _all_there(operands, step, first):
        added = _convolved(v, weights, step, first, operands.q_len)
    else:
        added = _tap_by_tap(operands, v, weights, step, shown)
    return added if bias is None else added + bias * _on_grid(operands, step).to(real)


def _values(operands: Operands, variant: Variant) -> Tensor:
    """v as the cache gives it back, where one holds it."""
    cached = next((part.storage.kv_cache for part in variant.parts() if part.storage.kv_cache), None)
    return held(operands, Variant(storage=Storage(kv_cache=cached), order=variant.order)).v if cached else operands.v


def _parameters(operands: Operands, step: Local, width: int, real: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The weights [batch, heads, components, taps] and the bias [batch, heads, 1, components]; axes may be 1, or lack."""
    device = operands.q.device
    at: dict[Expr, Value] = {
        **operands.numbers(),
        **operands.head_coordinates(trailing=2),
        e.b: torch.arange(operands.q.shape[0], device=device)[:, None, None, None],
        component: torch.arange(width, device=device)[:, None],
        tap: torch.arange(step.taps, device=device),
    }
    arrays = Arrays(at, operands.tables, real, device)
    found = (arrays.tensor(arrays.read(one), Sort.REAL) for one in step.expressions())
    weights, *biases = (x[(None,) * (4 - x.ndim)] for x in found)
    return weights.expand(*weights.shape[:-1], step.taps), biases[0].mT if biases else None


def _all_there(operands: Operands, step: Local, first: int | torch.SymInt) -> bool:
    """Whether queries stand at keys: at all of them, on a grid."""
    if step.grid:
        return statically_known_true(first == 0) and statically_known_true(operands.q_len == operands.k_len)
    last = operands.k_len - first - operands.q_len
    return statically_known_true(first >= 0) and statically_known_true(last >= 0)


def _convolved(v: Tensor, weights: Tensor, step: Local, first: int | torch.SymInt, queries: int) -> Tensor:
    """All taps at once, each channel of a head by itself, and each row where weights differ by row."""
    rows, heads, _, width = v.shape
    lengthened = [side for low, high in _sides(step)[::-1] for side in (-low, high)]
    if step.grid:
        count = _count(step)
        around = (0, 0, step.before, v.shape[2] - step.before - count)
        laid_out = v[:, :, step.before : step.before + count].mT.reshape(rows, heads * width, *step.grid)
        x = F.pad(laid_out, lengthened)
    else:
        around = (0, 0, 0, 0)
        x = F.pad(v, (0, 0, *lengthened))[:, :, first : first + queries + step.taps - 1].mT.flatten(1, 2)
    by_row = weights.shape[0] > 1
    kernel = weights.expand(weights.shape[0], heads, width, step.taps).reshape(-1, 1, *step.sizes)
    x = x.reshape(1, -1, *x.shape[2:]) if by_row else x
    out = _CONVOLUTIONS[len(step.sizes) - 1](x, kernel, groups=kernel.shape[0])
    out = out.reshape(rows, heads, width, -1).mT
    return F.pad(out, around) if step.grid else out


def _sides(step: Local) -> list[tuple[int, int]]:
    """How far it reaches on each axis, behind and ahead."""
    return [(min(axis), max(axis)) for axis in zip(*step.near, strict=True)]


def _tap_by_tap(operands: Operands, v: Tensor, weights: Tensor, step: Local, shown: Sequence[Expr]) -> Tensor:
    """Each neighbor where there is one that the mask shows."""
    arrays = operands.arrays(torch.float64)
    places = _places(operands)
    total = v.new_zeros((*operands.q.shape[:3], v.shape[-1]))
    if not v.numel():
        return total
    for n, (one, mask) in enumerate(zip(step.near, shown, strict=True)):
        if mask == e.false:
            continue
        at, there = places + step.offset(one), _neighbors(operands, step, places, one)
        there = there & arrays.tensor(arrays.read(mask), Sort.BOOL)
        index = at.clamp(0, v.shape[2] - 1).expand(*v.shape[:2], operands.q_len, 1).expand(-1, -1, -1, v.shape[3])
        total = total + torch.where(there, v.gather(2, index), 0.0) * weights[..., n].unsqueeze(-2)
    return total


def _places(operands: Operands) -> Tensor:
    """Where queries stand among the keys, [1 or batch, 1 or heads, queries, 1]."""
    at = operands.arrays(torch.float64).symbols[e.q]
    assert isinstance(at, Tensor)
    assert not isinstance(operands.k_positions, Tensor)
    at = at - torch.full((), operands.k_positions, dtype=torch.int64, device=at.device)  # type: ignore[arg-type]
    return at[(None,) * (4 - at.ndim)]


def _neighbors(operands: Operands, step: Local, places: Tensor, near: tuple[int, ...]) -> Tensor:
    """Whether there is a token beside each of these places, on the grid where there is one."""
    if not step.grid:
        return (places + near[0] >= 0) & (places + near[0] < operands.k_len)
    rest = places - step.before
    found = (rest >= 0) & (rest < _count(step))
    for size, away in zip(step.grid[::-1], near[::-1], strict=True):
        found = found & (rest % size + away >= 0) & (rest % size + away < size)
        rest = rest // size
    return found


def _on_grid(operands: Operands, step: Local) -> Tensor:
    """Which queries stand where there is something to convolve."""
    return _neighbors(operands, step, _places(operands), (0,) * len(step.sizes))


def _count(step: Local) -> int:
    count = 1
    for size in step.grid:
        count *= size
    return count
