"""Runs the kernel of linear attention: no schedule, only how far ahead of a query its latest key stands."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.variant import Variant, passed_over
from attn_compiler.planning.site import UNKNOWN_LENGTH
from attn_compiler.runtime.compiler import call, load
from attn_compiler.runtime.kernels import WORTH_THREADS, Shape, spec_at, table_words
from attn_compiler.targets.cpp.spec import spec_of
from attn_compiler.targets.cpp.states import GATHERED, inlined, serves, stated, states
from attn_compiler.targets.fading import Fading, Logs, logs_of, shown_of
from attn_compiler.targets.featured import featured
from attn_compiler.targets.gathered import pays
from attn_compiler.targets.operands import Operands
from attn_compiler.targets.past import Earlier
from attn_compiler.torch_private import likely

SHORTEST = 512  # queries of a segment: the keys before them are added up twice
WIDEST = 512  # features of a state that stays in the cache
LOG_AT_Q, LOG_AT_K, SHOWN = "attn.log_at_q", "attn.log_at_k", "attn.shown"


@dataclass(frozen=True)
class Launch:
    """The kernel of a call, and what it is told besides its operands."""

    run: Callable[[int], object]
    behind: int | None
    numbers: tuple[int, ...]  # the places of its tables among those of the call


def prepared(operands: Operands, variant: Variant) -> tuple[Operands, Variant, Mapping[str, Tensor]]:
    """A call as the kernel takes it: maps that it cannot apply are applied, and of each token it is told what is left of it."""
    found = serves(variant)
    assert found is not None
    if not inlined(variant):
        operands, variant = featured(operands, variant, torch.promote_types(operands.q.dtype, torch.float32))
    arrays, told = operands.arrays(torch.float32), dict[str, Tensor]()
    logs, shown = logs_of(operands, found, arrays), shown_of(operands, found, arrays)
    if logs is not None:
        told |= {LOG_AT_Q: logs[0], LOG_AT_K: logs[1]}
    if shown is not None:
        told |= {SHOWN: shown}
    mask = e.true if found.behind is None else e.k <= e.q - found.behind
    return operands, replace(variant, mask=mask, score=e.score, gates=None), told


def can_run(operands: Operands, variant: Variant) -> bool:
    """Whether the kernel can run a call that other kernels cannot, or for which they have twice as much to do."""
    found = serves(variant)
    counted = operands.first_query is not None and not isinstance(operands.k_positions, Tensor)
    if found is None or not counted or operands.differentiated or variant.feature.width(operands.q.shape[-1]) > WIDEST:
        return False
    q_len, k_len = (likely(size, UNKNOWN_LENGTH) for size in (operands.q_len, operands.k_len))
    return bool(passed_over(variant)) or pays(found, q_len, k_len, operands.q.shape[-1], operands.v.shape[-1])


def is_alone(variant: Variant) -> bool:
    """Whether no other kernel than this one is for a variant, whatever its length, feature map included."""
    return serves(variant) is not None and inlined(variant) and passed_over(variant) is not None


def sources(shape: Shape) -> tuple[tuple[tuple[int, ...], str], ...]:
    """The source of the kernel, and the heads that it is for: all of them."""
    fading = Fading.TOGETHER if shape.variant.gates is None else Fading.ROWS
    return ((tuple(range(shape.heads)), states(spec_at(shape, stated(shape.variant)), fading)),)


@lru_cache(maxsize=128)
def _launch(shape: Shape) -> Launch:
    """The kernel for all calls that differ in lengths and positions only."""
    found = serves(shape.variant)
    assert found is not None
    spec = spec_at(shape, stated(shape.variant))
    logs = (stored.axes for name, stored in zip(shape.names, shape.stored, strict=True) if name == LOG_AT_Q)
    source = states(spec, Fading(next(logs, Fading.TOGETHER)))
    return Launch(_entry(source), found.behind, tuple(shape.names.index(name) for name, _ in spec.tables))


def _entry(source: str) -> Callable[[int], object]:
    run = load(source).states
    run.argtypes = [ctypes.c_void_p]
    return run


def run(
    shape: Shape,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    totals: Tensor | None,
    tables: Sequence[Tensor],
    *,
    kept: int,
) -> None:
    """Fill `out`; there are no totals."""
    assert totals is None
    assert not kept
    launch = _launch(replace(shape, batch=0, q_len=0, k_len=0, first_query=0, first_key=0, contents=()))
    behind = launch.behind
    offset = shape.k_len if behind is None else shape.first_query - shape.first_key - behind
    named = dict(zip(shape.names, tables, strict=True))
    logs = (in_rows(named[LOG_AT_Q]), in_rows(named[LOG_AT_K])) if LOG_AT_Q in named else None
    of_tables = [x for n in launch.numbers for x in table_words(tables[n])]
    told = Call(q, k, v, out, None, logs, named.get(SHOWN), offset)
    call(launch.run, [*told.words(), *shape.sizes(), *of_tables])


def in_rows(x: Tensor) -> Tensor:
    """A tensor whose rows of numbers lie in one piece, where tokens have such."""
    return x if x.ndim < 4 or x.stride(-1) == 1 else x.contiguous()


@dataclass(frozen=True, eq=False)
class Call:
    """The operands of one run of the kernel; heads of an operand that there are fewer of are shared.

    In `reverse`, query i meets the keys from i + offset on, and logs are those of a decay towards the past. Logs of each feature
    are [batch, heads, tokens, features], those of each number of a value [..., 1, value dim]: then there is no `mass`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    mass: Tensor | None
    logs: Logs | None
    shown: Tensor | None
    offset: int
    reverse: bool = False
    past: Earlier | None = None  # what queries meet before the keys

    @property
    def ahead(self) -> int:
        """The offset, tokens being counted from the last one in `reverse`."""
        return self.k.shape[2] - self.q.shape[2] - self.offset if self.reverse else self.offset

    def words(self) -> list[int]:
        """The fields in the order of the kernel's structure, up to the sizes. Backwards, tokens are counted from the last."""
        q_len, heads = self.q.shape[2], self.out.shape[1]
        operands = [self._placed(x) for x in (self.q, self.k, self.v, self.out)]
        pointers = [*(pointer for pointer, _ in operands), 0 if self.mass is None else self.mass.data_ptr()]
        strides = [stride for _, of_tokens in operands for stride in of_tokens]
        sharing = [heads // x.shape[1] for x in (self.q, self.k, self.v)]
        logs = [self._placed(x) for x in self.logs] if self.logs else [(0, (0, 0, 0))] * 2
        told = [word for pointer, of_tokens in logs for word in (pointer, *of_tokens)]
        shown, of_keys = (0, (0, 0, 0)) if self.shown is None else self._placed(self.shown)
        parallel = int(self.out.shape[0] * heads * q_len * self.q.shape[3] * self.v.shape[3] >= WORTH_THREADS)
        cut = segments(self.out.shape[0] * heads, q_len) if parallel else 1
        return [*pointers, *strides, *sharing, *told, -1 if self.reverse else 1, shown, *of_keys, parallel, cut, self.ahead]

    def _placed(self, x: Tensor) -> tuple[int, tuple[int, ...]]:
        """Where the first token to be met lies, and how far from each other rows of the batch, heads and tokens are."""
        batch, heads, token = x.stride()[:3]
        if not self.reverse:
            return x.data_ptr(), (batch, heads, token)
        return x.data_ptr() + (x.shape[2] - 1) * token * x.element_size(), (batch, heads, -token)


def segments(heads: int, q_len: int) -> int:
    """Into how many pieces the queries of each of so many heads are cut: several where threads would have nothing to do."""
    return max(1, min(torch.get_num_threads() // max(heads, 1), q_len // SHORTEST))


def gather(told: Call) -> None:
    """Fill `out` and `mass` with the sums of a call, all of whose operands have one dtype."""
    dtype, fading = str(told.q.dtype).removeprefix("torch."), Fading.of(told.logs or ())
    run = _gathering(told.q.shape[3], told.v.shape[3], dtype, fading)
    batch, heads = told.out.shape[:2]
    call(run, [*told.words(), batch, heads, heads, told.q.shape[2], told.k.shape[2], 0, 1, 0, 0])


@lru_cache(maxsize=128)
def _gathering(dim: int, value_dim: int, dtype: str, fading: Fading) -> Callable[[int], object]:
    return _entry(states(spec_of(GATHERED, dim, value_dim, dtype, {}), fading))
