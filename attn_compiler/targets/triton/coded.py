"""What the Triton kernels carry of a storage: operands as codes of a byte, whole numbers as in C++, and floats besides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from attn_compiler.algebra.storage import Held, Scaling
from attn_compiler.algebra.variant import Variant
from attn_compiler.targets.cpp import coded
from attn_compiler.targets.cpp.coded import BYTE, rows_of
from attn_compiler.targets.cpp.spec import Spec, Stored
from attn_compiler.targets.triton.skeleton import written

V_SCALE = "attn.v_scale"
NAMES = ("back",)  # that statements here give to something
_FLOATS = {"e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2"}
_CODES = ("whole8", "whole4", *_FLOATS)  # that rows of a cache are made of, as kernels call them


def objection(variant: Variant) -> str | None:
    """What the kernels have against a storage; None: nothing."""
    return coded.objection(variant, _against)


def _against(operand: str, how: Held) -> str | None:
    scaled = how.numbers.scaling
    if scaled is Scaling.NONE and operand == "pv":
        return None
    if scaled is not Scaling.REAL or not stored(how):
        return f"its kernels multiply whole numbers and floats of a byte, not {how.numbers.name}"
    return coded.against_scales(operand, how)


def stored(how: Held) -> str:
    """The dtype of the tensor that holds an operand; nothing where no kernel knows one."""
    numbers = how.numbers
    if numbers.scaling is Scaling.REAL and numbers.spacing == 1.0 and numbers.largest <= BYTE:
        return "int8"
    name = rows_of(Held(numbers))
    return _FLOATS.get(name, name if numbers.scaling is Scaling.NONE else "")


def needs_e4m3(variant: Variant) -> bool:
    """Whether a machine has to multiply floats of a byte that not all of them know."""
    operands = (how for part in variant.parts() for how in (part.storage.qk, part.storage.pv) if how)
    return any(stored(how) == _FLOATS["e4m3"] for how in operands)


def held(spec: Spec) -> Mapping[str, str]:
    """The operands that are held otherwise than they come, and the dtypes of their tensors."""
    storage = spec.variant.storage
    found = {"q": storage.qk, "k": storage.qk, "v": storage.pv}
    rows = dict.fromkeys(("k", "v"), "uint8" if spec.rows in _CODES else spec.rows) if spec.rows else {}
    return {**{name: stored(how) for name, how in found.items() if how}, **rows}


def multiplied(spec: Spec) -> tuple[str, str]:
    """The dtypes of what is multiplied, q with k and weights with v: what a cache holds is brought back before that."""
    of = {} if spec.rows else held(spec)
    return of.get("q", spec.dtype), of.get("v", spec.dtype)


def encoder() -> str:
    """The program that makes codes."""
    return written("encode.py", {}, {})


def said(how: Held) -> tuple[float, str, int | str]:
    """What the encoder has to know of an operand: the largest code, the dtype of its tensor, and what shares a scale."""
    assert how.per is not None
    return how.numbers.largest, stored(how), {"token": 1, "block": how.per.size}.get(how.per.name, how.per.name)


def tables(variant: Variant) -> tuple[str, ...]:
    """The tables [row, head, token] or [row, head, channel] of float32 that the kernel of a storage reads."""
    return (*coded.tables(variant), *([V_SCALE] if _most(variant.storage.pv) else []))


def with_scales(spec: Spec) -> Spec:
    """The spec that reads the scales of v, too."""
    read = {**dict(spec.tables), **dict.fromkeys(tables(spec.variant), Stored("float32", 3))}
    return replace(spec, tables=tuple((name, read[name]) for name in sorted(read)))


def products(spec: Spec) -> Mapping[str, Sequence[str]]:
    """The two products of a kernel: of queries with keys, and of weights with values."""
    qk, pv = spec.variant.storage.qk, spec.variant.storage.pv
    dot = "tl.dot(queries, keys.T).to(tl.float32)" if qk else 'tl.dot(queries, keys.T, input_precision="ieee")'
    added = 'tl.dot(weight.to(values.dtype), values, acc, input_precision="ieee")'
    if spec.rows in _CODES:
        dot += " * back.T"
    if pv and _most(pv):
        added = f"{'of_bytes' if stored(pv) == 'int8' else 'of_floats'}(weight, values, acc, {_most(pv):g})"
    return {"dot": [f"dot = {dot}"], "sum": [f"acc = {added}"]}


def brought_back(spec: Spec, v_scale: str) -> Sequence[str]:
    """The statements that bring back what codes of weights times codes of v add up to."""
    most = _most(spec.variant.storage.pv)
    return [f"acc *= read({v_scale}, (b, kv, tl.arange(0, VALUE_WIDTH)[None, :])) / {most:g}"] if most else []


def loaded(spec: Spec) -> Mapping[str, Sequence[str]]:
    """How the kernel for few queries loads keys and values; where a cache holds codes, these are exact in any type."""
    loads = {name: _load(spec.rows, *where) for name, where in _WHERE.items()}
    if spec.rows in _CODES:
        back = {"keys": "keys.to(queries.dtype)", "values": "(values * back).to(queries.dtype)"}
        return {name: [f"{name}, back = {load}", f"{name} = {back[name]}"] for name, load in loads.items()}
    return {name: [f"{name} = {load}" + (".to(queries.dtype)" if spec.rows else "")] for name, load in loads.items()}


_WHERE = {"keys": ("k", "DIM", "WIDTH"), "values": ("v", "VALUE_DIM", "VALUE_WIDTH")}


def _load(rows: str, operand: str, dim: str, width: str) -> str:
    if rows not in _CODES:
        return f"some(rows({operand}, b, kv, j.T), wanted, {dim}, {width})"
    return f"{rows}(coded({operand}, b, kv, j.T, {dim}{' // 2' if rows == 'whole4' else ''}), wanted, {dim}, {width})"


def _most(pv: Held | None) -> float:
    """The code of a weight of one; 0 where weights have no codes."""
    if pv is None or pv.numbers.scaling is Scaling.NONE:
        return 0.0
    return pv.numbers.unsigned or pv.numbers.largest
