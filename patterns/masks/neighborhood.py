"""Neighborhoods on a geometry, by NATTEN's rule on each axis: stride leaders, dilation, causal axes, borders."""

from __future__ import annotations

from typing import Literal, NamedTuple

from attn_compiler.algebra.expr import Expr, const, every, k, maximum, minimum, q, same, where
from attn_compiler.errors import LanguageError
from attn_compiler.planning.geometry import Geometry
from attn_compiler.planning.words import CountPerAxis, FlagPerAxis, Seen

Edge = Literal["shift", "clip", "zero", "wrap", "replicate"]


class Axis(NamedTuple):
    """One axis of the rule: the window before it meets a border, where it holds, and what lies beyond."""

    keep: Expr
    width: Expr
    inside: Expr
    times: Expr


def neighborhood(
    kernel: CountPerAxis,
    stride: CountPerAxis = (1,),
    dilation: CountPerAxis = (1,),
    causal: FlagPerAxis = (False,),
    edge: Edge = "shift",
    *,
    geometry: Geometry,
) -> Seen:
    """NATTEN's rule per axis of the geometry, where a number stands for all axes."""
    kernels, strides, dilations = (geometry.per_axis(x) for x in (kernel, stride, dilation))
    flags, here, there = geometry.per_axis(causal), geometry.coordinates(q), geometry.coordinates(k)
    axes = [
        _axis(here[n], there[n], size, kernels[n], strides[n], dilations[n], flags[n], edge)
        for n, size in enumerate(geometry.size)
    ]
    keep = every(geometry.inside(q), geometry.inside(k), *(axis.keep for axis in axes))
    width, inside, times = axes[0].width, axes[0].inside, axes[0].times
    for axis in axes[1:]:
        width, inside, times = width * axis.width, inside * axis.inside, times * axis.times
    if edge == "zero":
        return Seen(keep, phantoms=where(geometry.inside(q), width - inside, 0))
    return Seen(keep, times=times) if edge == "replicate" else Seen(keep)


def _axis(x: Expr, y: Expr, size: Expr, w: int, stride: int, dilation: int, causal: bool, edge: Edge) -> Axis:
    if stride > w:
        raise LanguageError(f"the stride of a neighborhood is at most its kernel, {w}, not {stride}")
    if edge in ("shift", "wrap") and size.is_const and isinstance(size.value, int) and w * dilation > size.value:
        raise LanguageError(f"kernel times dilation is {w * dilation}, more than the {size.value} tokens of the axis")
    own, i, j = (x, x, y) if dilation == 1 else (x % dilation, x // dilation, y // dilation)
    length = size if dilation == 1 else (size - own + (dilation - 1)) // dilation
    leader = i
    if stride > 1:
        leader = minimum(i // stride * stride + (stride - 1 if causal else stride // 2), length - 1)
    start = leader - (w - 1 if causal else w // 2)
    end = i + 1 if causal else start + w
    low, high = maximum(start, 0), minimum(end, length)
    if edge == "shift" and not causal:
        low = minimum(low, length - w)
        high = low + w
    keep = (j - start) % length < end - start if edge == "wrap" else (low <= j) & (j < high)
    together = keep if dilation == 1 else same(own, y % dilation) & keep
    before = where(same(j, 0), maximum(const(0) - start, 0), 0)
    after = where(same(j, length - 1), maximum(end - length, 0), 0)
    return Axis(together, end - start, high - low, before + after + 1)
