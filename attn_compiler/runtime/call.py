"""Checks the arguments of one call and brings them into the form that targets take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache

import torch
from torch import Tensor

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.context import Context, Merge, added
from attn_compiler.algebra.expr import Expr, Sort
from attn_compiler.algebra.output import Local, component, expressions_of, tap
from attn_compiler.algebra.variant import DerivedTable, Variant, reads
from attn_compiler.errors import ShapeError, TableError, did_you_mean
from attn_compiler.targets.operands import Operands
from attn_compiler.torch_private import statically_known_true

Positions = int | Tensor | None
Counts = Mapping[Expr, tuple[int | torch.SymInt | None, str]]  # how many values a coordinate has, and what these are


def operands_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    variant: Variant,
    tables: Mapping[str, Tensor],
    q_positions: Positions,
    k_positions: Positions,
    layer: int,
    layers: int,
    training: bool,
) -> Operands:
    """The operands of one call, whose shapes have been checked; tables and positions are checked here."""
    batch, heads, q_len, _ = q.shape
    if q_positions is None and isinstance(k_positions, Tensor) and q_len > k.shape[-2]:
        raise ShapeError(f"{q_len} queries cannot stand at the last of {k.shape[-2]} keys' positions: give `q_positions`, too")
    read = {**tables, **derived_tables(variant, k.shape[-2], q.device)}
    _check_tables(variant, read, q.device)
    operands = Operands(
        q=q,
        k=k,
        v=v,
        tables=read,
        q_positions=None if q_positions is None else _positions(q_positions, batch, q_len, "q_positions"),
        k_positions=_positions(0 if k_positions is None else k_positions, batch, k.shape[-2], "k_positions"),
        head_numbers=tuple(range(heads)),
        heads=int(heads),  # counted while tracing, too: only lengths and rows may be symbols
        kv_heads=int(k.shape[1]),
        layer=layer,
        layers=layers,
        training=training,
        differentiated=torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *read.values())),
        risky=_risky(tables) if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)) else frozenset(),
    )
    _check_sizes(variant, operands)
    return operands


def _risky(tables: Mapping[str, Tensor]) -> frozenset[str]:
    """Real numbers that nobody trains may be fills, in which every score of a row vanishes."""
    return frozenset(name for name, table in tables.items() if table.dtype.is_floating_point and not table.requires_grad)


def derived_tables(variant: Variant, length: int, device: torch.device) -> dict[str, Tensor]:
    """The tables that follow from the number of keys, made once for each."""
    return {table.name: _derived(table, int(length), device) for part in variant.parts() for table in part.derived}


@lru_cache(maxsize=64)
def _derived(table: DerivedTable, length: int, device: torch.device) -> Tensor:
    return torch.as_tensor(list(table.make(length)), dtype=torch.int64, device=device)


def check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse operands that do not fit each other."""
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ShapeError(f"q, k and v are [batch, heads, tokens, dim]; found {shapes}")
    if not q.dtype == k.dtype == v.dtype:
        raise ShapeError(f"q, k and v must have one dtype; found {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.dtype.is_floating_point:
        raise ShapeError(f"q, k and v must be real numbers; found {q.dtype}")
    if not q.device == k.device == v.device:
        raise ShapeError(f"q, k and v must be on one device; found {q.device}, {k.device}, {v.device}")
    if q.shape[0] != k.shape[0] or q.shape[0] != v.shape[0]:
        raise ShapeError(f"q, k and v must have the same number of rows (axis 0); found {shapes}")
    if k.shape[1] != v.shape[1] or k.shape[2] != v.shape[2]:
        raise ShapeError(f"k and v must have the same heads and tokens (axes 1 and 2); found {shapes}")
    if q.shape[3] != k.shape[3]:
        raise ShapeError(f"q and k must have the same dim (axis 3); found {shapes}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ShapeError(f"the {q.shape[1]} heads of q must be a multiple of the {k.shape[1]} heads of k and v (axis 1)")


def _check_tables(variant: Variant, tables: Mapping[str, Tensor], device: torch.device) -> None:
    for node in reads(variant):
        name, given = str(node.value), sorted(tables)
        if name not in tables:
            known = did_you_mean(name, given) if given else "; none were given"
            raise TableError(f'the variant reads a table "{name}" that is not in `tables`{known}')
        stored = tables[name]
        if stored.device != device:
            raise TableError(f'the table "{name}" is on {stored.device}, q, k and v are on {device}')
        if stored.ndim > len(node.args):
            raise TableError(
                f'the table "{name}" has {stored.ndim} axes, {list(stored.shape)}, but is read at {len(node.args)} coordinates'
            )
        if 0 in stored.shape and stored.ndim:
            raise TableError(f'the table "{name}" is empty: {list(stored.shape)}')
        _check_dtype(name, stored.dtype, node.sort)


def _check_sizes(variant: Variant, operands: Operands) -> None:
    """A table that is read at a coordinate itself holds a number for each of its values, or one for all of them."""
    first_query, first_key = operands.first_query, operands.k_positions
    needed: Counts = {
        e.b: (operands.q.shape[0], "rows"),
        e.h: (operands.heads, "heads"),
        e.kv: (operands.kv_heads, "heads of keys"),
        e.layer: (operands.layer + 1, "layers"),
        e.q: (None if first_query is None else first_query + operands.q_len, "tokens"),
        e.k: (None if isinstance(first_key, Tensor) else first_key + operands.k_len, "tokens"),
    }
    for node in reads(variant):
        _check_axes(node, operands.tables[str(node.value)], needed)
    for expression, own in _beside_tokens(variant, operands):
        for node in expression.walk():
            if node.op == "table" and node.value in operands.tables:  # others are made of the block's input
                _check_axes(node, operands.tables[str(node.value)], own, exactly=True)


def _beside_tokens(variant: Variant, operands: Operands) -> Iterator[tuple[Expr, Counts]]:
    """What stands around an attention, with the coordinates that are its own."""
    dims = [(x.shape[-1], "components") for x in (operands.k, operands.v)]
    for part in variant.parts():
        for step in part.output:
            taps = step.taps if isinstance(step, Local) else None
            own = {component: dims[1], tap: (taps, "taps"), e.i: (operands.q_len, "queries")}
            yield from ((one, own) for one in expressions_of(step))
        for context in part.context:
            yield from _around_keys(context, operands)


def _around_keys(context: Context | Merge, operands: Operands) -> Iterator[tuple[Expr, Counts]]:
    tokens: Counts = {e.b: (operands.q.shape[0], "rows"), e.q: (operands.q_len, "tokens"), e.k: (operands.k_len, "tokens")}
    if isinstance(context, Context) and context.how == "extra":
        for one, x in zip(context.expressions(), (operands.k, operands.v), strict=True):
            yield one, {component: (x.shape[-1], "components"), added: (context.count, "keys")}
        return
    own = {**tokens, added: (context.count, "agents")} if isinstance(context, Context) else tokens
    yield from ((one, own) for one in context.expressions())


def _check_axes(node: Expr, stored: Tensor, needed: Counts, *, exactly: bool = False) -> None:
    for axis, (at, size) in enumerate(zip(node.args[len(node.args) - stored.ndim :], stored.shape, strict=True)):
        count, what = needed.get(at, (None, ""))
        if count is None or not statically_known_true(size > 1):
            continue
        if statically_known_true(size < count) or (exactly and statically_known_true(size > count)):
            least = "" if exactly else "at least "
            raise TableError(
                f'the table "{node.value}", {list(stored.shape)}, is read for {count} {what} at its axis {axis}: '
                f"give {least}{count}, or 1 for what all have in common"
            )


def _check_dtype(name: str, dtype: torch.dtype, sort: Sort) -> None:
    real = dtype.is_floating_point
    fits = {Sort.BOOL: dtype == torch.bool, Sort.INDEX: not real and dtype != torch.bool, Sort.REAL: dtype != torch.bool}[sort]
    if not fits or dtype.is_complex:
        wanted = {Sort.BOOL: "torch.bool", Sort.INDEX: "an integer dtype", Sort.REAL: "a floating dtype"}[sort]
        raise TableError(f'the table "{name}" must have {wanted}; found {dtype}')


def _positions(given: int | Tensor, batch: int, length: int, name: str) -> int | Tensor:
    """A first position, or a tensor [1 or batch, 1, length]."""
    if not isinstance(given, Tensor):
        return given
    if given.dtype.is_floating_point or given.dtype == torch.bool:
        raise ShapeError(f"{name} must be integers; found {given.dtype}")
    shape, given = tuple(given.shape), given.to(torch.int64)
    if shape == () or (shape == (batch,) and batch != length):
        return given.reshape(-1, 1, 1) + torch.arange(length, device=given.device)
    if shape == (length,) and (batch != length or length == 1):
        return given.reshape(1, 1, length)
    if shape in ((batch, length), (1, length)):
        return given[:, None]
    if shape == (length,):
        raise ShapeError(f"{name} of shape {list(shape)} could be one per row or one per token: give [batch, tokens]")
    raise ShapeError(
        f"{name} is a number, [{batch}] (each row's first), [{length}] or [{batch}, {length}] (all of them); found {list(shape)}"
    )
