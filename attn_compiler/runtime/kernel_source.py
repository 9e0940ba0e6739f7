"""The source of the kernels that a variant becomes, for people to read."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from attn_compiler.algebra.expr import Sort
from attn_compiler.algebra.variant import Variant
from attn_compiler.errors import ShapeError, did_you_mean
from attn_compiler.runtime import decode, states
from attn_compiler.runtime.cpp import DTYPES, objection
from attn_compiler.runtime.kernels import Shape
from attn_compiler.runtime.operator import dtype_name
from attn_compiler.runtime.reading import VariantLike, read_variant
from attn_compiler.runtime.triton_launch import asked
from attn_compiler.runtime.triton_programs import gathered, programs
from attn_compiler.targets.around import without
from attn_compiler.targets.cpp import coded as cpp_coded
from attn_compiler.targets.cpp.spec import Stored
from attn_compiler.targets.triton import coded as triton_coded


def _sources(shape: Shape) -> tuple[tuple[tuple[int, ...], str], ...]:
    return states.sources(shape) if states.is_alone(shape.variant) else decode.sources(shape)


_PRINT = {"cpp": (_sources, "//"), "triton": (programs, "#")}  # and how remarks begin
_OF_STORAGE = {"cpp": cpp_coded.objection, "triton": triton_coded.objection}
TARGETS = tuple(_PRINT)


def kernel_source(
    variant: VariantLike,
    *,
    q_len: int,
    k_len: int,
    heads: int,
    kv_heads: int | None = None,
    head_dim: int,
    dtype: str = "float32",
    target: str = "cpp",
    tables: Mapping[str, Tensor] | None = None,
    values: Mapping[str, int | float] | None = None,
    layer: int = 0,
    layers: int = 1,
) -> str:
    """The source of the kernel that attends by `variant`; of several, one after the other, where groups of heads differ.

    Of tables only their dtypes and axes matter; without, they have one axis per coordinate and hold 64-bit integers, truth
    values or numbers of `dtype`.
    """
    if target not in TARGETS:
        raise ShapeError(f'no target "{target}" has kernels to print{did_you_mean(target, TARGETS)}')
    shape = shape_of(
        variant, q_len=q_len, k_len=k_len, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype, target=target,
        tables=tables, values=values, layer=layer, layers=layers,
    )  # fmt: skip
    print_all, remark = _PRINT[target]
    found = print_all(shape)
    if len(found) == 1:
        return found[0][1]
    return "\n".join(f"{remark} Heads {', '.join(map(str, members))} of {heads}.\n{text}" for members, text in found)


def shape_of(
    variant: VariantLike,
    *,
    q_len: int,
    k_len: int,
    heads: int,
    kv_heads: int | None = None,
    head_dim: int,
    dtype: str = "float32",
    target: str = "cpp",
    tables: Mapping[str, Tensor] | None = None,
    values: Mapping[str, int | float] | None = None,
    layer: int = 0,
    layers: int = 1,
) -> Shape:
    """What kernels of a target are made for: one row of a batch that attends by `variant`."""
    kv_heads = kv_heads or heads
    if dtype not in DTYPES:
        raise ShapeError(f'no kernel takes "{dtype}"{did_you_mean(dtype, DTYPES)}')
    if min(heads, kv_heads, head_dim) < 1 or min(q_len, k_len) < 0 or heads % kv_heads:
        raise ShapeError(f"{heads} query heads of {head_dim} numbers and {kv_heads} key heads do not make an attention")
    read = read_variant(
        variant, Variant(), heads=heads, kv_heads=kv_heads, q_len=q_len, k_len=k_len, head_dim=head_dim, values=values,
        layer=layer, layers=layers,
    )  # fmt: skip
    if any(part.context for part in read.parts()):
        raise ShapeError("its `context` makes other keys of these first: ask for the kernel of those, without it")
    read = without(read)
    stored = _stored(read, dtype, tables or {})
    counted, multiplied = (True, True), asked(dtype) if target == "triton" else dtype
    shape = Shape(
        read, tuple(stored), tuple(stored.values()), True, True, 1, heads, kv_heads, q_len, k_len, head_dim, head_dim, multiplied,
        layer, layers, k_len - q_len, 0, (None,) * len(stored),
    )  # fmt: skip
    by_states = states.is_alone(read) if target == "cpp" else gathered(shape) is not None
    reason = None if by_states else objection(read, counted, stored, of_storage=_OF_STORAGE[target])
    if reason:
        raise ShapeError(f"the target {target}: {reason}")
    return shape


def _stored(variant: Variant, dtype: str, given: Mapping[str, Tensor]) -> dict[str, Stored]:
    """How the tables are stored: as those that are given, else as they are read."""
    by_sort = {Sort.BOOL: "bool", Sort.INDEX: "int64", Sort.REAL: dtype}
    found: dict[str, Stored] = {}
    for expression in variant.expressions():
        for node in expression.walk():
            if node.op == "table":
                name = str(node.value)
                table = given.get(name)
                as_read = Stored(by_sort[node.sort], len(node.args))
                found[name] = as_read if table is None else Stored(dtype_name(table.dtype), table.ndim)
    return dict(sorted(found.items()))
