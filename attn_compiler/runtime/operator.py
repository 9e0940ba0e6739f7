"""The operator behind which generated kernels run: in eager mode, in compiled graphs and in exported ones."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attn_compiler.algebra import wire
from attn_compiler.algebra.storage import PLAIN, Held
from attn_compiler.algebra.variant import Variant
from attn_compiler.errors import DerivativeError, ShapeError
from attn_compiler.runtime import decode, gradients, kernels, states, triton_decode, triton_gradients, triton_kernels
from attn_compiler.runtime.triton_launch import asked
from attn_compiler.targets.cpp.decode import MOST_QUERIES
from attn_compiler.targets.cpp.spec import K_POSITIONS, LONGEST, Q_POSITIONS, SEED, Stored
from attn_compiler.targets.operands import Operands
from attn_compiler.targets.rows import decoded, dim_of, without_cache
from attn_compiler.targets.torch_target import Result

_library = torch.library.Library("attn_compiler", "DEF")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "attend(Tensor q, Tensor k, Tensor v, Tensor[] tables, SymInt[] first, str what, str kept) -> (Tensor, Tensor)"
)
_library.define(  # type: ignore[no-untyped-call]
    "attend_backward(Tensor above, Tensor q, Tensor k, Tensor v, Tensor[] tables, SymInt[] first, str what, Tensor out, "
    "Tensor kept, bool[] wanted, Tensor? of_totals=None) -> Tensor[]"
)

# What is kept of each query besides its output. A cached graph holds these words: another layout needs other ones.
NOTHING, TOTAL, FOR_GRADIENTS, BOTH = "nothing", "log-sum-exp", "peak and mass", "log-sum-exp, peak and mass"
_TOTALS = (TOTAL, BOTH)
_LOOKING = ("cpp", "states")  # targets that look at tables to see who sees whom: kernels of others find out themselves
# In place of a target's name: k and v are rows of codes, as the storage of the cache says.
CODES: Mapping[str, str] = {"cpp": "codes", "triton": "triton, codes"}
_OF_CODES = {codes: target for target, codes in CODES.items()}

NOTHING_TOLD: Mapping[str, Tensor] = {}


def attend_generated(
    operands: Operands, variant: Variant, target: str, told: Mapping[str, Tensor] = NOTHING_TOLD, *, lse: bool = False
) -> Result:
    """Attend by the kernels of a target that has nothing against `operands` and `variant`, and which may be `told` more."""
    variant = variant if operands.training else _without_dropout(variant)
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
    if any(part.dropout for part in variant.parts()):  # drawn by a step of the graph, repeated where that is recomputed
        names.append(SEED)
        tables.append(torch.randint(1 << 62, (), dtype=torch.int64, device=operands.q.device))
    names += told
    tables += told.values()
    what = _written(variant, tuple(names), operands.layer, operands.layers, target)
    kept = _KEPT[lse, operands.differentiated]
    out, sums = torch.ops.attn_compiler.attend(operands.q, operands.k, operands.v, tables, first, what, kept)
    return out, sums if kept == TOTAL else sums[0] if kept == BOTH else None


_KEPT = {(False, False): NOTHING, (False, True): FOR_GRADIENTS, (True, False): TOTAL, (True, True): BOTH}


def _without_dropout(variant: Variant) -> Variant:
    if not any(part.dropout for part in variant.parts()):
        return variant
    groups = tuple((heads, replace(of_group, dropout=0.0)) for heads, of_group in variant.groups)
    return replace(variant, dropout=0.0, groups=groups)


@lru_cache(maxsize=1024)
def _written(variant: Variant, names: tuple[str, ...], layer: int, layers: int, target: str) -> str:
    return json.dumps([wire.write(variant), names, layer, layers, target])


@dataclass(frozen=True)
class _Call:
    """What the operator's text says, and all that follows from it whatever the operands are."""

    variant: Variant
    names: tuple[str, ...]
    layer: int
    layers: int
    target: str
    looked_at: tuple[bool, ...]  # whether what stands in a table decides who sees whom
    few: bool  # whether there are kernels for few queries
    held: Held | None  # how the rows are held that come in place of k and v


@lru_cache(maxsize=1024)
def _read(what: str) -> _Call:
    text, names, layer, layers, target = json.loads(what)
    variant = wire.read(text)
    decisive = kernels.decisive(variant) if target in _LOOKING else frozenset()
    plain = target in _OF_CODES or not any(part.storage != PLAIN for part in variant.parts())
    few = plain and target in _DECODE and SEED not in names
    held = variant.storage.kv_cache if target in _OF_CODES else None
    return _Call(variant, tuple(names), layer, layers, target, tuple(name in decisive for name in names), few, held)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, tables: Sequence[Tensor], first: Sequence[int], what: str, kept: str
) -> tuple[Tensor, Tensor]:
    q_len, k_len = q.shape[2], k.shape[2]
    if max(q_len, k_len, *map(abs, first)) >= LONGEST:
        raise ShapeError(f"kernels count up to {LONGEST} tokens; found {q_len} queries and {k_len} keys from {list(first)}")
    read = _read(what)
    if read.held is not None and q_len > MOST_QUERIES:  # many queries are worth bringing back what codes mean
        k, v, what = *(decoded(x, read.held, q.dtype) for x in (k, v)), _of_numbers(what)
        read = _read(what)
    out, sums = _empty(q, v, kept, what)
    if not out.numel() and not sums.numel():
        return out, sums
    q, k, v = _side_by_side(q, k, v)
    totals = None if kept == NOTHING else sums
    if q_len <= MOST_QUERIES and read.few and kept in (NOTHING, TOTAL):
        sizes = q.shape[1], k.shape[1], q.shape[3], out.shape[3]
        launched, layer = _decoding(what, _multiplied(q, read), sizes, tuple((t.dtype, t.ndim) for t in tables))
        _DECODE[read.target].run(launched, q, k, v, out, totals, tables, layer, first)
        return out, sums
    shape = _shape(q, k, v, tables, first, what)
    _RUN[read.target](shape, q, k, v, out, totals, tables, kept=_NUMBER_OF[kept])
    return out, sums


@lru_cache(maxsize=256)
def _of_numbers(what: str) -> str:
    """The same for k and v that have been decoded."""
    read = _read(what)
    return _written(without_cache(read.variant), read.names, read.layer, read.layers, _OF_CODES[read.target])


_NUMBER_OF = {NOTHING: 0, TOTAL: 0, FOR_GRADIENTS: 1, BOTH: 2}  # for kernels, which write nothing where there is no room
_RUN = {"cpp": kernels.run, "states": states.run, "triton": triton_kernels.run}
_FEW = {"cpp": decode, "triton": triton_decode}
_DECODE: Mapping[str, Any] = {**_FEW, **{codes: _FEW[target] for target, codes in CODES.items()}}
_DIFFERENTIATE = {"cpp": gradients.gradients, "triton": triton_gradients.gradients}


def _attend_backward(
    above: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: Sequence[Tensor],
    first: Sequence[int],
    what: str,
    out: Tensor,
    kept: Tensor,
    wanted: Sequence[bool],
    of_totals: Tensor | None = None,
) -> list[Tensor]:
    if not (out.numel() and k.numel()):
        return [x.zero_() for x in _empty_gradients(q, k, v, tables, wanted)]
    q, k, v, out, above = _side_by_side(q, k, v, out, above)
    given = gradients.Given(q, k, v, tables, out, kept, above, None if of_totals is None else of_totals.contiguous())
    of_q, of_k, of_v, of_tables = _DIFFERENTIATE[_read(what).target](_shape(q, k, v, tables, first, what), given, wanted)
    return [of_q, of_k, of_v, *(x for x in of_tables if x is not None)]


def _multiplied(q: Tensor, read: _Call) -> str:
    """As what a kernel multiplies operands."""
    dtype = dtype_name(q.dtype)
    return asked(dtype, q.device) if _OF_CODES.get(read.target, read.target) == "triton" else dtype


@lru_cache(maxsize=1024)
def _decoding(
    what: str, dtype: str, sizes: tuple[int, int, int, int], stored: tuple[tuple[torch.dtype, int], ...]
) -> tuple[Any, tuple[int, int]]:
    """The kernels for few queries, whatever their number and that of the keys; and the layer, of how many."""
    read, (heads, kv_heads, dim, value_dim) = _read(what), sizes
    shape = _shape_at(what, dtype, (0, heads, 0, dim), (0, kv_heads, 0, value_dim), stored, (0, 0), ())
    return _DECODE[read.target].launches(shape), (read.layer, read.layers)


def _shape(q: Tensor, k: Tensor, v: Tensor, tables: Sequence[Tensor], first: Sequence[int], what: str) -> kernels.Shape:
    looked_at = zip(_read(what).looked_at, tables, strict=True)
    contents = tuple([kernels.contents_of(table) if looked else None for looked, table in looked_at])
    stored = tuple([(t.dtype, t.ndim) for t in tables])
    return _shape_at(what, _multiplied(q, _read(what)), tuple(q.shape), tuple(v.shape), stored, tuple(first), contents)


@lru_cache(maxsize=1024)
def _shape_at(
    what: str,
    dtype: str,
    of_queries: tuple[int, ...],
    of_values: tuple[int, ...],
    stored: tuple[tuple[torch.dtype, int], ...],
    first: tuple[int, ...],
    contents: tuple[kernels.Contents | None, ...],
) -> kernels.Shape:
    """The shape of a call, found by what costs nothing to compare: it holds a whole variant."""
    read, (batch, heads, q_len, dim), (_, kv_heads, k_len, value_dim) = _read(what), of_queries, of_values
    counted = Q_POSITIONS not in read.names, K_POSITIONS not in read.names
    sizes = batch, heads, kv_heads, q_len, k_len, dim, value_dim
    return kernels.Shape(
        read.variant, read.names, tuple(Stored(dtype_name(of), axes) for of, axes in stored), *counted, *sizes,
        dtype, read.layer, read.layers, first[0], first[1], contents,
    )  # fmt: skip


def _side_by_side(*operands: Tensor) -> tuple[Tensor, ...]:
    """Operands whose rows lie in one piece."""
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in operands)


def _empty(q: Tensor, v: Tensor, kept: str, what: str) -> tuple[Tensor, Tensor]:
    """Room for the result, laid out as models want it: they transpose heads and tokens, which then costs nothing."""
    batch, heads, q_len, _ = q.shape
    held = _read(what).held
    width = v.shape[3] if held is None else dim_of(v.shape[3], held)
    out = q.new_empty_strided((batch, heads, q_len, width), (q_len * heads * width, width, heads * width, 1))
    of_queries = (batch, heads, q_len)
    sizes = {NOTHING: (0,), TOTAL: of_queries, FOR_GRADIENTS: (2, *of_queries), BOTH: (3, *of_queries)}
    return out, q.new_empty(sizes[kept], dtype=torch.float32)


def _empty_gradients(q: Tensor, k: Tensor, v: Tensor, tables: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor]:
    of_tables = (t.new_empty(t.shape) for t, yes in zip(tables, wanted, strict=True) if yes)
    return [*(gradients.empty_like_tokens(x) for x in (q, k, v)), *of_tables]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, tables, ctx.first, ctx.what, ctx.kept = inputs
    out, kept = output
    if ctx.kept not in _TOTALS:
        ctx.mark_non_differentiable(kept)
    ctx.save_for_backward(q, k, v, out, kept, *tables)


def _differentiate(ctx: Any, above: Tensor, of_kept: Tensor) -> tuple[object, ...]:
    q, k, v, out, kept, *tables = ctx.saved_tensors
    of_totals = of_kept if ctx.kept == TOTAL else of_kept[0] if ctx.kept == BOTH else None
    if ctx.kept in (NOTHING, TOTAL):  # nothing required gradients where the call was recorded
        out, kept = torch.ops.attn_compiler.attend(q, k, v, tables, ctx.first, ctx.what, FOR_GRADIENTS)
    elif ctx.kept == BOTH:
        kept = kept[1:]
    wanted = [bool(yes) for yes in ctx.needs_input_grad[3]]
    found = torch.ops.attn_compiler.attend_backward(above, q, k, v, tables, ctx.first, ctx.what, out, kept, wanted, of_totals)
    of_tables = iter(found[3:])
    return *found[:3], [next(of_tables) if yes else None for yes in wanted], None, None, None


def _differentiate_again(ctx: Any, *above: Tensor) -> None:
    raise DerivativeError(
        "gradients of gradients were asked for (`create_graph=True`), which generated kernels do not have; "
        'attend with `target="torch"`'
    )


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` and the like."""
    return str(dtype).removeprefix("torch.")


for _device in ("CPU", "CUDA"):
    _library.impl("attend", _attend, _device)  # type: ignore[no-untyped-call]
    _library.impl("attend_backward", _attend_backward, _device)  # type: ignore[no-untyped-call]
torch.library.register_fake(
    "attn_compiler::attend",
    lambda q, k, v, tables, first, what, kept: _empty(q, v, kept, what),
    lib=_library,
)
torch.library.register_fake(
    "attn_compiler::attend_backward",
    lambda above, q, k, v, tables, first, what, out, kept, wanted, of_totals=None: _empty_gradients(q, k, v, tables, wanted),
    lib=_library,
)
torch.library.register_autograd("attn_compiler::attend", _differentiate, setup_context=_remember, lib=_library)
torch.library.register_autograd("attn_compiler::attend_backward", _differentiate_again, lib=_library)
