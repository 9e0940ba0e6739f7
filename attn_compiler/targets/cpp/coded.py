"""What the C++ kernels carry of a storage: operands as codes of a byte, whose scales are tables that a score reads."""

from __future__ import annotations

from collections.abc import Callable

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.expr import Expr, Sort
from attn_compiler.algebra.storage import PLAIN, Held, Scaling
from attn_compiler.algebra.variant import SOFTMAX, Variant
from attn_compiler.targets import rows
from attn_compiler.targets.operands import PLACE

Q_SCALE, K_SCALE, K_MEAN = "attn.q_scale", "attn.k_scale", "attn.q_dot_mean"
BYTE = 127  # the largest code
WIDEST = 512  # numbers of a head whose products' sums floats still hold


def tables(variant: Variant) -> tuple[str, ...]:
    """The tables [row, head, token] of float32 that the kernel of a storage reads."""
    qk = variant.storage.qk
    return () if qk is None else (Q_SCALE, K_SCALE, K_MEAN) if qk.smooth else (Q_SCALE, K_SCALE)


def score(variant: Variant) -> Expr:
    """The score, where what a kernel calls the product of q and k may be that of their codes."""
    if variant.storage.qk is None:
        return variant.score.substitute({e.score: e.dot * variant.scale})
    of_query = e.table(Q_SCALE, e.b, e.h, e.i, sort=Sort.REAL)
    product = e.dot * e.table(K_SCALE, e.b, e.kv, PLACE, sort=Sort.REAL)
    shared = e.table(K_MEAN, e.b, e.h, e.i, sort=Sort.REAL) if variant.storage.qk.smooth else e.const(0.0)

    def times(scale: Expr) -> Expr:
        scaled = product * (of_query * scale)
        return scaled + shared * scale if variant.storage.qk and variant.storage.qk.smooth else scaled

    return variant.score.substitute({e.score: times(variant.scale), e.dot: times(e.const(1.0))})


def objection(variant: Variant, against: Callable[[str, Held], str | None] | None = None) -> str | None:
    """What the kernels have against a storage; None: nothing. `against` says what a target has against one operand's."""
    storage = variant.storage
    if storage == PLAIN:
        return None
    if variant.dropout:
        return "its kernels drop no weights where operands are held in few bits"
    if storage.qk and variant.score.mentions(e.q_norm, e.k_norm):
        return "its kernels know no norms of codes"
    if storage.pv and variant.normalizer.weight != SOFTMAX.weight:
        return f"its kernels hold weights of a softmax, not of `{variant.normalizer.name}`"
    found = ((against or _against)(operand, how) for operand, how in (("qk", storage.qk), ("pv", storage.pv)) if how)
    return next(filter(None, found), None)


def _against(operand: str, how: Held) -> str | None:
    if is_bfloat16(how) and operand == "pv":
        return None
    numbers = how.numbers
    if numbers.scaling is not Scaling.REAL or numbers.spacing != 1.0 or numbers.largest > BYTE:
        return f"its kernels multiply whole numbers of a byte, not {numbers.name}"
    return None if how.largest else against_scales(operand, how)


def against_scales(operand: str, how: Held) -> str | None:
    """What kernels have against what shares a scale, and what is kept apart."""
    shared = {"qk": ("token", "block", "head"), "pv": ("channel", "head")}[operand]
    if how.per is None or how.per.name not in shared:
        return f"its kernels take the scales of `{operand}` per {', '.join(shared)}; found {how.per}"
    if how.outliers < float("inf") or (how.smooth and operand == "pv"):
        return "its kernels keep nothing apart but the means of k"
    return None


def rows_of(how: Held) -> str:
    """The type of the codes in rows of a cache, as the kernels call it; nothing where they know none."""
    numbers = how.numbers
    if numbers.scaling is Scaling.NONE:
        return {7: "bfloat16", 10: "float16"}.get(numbers.mantissa, "")
    if rows.objection(how):
        return ""
    return {(7, 7): "whole8", (3, 3): "whole4", (3, -6): "e4m3", (2, -14): "e5m2"}.get((numbers.mantissa, numbers.smallest), "")


def is_bfloat16(how: Held) -> bool:
    """Whether numbers are held as the machine holds them in bfloat16."""
    return how.numbers.scaling is Scaling.NONE and how.numbers.mantissa == 7
