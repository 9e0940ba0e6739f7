"""Attention that runs outside of any graph: `attend`, and `reference`, which is its meaning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import wraps
from inspect import signature
from typing import Any, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.expr import Expr, Sort
from attn_compiler.algebra.storage import Held, Storage
from attn_compiler.algebra.variant import Variant
from attn_compiler.errors import ShapeError, did_you_mean
from attn_compiler.runtime.automatic import automatic
from attn_compiler.runtime.call import Positions, check_shapes, operands_of
from attn_compiler.runtime.coded_rows import codes_objection
from attn_compiler.runtime.operator import CODES
from attn_compiler.runtime.reading import VariantLike, read_scale, read_variant
from attn_compiler.runtime.targets import OPT_IN, TARGETS, Attends
from attn_compiler.targets.operands import PLACE, Operands
from attn_compiler.targets.reference import attend_reference
from attn_compiler.targets.rows import Codes, without_cache
from attn_compiler.targets.torch_target import Result
from attn_compiler.torch_private import taken_whole

Target = Literal["auto", "cpp", "triton", "torch", "flex", "reference"]
Attended = Tensor | tuple[Tensor, Tensor]
P = ParamSpec("P")
R = TypeVar("R")
SITE_BIAS = "site.bias"  # the name under which `bias=` is read


def in_one_piece(function: Callable[P, R]) -> Callable[P, R]:
    """In a compiled model a call is part of the graph; around one with objects that no graph can hold, the graph breaks."""
    traced = taken_whole(function)
    apart = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    names = tuple(signature(function).parameters)

    @wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> R:
        if not torch.compiler.is_compiling():
            return function(*args, **options)
        named = {**dict(zip(names, args, strict=False)), **options}
        given: Any = {name: x for name, x in named.items() if x is not None}  # which no graph can hold
        held = not any(isinstance(x, Variant | Expr | Codes) for x in given.values())
        whole: Callable[..., R] = traced if held else apart
        return whole(**given)

    return call


@in_one_piece
def attend(
    q: Tensor,
    k: Tensor | Codes,
    v: Tensor | Codes,
    variant: VariantLike,
    *,
    scale: float | Expr | str | None = None,
    bias: Tensor | None = None,
    tables: Mapping[str, Tensor] | None = None,
    values: Mapping[str, int | float] | None = None,
    q_positions: Positions = None,
    k_positions: Positions = None,
    layer: int = 0,
    layers: int = 1,
    return_lse: bool = False,
    target: Target = "auto",
    training: bool = False,
) -> Attended:
    """Attend with `q`, `k`, `v` as [batch, heads, tokens, dim]; key and value heads may be fewer (GQA). Differentiable.

    Positions are the first one's number, one such number per row, or all of them; without, the last query meets the last key.
    Where k and v are codes, as `encode` makes them, few queries read these as they lie, others what they mean.
    `training` activates the variant's dropout. The target `auto` is what a plan would choose for a site like this call.
    """
    codes = _codes(k, v)
    if codes is not None:
        k, v = (x.like() for x in codes)
    assert not isinstance(k, Codes)
    assert not isinstance(v, Codes)
    place = e.k if k_positions is None else PLACE
    site = _with_site(variant if isinstance(variant, Variant) else Variant(), scale, bias, place)
    check_shapes(q, k, v)
    meaning = read_variant(
        site if isinstance(variant, Variant) else variant, site, heads=q.shape[1], kv_heads=k.shape[1], q_len=q.shape[2],
        k_len=k.shape[2], head_dim=q.shape[3], values=values, layer=layer, layers=layers,
    )  # fmt: skip
    given = dict(tables or {}) if bias is None else {**(tables or {}), SITE_BIAS: bias}
    operands = operands_of(q, k, v, meaning, given, q_positions, k_positions, layer, layers, training)
    if codes is not None:
        operands, meaning = replace(operands, codes=codes), _of_cache(meaning, codes[0].held)
        reader: Target = "cpp" if target == "auto" else target
        reads = reader in CODES and not codes_objection(operands, meaning)
        if reads and not TARGETS[reader].refuse(operands, meaning, lse=return_lse):
            target = reader
        else:
            operands = operands.decoded()
    return _attended(carried(operands, meaning, return_lse, target), return_lse)


def _codes(k: Tensor | Codes, v: Tensor | Codes) -> tuple[Codes, Codes] | None:
    """Keys and values that are codes; None where they are numbers."""
    if isinstance(k, Codes) and isinstance(v, Codes):
        if k.held != v.held:
            raise ShapeError(f"k and v must be held in the same way; found {k.held}, and {v.held}")
        return k, v
    if isinstance(k, Codes) or isinstance(v, Codes):
        raise ShapeError("k and v must both be codes, or both be numbers: `encode` makes the ones of the others")
    return None


def _of_cache(variant: Variant, held: Held) -> Variant:
    """The variant of numbers that come out of a cache which holds them as it says."""
    other = next((x.storage.kv_cache for x in variant.parts() if x.storage.kv_cache not in (None, held)), None)
    if other is not None:
        raise ShapeError(f"the variant's cache is held in {other}, and k and v in {held}")
    if any(part.order is not None and Storage(kv_cache=part.storage.kv_cache).shares_among_tokens for part in variant.parts()):
        raise ShapeError(f"k and v are held in {held}, blocks of tokens as they come, and the variant has an `order` of its own")
    return without_cache(variant)


def reference(
    q: Tensor,
    k: Tensor | Codes,
    v: Tensor | Codes,
    variant: VariantLike,
    *,
    scale: float | Expr | str | None = None,
    bias: Tensor | None = None,
    tables: Mapping[str, Tensor] | None = None,
    values: Mapping[str, int | float] | None = None,
    q_positions: Positions = None,
    k_positions: Positions = None,
    layer: int = 0,
    layers: int = 1,
    return_lse: bool = False,
    training: bool = False,
) -> Attended:
    """Attend as `attend` does, densely and in float64: the meaning of a variant."""
    return attend(
        q, k, v, variant, scale=scale, bias=bias, tables=tables, values=values, q_positions=q_positions, k_positions=k_positions,
        layer=layer, layers=layers, return_lse=return_lse, target="reference", training=training,
    )  # fmt: skip


def carried(operands: Operands, variant: Variant, lse: bool, target: str) -> Result:
    """Attend on the target of that name, which may refuse the call."""
    if target == "reference":
        return attend_reference(operands, variant, lse=lse)
    known: Mapping[str, Attends] = {**TARGETS, **OPT_IN}
    if target != "auto" and target not in known:
        raise ShapeError(f'no target "{target}" here{did_you_mean(target, ("auto", "reference", *known))}')
    chosen = automatic(operands, variant, lse=lse) if target == "auto" else known[target]
    reason = chosen.refuse(operands, variant, lse=lse)
    if reason:
        raise ShapeError(f"the target {chosen.name}: {reason}")
    return chosen.attend(operands, variant, lse=lse)


def _attended(result: Result, lse: bool) -> Attended:
    out, totals = result
    if not lse:
        return out
    assert totals is not None
    return out, totals.to(torch.promote_types(out.dtype, torch.float32))


def _with_site(variant: Variant, scale: float | Expr | str | None, bias: Tensor | None, place: Expr) -> Variant:
    """The variant where the site scales by `scale` and adds `bias`, which its own score then changes further."""
    if scale is None and bias is None:
        return variant
    added = e.table(SITE_BIAS, e.b, e.h, e.i, place, sort=Sort.REAL)

    def change(one: Variant) -> Variant:
        if scale is not None:
            one = replace(one, scale=read_scale(scale))
        if bias is not None:
            one = replace(one, score=one.score.substitute({e.score: e.score + added}))
        return one

    return replace(change(variant), groups=tuple((heads, change(of_group)) for heads, of_group in variant.groups))
